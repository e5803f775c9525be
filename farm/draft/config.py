"""Sizes of a draft: everything needed to rebuild it, kept beside its weights as draft.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DraftConfig:
    """One EAGLE-1 layer whose MLP is a shared and a private expert (EDA, arXiv 2603.09527)."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    shared_width: int
    private_width: int
    rms_eps: float
    rope_theta: float
    vocab_size: int

    @classmethod
    def for_base(
        cls, base: Any, shared_width: int | None = None, private_width: int | None = None
    ) -> DraftConfig:
        """A draft that has the head layout of a `transformers` config; widths default to its MLP's."""
        shared = shared_width or getattr(base, "intermediate_size", None) or 4 * base.hidden_size
        rope = getattr(base, "rope_parameters", None) or {}
        return cls(
            hidden_size=base.hidden_size,
            num_heads=base.num_attention_heads,
            num_kv_heads=getattr(base, "num_key_value_heads", None) or base.num_attention_heads,
            head_dim=getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
            shared_width=shared,
            private_width=private_width or shared,
            rms_eps=getattr(base, "rms_norm_eps", None) or 1e-6,
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            vocab_size=base.vocab_size,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
