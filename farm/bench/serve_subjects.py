"""What a served family is asked: its targets, held-out conversations, and the order in which they are asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from farm.bench.serve_client import Ask
from farm.config import Manifest
from farm.data.prompts import load_prompts, split_rows
from farm.sections import TargetSpec

MAX_TARGETS, NUM_PROMPTS, MAX_TOKENS = 8, 8, 64

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Subjects:
    """Targets, and conversations that each of them is asked, so that answers tell targets apart."""

    specs: tuple[TargetSpec, ...]
    prompts: tuple[Messages, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Subjects:
        """The LoRA targets of one base, at most eight, or else the full ones; prompts of all of them in turn."""
        loras = [spec for spec in manifest.targets if spec.lora is not None]
        loras = [spec for spec in loras if spec.model == loras[0].model]
        specs = tuple(loras or manifest.targets)[:MAX_TARGETS]
        pools = [_held_out(manifest, spec) for spec in specs]
        in_turn = (prompt for together in zip(*pools, strict=False) for prompt in together)
        return cls(specs, tuple(itertools.islice(in_turn, NUM_PROMPTS)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    def each(self, *, max_drafted: int | None = None) -> list[Ask]:
        """Every prompt to every target, once."""
        return [
            Ask(name, number, messages, MAX_TOKENS, max_drafted)
            for number, messages in enumerate(self.prompts)
            for name in self.names
        ]

    def in_turn(self) -> Iterator[Ask]:
        """The same without end: neighbours are of different targets."""
        return itertools.cycle(self.each())


def _held_out(manifest: Manifest, spec: TargetSpec) -> list[Messages]:
    found, settings = load_prompts(spec.prompts), manifest.evaluate
    _, rows = split_rows(found.num_rows, manifest.regenerate.rows, settings.rows, settings.prompts)
    return [prompt.messages for prompt in found.prompts if prompt.row in rows]
