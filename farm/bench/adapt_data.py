"""What `farm bench adapt` works on: an onboarded target's answers, its data set's own, held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from farm.artifacts import Artifacts
from farm.bench.family import held_out
from farm.config import Manifest, UserError
from farm.data.features import Sample, local_shards, read_shards, write_shard
from farm.data.prompts import load_prompts, split_prompts
from farm.data.shards import shard_names
from farm.decode.regenerate import Recapture, prefill_rows
from farm.decode.sampling import SamplingParams
from farm.draft.checkpoint import (
    EXPERT_FILE,
    TRUNK_FILE,
    build_trunk,
    load_adapter,
    read_config,
    read_tensors,
)
from farm.draft.config import DraftConfig
from farm.draft.model import Draft
from farm.evaluate.bench import PromptIds, TauResult, measure_tau
from farm.evaluate.published import BASE, Published, spec_of
from farm.sections import SelectSettings, Strategy, TargetSpec
from farm.store import open_store
from farm.target.load import LoadedTarget, open_target
from farm.train.scoring import Selection, SelectTask, select_rows

ANSWERS = "answers"


@dataclass(frozen=True)
class Subject:
    """One target with everything that adapting to it takes; its model is loaded once for all rows."""

    spec: TargetSpec
    manifest: Manifest
    target: LoadedTarget
    prompts: tuple[PromptIds, ...]  # held out
    shards: Mapping[str, tuple[str, ...]]  # locations of feature files, by data
    trunk_folder: Path
    trunk: Mapping[str, Tensor]
    config: DraftConfig

    @property
    def base_expert(self) -> str:
        return str(self.trunk_folder / EXPERT_FILE)

    def samples(self, data: str) -> list[Sample]:
        return read_shards(local_shards(self.shards[data]), capture=Recapture(lambda: self.target))

    def draft(self, folder: Path | None) -> Draft:
        """The draft that a run left in a folder: its expert, and its trunk where it changed it; None: the base's."""
        state, expert = self.trunk, Path(self.base_expert)
        if folder is not None:
            expert = folder / EXPERT_FILE
            state = read_tensors(folder / TRUNK_FILE) if (folder / TRUNK_FILE).exists() else state
        draft = Draft(build_trunk(self.config, state), *load_adapter(self.config, expert))
        forward = self.target.forward
        return draft.to(forward.device, forward.dtype).requires_grad_(False)

    def measure(self, draft: Draft) -> TauResult:
        """Greedy decoding of the held-out prompts by the engine."""
        settings = self.manifest.evaluate
        params = SamplingParams(seed=settings.seed, max_new_tokens=settings.max_new_tokens)
        return measure_tau(self.target, draft, self.prompts, params, k=settings.k)


def subjects(manifest: Manifest, names: Sequence[str], *, dataset: bool = True) -> Iterator[Subject]:
    """The named targets, or every full one, opened one at a time; shards of other data live as long as each is used.

    The data set's own answers are read by the target only where `dataset` says that something is trained on them.
    Raises UserError when the store holds no family, no such target, or no answers of one.
    """
    published = Published.of(manifest.store)
    for name in names or [spec.name for spec in manifest.targets if spec.lora is None]:
        with TemporaryDirectory() as folder:
            yield _open(manifest, spec_of(manifest, name), published, Path(folder) if dataset else None)


def data_keys(manifest: Manifest) -> dict[str, Any]:
    """What names the data that adapting is measured on: dtype, trunk, and by target the answers of its live adapter.

    Raises UserError when the store holds no family.
    """
    published = Published.of(manifest.store)
    live = {spec.name: published.registry.live(spec.name) for spec in manifest.targets}
    answers = {name: version.card["answers_key"] for name, version in live.items() if version is not None}
    return {"dtype": manifest.dtype, "trunk": published.trunk_key, "answers": answers}


def _open(manifest: Manifest, spec: TargetSpec, published: Published, folder: Path | None) -> Subject:
    target = open_target(spec, manifest.dtype)
    shards = {"regenerated": _regenerated(manifest, spec, published)}
    shards["dataset"] = () if folder is None else _prefilled(manifest, spec, target, folder)
    state = read_tensors(published.trunk_folder / TRUNK_FILE)
    return Subject(
        spec, manifest, target, held_out(manifest, spec, target), shards,
        published.trunk_folder, state, read_config(published.trunk_folder),
    )  # fmt: skip


def _regenerated(manifest: Manifest, spec: TargetSpec, published: Published) -> tuple[str, ...]:
    """The answers that the target's live adapter was made of."""
    artifacts, live = Artifacts(open_store(manifest.store)), published.registry.live(spec.name)
    found = None if live is None else artifacts.find(ANSWERS, live.card["answers_key"])
    if found is None:
        raise UserError(f"{spec.name}: the store has no answers of it; run `farm onboard` with it first")
    names = sorted(name for name in found.manifest["files"] if name.startswith("features-"))
    return tuple(artifacts.location(found, name) for name in names)


def _prefilled(manifest: Manifest, spec: TargetSpec, target: LoadedTarget, folder: Path) -> tuple[str, ...]:
    """The data set's own answers to the same prompts, as the target would have seen them; empty where it has none."""
    found, settings = load_prompts(spec.prompts), manifest.evaluate
    split = split_prompts(found, manifest.regenerate.rows, settings.rows, settings.prompts)
    prompts = [prompt for prompt in split.prompts if prompt.answer is not None]
    if not prompts:
        return ()
    artifacts = Artifacts(open_store(folder.as_uri()))
    write_shard(artifacts, ANSWERS, "dataset", 0, prefill_rows(target, prompts, manifest.regenerate))
    return (str(artifacts.store.local_path(f"artifacts/{ANSWERS}/dataset/{shard_names(0)[1]}")),)


def choose_rows(subject: Subject, strategy: Strategy, fraction: float, seed: int) -> Selection:
    """Some of the regenerated answers, to the row."""
    manifest, spec = subject.manifest, subject.spec
    task = SelectTask(
        settings=SelectSettings(strategy=strategy, fraction=fraction, exact=True, seed=seed),
        base=spec_of(manifest, BASE), target=spec, dtype=manifest.dtype,
        trunk_folder=str(subject.trunk_folder), shards=subject.shards["regenerated"],
        origins=load_prompts(spec.prompts).origins,
    )  # fmt: skip
    return select_rows(task)
