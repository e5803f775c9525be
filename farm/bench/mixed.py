"""`farm bench mixed`: a batch of several targets beside the same batch on each of them alone.

Each round of a mixture costs one forward for each checkpoint in it; LoRA targets of one checkpoint share theirs. What
a mixture reaches is held against the same requests decoded target by target: against batches of its own size for LoRA
targets, against the groups that it is made of for full checkpoints.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from farm.bench.decode import EQUAL_TOKENS, Row, timed
from farm.bench.family import held_out
from farm.bench.floor import round_bytes
from farm.bench.report import Ratio
from farm.config import Manifest, UserError
from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.evaluate.bench import PromptIds
from farm.evaluate.published import Published
from farm.evaluate.target import OpenTrunk
from farm.sections import TargetSpec
from farm.target.load import LoadedTarget, open_target
from farm.target.lora import open_beside

BATCH, WAVES, MAX_DRAFTED = 8, 3, 4
CONTROLS = ("off", "fixed-4")


@dataclass(frozen=True)
class Voice:
    """One target that takes part: its route, and its held-out prompts."""

    route: Route
    prompts: tuple[PromptIds, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """Requests that share a batch; `alone` are the cases whose targets it mixes, empty for those.

    WAVES requests come for each row, so that rows which end are followed by others, as at an endpoint.
    """

    kind: str  # "lora", "lora, merged" or "full"
    voices: tuple[Voice, ...]
    num_rows: tuple[int, ...]  # of each voice in a full batch
    alone: tuple[Case, ...] = ()

    @property
    def name(self) -> str:
        return self.voices[0].route.target if len(self.voices) == 1 else f"{len(self.voices)} targets"

    @property
    def tokens(self) -> int:
        return WAVES * sum(self.num_rows) * EQUAL_TOKENS

    def requests(self) -> list[Request]:
        """Of all targets in turn, as they would arrive."""
        params = SamplingParams(max_new_tokens=EQUAL_TOKENS)
        counts = [WAVES * num for num in self.num_rows]
        pairs = [(v, i) for i in range(max(counts)) for v, count in enumerate(counts) if i < count]
        voices = [(self.voices[v], i) for v, i in pairs]
        return [
            Request(str(number), voice.prompts[i % len(voice.prompts)], params, voice.route.target)
            for number, (voice, i) in enumerate(voices)
        ]


def cases(manifest: Manifest) -> list[Case]:
    """What this family allows: LoRA targets of one checkpoint, full checkpoints.

    Raises UserError when there are no two live adapters of a kind.
    """
    published = Published.of(manifest.store)
    loras = [spec for spec in manifest.targets if spec.lora is not None]
    loras = [spec for spec in loras if spec.model == loras[0].model][:BATCH]
    fulls = [spec for spec in manifest.targets if spec.lora is None][:BATCH]
    if max(len(loras), len(fulls)) < 2:
        raise UserError(
            "the family has no two LoRA targets of one checkpoint, nor two full ones, to decode together"
        )
    found: list[Case] = []
    if len(loras) > 1:
        checkpoint = open_target(loras[0].model_copy(update={"lora": None}), manifest.dtype)
        targets = [open_target(loras[0], manifest.dtype), *(_beside(spec, checkpoint) for spec in loras)]
        merged, *voices = _voices(manifest, [loras[0], *loras], targets, published)
        found += [Case("lora, merged", (merged,), (BATCH,)), *_mixture("lora", voices)]
    if len(fulls) > 1:
        targets = [open_target(spec, manifest.dtype) for spec in fulls]
        found += _mixture("full", _voices(manifest, fulls, targets, published))
    return found


def measure(every: Sequence[Case], model: str, repeats: int) -> Iterator[tuple[Case, Row]]:
    """Runs each case once to warm up, then all in turn, `repeats` times."""
    runs = [(case, control, _engine(case, control)) for case in every for control in CONTROLS]
    for case, _, engine in runs:
        timed(engine, case.requests())
    for repeat in range(repeats):
        for case, control, engine in runs:
            measured = timed(engine, case.requests())
            yield case, Row(
                model=model, target=f"{case.kind}: {case.name}", engine="farm", control=control,
                draft="none" if control == "off" else "adapted", batch=sum(case.num_rows),
                adapters=len(case.voices), workload="equal",
                dtype=str(case.voices[0].route.forward.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(), repeat=repeat,
                tokens_per_s=case.tokens / measured.seconds, **measured.fields,
            )  # fmt: skip


def over_alone(case: Case, control: str, rows: dict[tuple[Case, str], list[Row]]) -> Ratio:
    """Speed of a mixture over that of its targets' batches one after the other, within each repeat."""
    ratios = []
    for repeat, row in enumerate(rows[case, control]):
        seconds = sum(one.tokens / rows[one, control][repeat].tokens_per_s for one in case.alone)
        tokens = sum(one.tokens for one in case.alone)
        ratios.append(row.tokens_per_s * seconds / tokens)
    return Ratio.of(ratios)


def by_bytes(case: Case, control: str) -> float:
    """What a mixture would reach over its targets alone if a round took as long as its weights take to be read.

    Where weights lie in a cache arithmetic counts too, which a mixture has no more of.
    """
    forwards = 0 if control == "off" else MAX_DRAFTED
    read = sum(round_bytes([voice.route for voice in one.voices], forwards) for one in case.alone)
    rows = sum(sum(one.num_rows) for one in case.alone)
    return read / rows * sum(case.num_rows) / round_bytes([voice.route for voice in case.voices], forwards)


def table(rows: dict[tuple[Case, str], list[Row]]) -> Table:
    """A case a line; mixtures with their ratio over their targets alone."""
    out = Table(
        caption="medians over repeats; over alone: within a repeat, with the 5 % and 95 % quantiles; "
        "by bytes: what the weights that are read would allow"
    )
    for heading in ("batch of", "requests", "targets", "control"):
        out.add_column(heading)
    for heading in ("tokens/s", "tau", "over alone", "by bytes", "host"):
        out.add_column(heading, justify="right")
    for (case, control), measured in rows.items():
        spent = [(r.draft_s or 0) + (r.verify_s or 0) + (r.sample_s or 0) + (r.host_s or 0) for r in measured]
        host = statistics.median((r.host_s or 0) / s for r, s in zip(measured, spent, strict=True))
        out.add_row(
            f"{case.kind}: {case.name}", str(sum(case.num_rows)), str(len(case.voices)), control,
            f"{statistics.median(r.tokens_per_s for r in measured):,.1f}",
            f"{statistics.median(r.tau or 0.0 for r in measured):.2f}",
            str(over_alone(case, control, rows)) if case.alone else "",
            f"{by_bytes(case, control):.2f}" if case.alone else "", f"{host:.1%}",
        )  # fmt: skip
    return out


def write(folder: Path, rows: dict[tuple[Case, str], list[Row]], source: dict[str, Any]) -> Path:
    """mixed.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    ratios = {
        f"{case.kind}: {case.name}, {control}": asdict(over_alone(case, control, rows))
        | {"by_bytes": by_bytes(case, control)}
        for case, control in rows
        if case.alone
    }
    every = [asdict(row) for measured in rows.values() for row in measured]
    record = {**source, "over_alone": ratios, "rows": every}
    (folder / "mixed.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder / "mixed.json"


def _mixture(kind: str, voices: Sequence[Voice]) -> list[Case]:
    """The mixture of all, and each target alone: in a batch as large (LoRA), or in a group as large (full)."""
    each = tuple(BATCH // len(voices) + (i < BATCH % len(voices)) for i in range(len(voices)))
    sizes = [BATCH] * len(voices) if kind == "lora" else each
    alone = tuple(Case(kind, (voice,), (size,)) for voice, size in zip(voices, sizes, strict=True))
    return [*alone, Case(kind, tuple(voices), each, alone)]


def _beside(spec: TargetSpec, checkpoint: LoadedTarget) -> LoadedTarget:
    beside = open_beside(spec, checkpoint)
    if beside is None:
        raise UserError(
            f"{spec.name}: its LoRA can only be merged, so it cannot share its checkpoint's forward"
        )
    return beside


def _voices(
    manifest: Manifest, specs: Sequence[TargetSpec], targets: Sequence[LoadedTarget], published: Published
) -> list[Voice]:
    """Each target with its live adapter over one trunk. Raises UserError for a target without one."""
    trunk, voices = OpenTrunk.of(published.trunk_folder, targets[0]), []
    for spec, target in zip(specs, targets, strict=True):
        live = published.live_expert(spec.name)
        if live is None:
            raise UserError(f"{spec.name}: has no live adapter; run `farm onboard` first")
        route = Route(target.forward, frozenset(), trunk.draft(str(live.file)), target.lora, spec.name)
        voices.append(Voice(route, held_out(manifest, spec, target)))
    return voices


def _engine(case: Case, control: str) -> Engine:
    longest = max(len(ids) for voice in case.voices for ids in voice.prompts) + EQUAL_TOKENS
    routes = [voice.route for voice in case.voices]
    if control == "off":
        routes = [replace(route, draft=None) for route in routes]
    return Engine(
        routes, num_slots=sum(case.num_rows), max_length=min(longest, routes[0].forward.max_positions),
        k=MAX_DRAFTED, control=make_control(control, MAX_DRAFTED),
    )  # fmt: skip
