# B rows, T tokens, V vocabulary
"""The parity gate: vLLM with an exported draft says what our engine says, and accepts as much of the draft.

Both decode greedily in float32, chains of k, no stop tokens, the same prompts. Ours drafts over the target's full head
as vLLM does. Greedy speculation gives each engine its own plain tokens; the two may still part where the target's two
best logits are as close as rounding, so a sequence that differs is judged by that gap.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from farm.bench.vllm_engine import VllmAnswer, VllmEngine, VllmSettings, find_python, kv_bytes
from farm.config import UserError
from farm.decode.engine import OFFLINE_PREFILL_TOKENS, Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.draft.model import Draft
from farm.evaluate.bench import PromptIds
from farm.evaluate.target import OpenTrunk
from farm.export.engines import ServingEngine
from farm.export.folder import MERGED_FOLDER, ExportTask, export
from farm.layers.cache import Rows
from farm.store import local_copy
from farm.target.load import LoadedTarget

DTYPE = "float32"
NEW_TOKENS, NUM_PROMPTS, SLOTS = 128, 64, 8
TAU_TOLERANCE = 0.02  # relative
# Of logits; what float32 leaves of them after sums in another order. A real difference is far above it.
GAP_TOLERANCE = 1e-2
HEAD_TOLERANCE = 0.03  # relative: what the full head may cost a draft that was trained over a part of it
ARMS = ("plain", "base_draft", "adapted")


@dataclass(frozen=True)
class Parity:
    """What parity.json holds. tau counts whole verifications, 1 + accepted / drafts, in both engines."""

    target: str
    k: int
    dtype: str
    tau_farm: float
    tau_vllm: float
    tau_farm_pruned: float | None  # None: the draft's vocabulary is not pruned
    sequences: int
    differing: int
    gap_at_first_difference: tuple[float, ...]  # of each sequence that differs
    tokens_per_s_plain: float  # of vLLM, batch 1, as are the next two
    tokens_per_s_base_draft: float
    tokens_per_s_adapted: float

    def failures(self) -> list[str]:
        """Why the gate is shut; empty when it is open."""
        found = []
        if not abs(self.tau_vllm / self.tau_farm - 1) <= TAU_TOLERANCE:
            found.append(f"tau is {self.tau_vllm:.3f} in vLLM and {self.tau_farm:.3f} here")
        wide = [gap for gap in self.gap_at_first_difference if not gap <= GAP_TOLERANCE]
        if wide:
            found.append(f"{len(wide)} sequences differ where the target is sure (gap up to {max(wide):.3g})")
        return found

    def warnings(self) -> list[str]:
        """What passes the gate and should not stay."""
        if self.tau_farm_pruned is None or self.tau_farm >= (1 - HEAD_TOLERANCE) * self.tau_farm_pruned:
            return []
        return [
            f"over the full head tau is {self.tau_farm:.3f}, over the draft vocabulary {self.tau_farm_pruned:.3f}: "
            "training left the tokens outside it to chance"
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A target opened in float32 with its trunk and held-out prompts, and how it is measured."""

    target: LoadedTarget
    prompts: tuple[PromptIds, ...]
    speed_prompts: int
    speed_rounds: int


def verify(
    task: ExportTask, folder: Path, base_expert: Path, subject: Subject, say: Callable[[str], None]
) -> Parity:
    """Serves the target with the draft in `folder`, and with the base's, in vLLM, and decodes the same here.

    `task` is that of `as_verified`. Raises UserError when there are too few prompts, or vLLM cannot open the two.
    """
    prompts = fitting(subject, task.k)
    model = str(folder / MERGED_FOLDER) if task.target.lora else str(local_copy(task.target.model))
    with TemporaryDirectory() as scratch:
        # Without the LoRA: the target is merged beside the adapted draft already, and its config is all that matters.
        plain = task.target.model_copy(update={"lora": None})
        base = export(replace(task, target=plain, expert=base_expert, dtype=DTYPE), Path(scratch) / "base")
        drafts = {"plain": None, "base_draft": base, "adapted": folder}
        say(f"vLLM is built {len(ARMS)} times")
        with _engines(model, drafts, subject.target, prompts, task.k) as engines:
            say(f"{task.target.name}: {len(prompts)} prompts in vLLM")
            theirs = engines["adapted"].generate(prompts, [NEW_TOKENS] * len(prompts), SLOTS)
            say("speed at batch 1, in turn")
            speeds = measure_speeds(engines, prompts[: subject.speed_prompts], subject.speed_rounds)
    say(f"{task.target.name}: the same here")
    opened = OpenTrunk.of(task.trunk_folder, subject.target)
    pruned = None
    if opened.trunk.vocabulary_C is not None:
        _, pruned = decode_here(subject.target, opened.draft(str(task.expert)), prompts, task.k)
        opened.trunk.vocabulary_C = None
    ours, tau = decode_here(subject.target, opened.draft(str(task.expert)), prompts, task.k)
    return compare(task, subject.target, prompts, (ours, tau, pruned), theirs, speeds)


def fitting(subject: Subject, k: int) -> list[PromptIds]:
    """The first prompts whose answers both engines can draft to their end, as many as the gate wants."""
    room = subject.target.max_positions - NEW_TOKENS - spare(k)
    found = [ids for ids in subject.prompts if len(ids) <= room]
    if len(found) < NUM_PROMPTS:
        raise UserError(
            f"{subject.target.name}: has {len(found)} held-out prompts with room for {NEW_TOKENS} tokens, parity needs "
            f"{NUM_PROMPTS}; raise evaluate.prompts"
        )
    return found[:NUM_PROMPTS]


def spare(k: int) -> int:
    """Positions behind the longest answer that vLLM needs to draft to its end.

    It leaves a whole batch undrafted once its longest sequence, counted as if the rounds in flight were accepted, and k
    more tokens could pass the last position.
    """
    return 4 * (k + 1)


def decode_here(
    target: LoadedTarget, draft: Draft, prompts: Sequence[PromptIds], k: int
) -> tuple[list[tuple[int, ...]], float]:
    """Greedy tokens of each prompt by our engine, always k drafted, and tau as vLLM counts it.

    vLLM drafts k tokens in an answer's last round too, and counts all that it accepts; here drafts end with the
    answer. So requests ask for k tokens more, and rounds that begin behind the answer are left out.
    """
    engine = Engine(
        [Route(target.forward, frozenset(), draft)], num_slots=SLOTS,
        max_length=max(map(len, prompts)) + NEW_TOKENS + k, k=k, prefill_tokens=OFFLINE_PREFILL_TOKENS,
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=NEW_TOKENS + k)
    said: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, ids in enumerate(prompts):
        engine.add(Request(str(i), ids, params))
    drafts = accepted = 0
    while engine.has_work:
        for output in engine.step():
            if output.num_drafted is not None:
                drafts, accepted = drafts + 1, accepted + output.num_drafted
            said[output.request_id] += output.tokens
            if len(said[output.request_id]) >= NEW_TOKENS:
                engine.cancel(output.request_id)
    return [tuple(tokens[:NEW_TOKENS]) for tokens in said.values()], 1 + accepted / drafts


def compare(
    task: ExportTask,
    target: LoadedTarget,
    prompts: Sequence[PromptIds],
    ours: tuple[Sequence[Sequence[int]], float, float | None],
    theirs: VllmAnswer,
    speeds: Mapping[str, float],
) -> Parity:
    """The record of both engines' answers; `ours` are tokens, tau, and tau over the pruned head."""
    tokens, tau, pruned = ours
    gaps = []
    for ids, here, there in zip(prompts, tokens, theirs.tokens, strict=True):
        if (index := first_difference(here, there)) is not None:
            gaps.append(top_two_gap(target, [*ids, *here[:index]]))
    return Parity(
        target=task.target.name, k=task.k, dtype=DTYPE,
        tau_farm=tau, tau_vllm=theirs.tau, tau_farm_pruned=pruned,
        sequences=len(prompts), differing=len(gaps), gap_at_first_difference=tuple(gaps),
        **{f"tokens_per_s_{arm}": speeds[arm] for arm in ARMS},
    )  # fmt: skip


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, a missing one included; None when they are equal."""
    pairs = zip(left, right, strict=False)
    found = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    return min(len(left), len(right)) if found is None and len(left) != len(right) else found


@torch.inference_mode()
def top_two_gap(target: LoadedTarget, ids: Sequence[int]) -> float:
    """How much the target's best logit after `ids` is above its second best."""
    forward = target.forward
    tokens_BT = torch.tensor([list(ids)], device=forward.device)
    hidden_BTH = forward.forward(tokens_BT, Rows([0]), forward.new_cache(1, len(ids)))
    best, second = forward.logits(hidden_BTH[:, -1])[0].float().topk(2).values.tolist()
    return float(best - second)


def measure_speeds(
    engines: Mapping[str, VllmEngine], prompts: Sequence[PromptIds], rounds: int
) -> dict[str, float]:
    """Tokens a second with prefill at batch 1, medians over rounds in which the engines take turns."""
    speeds: dict[str, list[float]] = {arm: [] for arm in engines}
    for engine in engines.values():
        engine.generate(prompts[:1], [NEW_TOKENS], 1)  # the first run pays for allocations
    for _ in range(rounds):
        seconds = dict.fromkeys(engines, 0.0)
        for ids in prompts:
            for arm, engine in engines.items():
                seconds[arm] += engine.generate([ids], [NEW_TOKENS], 1).seconds
        for arm, spent in seconds.items():
            speeds[arm].append(len(prompts) * NEW_TOKENS / spent)
    return {arm: statistics.median(values) for arm, values in speeds.items()}


def as_verified(task: ExportTask) -> ExportTask:
    """The task in the gate's dtype. Raises UserError, before anything is written, for what cannot be compared."""
    if task.engine is not ServingEngine.VLLM:
        raise UserError(
            f"--verify: {task.engine} does not run here; verify with --to vllm, the weights are the same"
        )
    if task.dtype not in (None, DTYPE):
        raise UserError(f"--verify: engines are compared in {DTYPE}; leave out --dtype {task.dtype}")
    find_python()
    return replace(task, dtype=DTYPE)


@contextmanager
def _engines(
    model: str,
    drafts: Mapping[str, Path | None],
    target: LoadedTarget,
    prompts: Sequence[PromptIds],
    k: int,
) -> Iterator[dict[str, VllmEngine]]:
    """An engine for each draft; None decodes plainly."""
    python, running = find_python(), dict[str, VllmEngine]()
    max_length = max(map(len, prompts)) + NEW_TOKENS + spare(k)
    space = kv_bytes(target.config, 2 * max_length * SLOTS)
    try:
        for arm, folder in drafts.items():
            draft = None if folder is None else {"method": "eagle", "model": str(folder)}
            speculative = draft and {**draft, "num_speculative_tokens": k}
            settings = VllmSettings(model, DTYPE, max_length, SLOTS, speculative, counts=True)
            running[arm] = VllmEngine(settings, space, python)
        yield running
    finally:
        for engine in running.values():
            engine.close()
