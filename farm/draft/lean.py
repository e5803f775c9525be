# B rows, T tokens, M = B T, S positions read, H hidden, N query heads, G key/value heads, D head size, F expert width
"""A draft as decoding runs it: the arithmetic of model.py with q/k/v and gate/up fused and no module calls.

A draft step of a small model is bound by operators, not by bytes, and speculation pays only while k of them cost
little beside one step of the target. A test holds this forward to the module's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from farm.draft.expert import Expert
from farm.draft.model import Draft, DraftHead
from farm.draft.routed import FlatExpert, RoutedDeltas
from farm.draft.trunk import Trunk
from farm.layers.attention import Rotation, attend_cached
from farm.layers.by_row import ByRow
from farm.layers.cache import Site, SlotCache
from farm.layers.decoder import ALIKE, Decoder, TokenEnds, Weights
from farm.layers.dense import Dense, Gated, RmsNorm
from farm.layers.foreteller import Foreteller
from farm.layers.lora import Lora, LoraRows


@dataclass(frozen=True)
class LeanExpert:
    """D(silu(G n) * (U n)) with G and U in one product."""

    gated: Gated  # two of [F, H]
    down: Dense  # [H, F]

    @classmethod
    def of(cls, expert: Expert) -> LeanExpert:
        gated = Gated.of(expert.gate_proj.weight.detach(), expert.up_proj.weight.detach())
        return cls(gated, Dense.of(expert.down_proj.weight))

    @property
    def parts(self) -> tuple[Gated, Dense]:
        """As the kernels take them."""
        return self.gated, self.down

    def add_to(self, residual_MH: Tensor, normed_MH: Tensor) -> Tensor:
        """residual + E(normed), the sum taken by the last product."""
        return self.down.add_to(residual_MH, self.gated(normed_MH))


@dataclass(frozen=True)
class FusedExpert:
    """The two forms in which batches run an expert: of its target alone, and beside others'."""

    lean: LeanExpert
    flat: FlatExpert

    @classmethod
    def of(cls, expert: Expert) -> FusedExpert:
        return cls(LeanExpert.of(expert), FlatExpert.of(expert, expert.gate_proj.weight.shape[0]))


@dataclass(frozen=True)
class LeanTrunk:
    """The fused weights of a trunk; drafts of one trunk share them."""

    trunk: Trunk
    fc: Dense  # [H, 2 H]
    qkv: Dense  # [(N + 2 G) * D, H]
    out: Dense  # [H, N * D]
    norm: RmsNorm
    shared_expert: LeanExpert
    tables: tuple[Tensor, Tensor]  # cos and sin of every position

    @classmethod
    def of(cls, trunk: Trunk) -> LeanTrunk:
        """The fused form of a trunk, made once; move the trunk to its device before."""
        if trunk.fused is None:
            weight, (cos_SD, sin_SD) = trunk.fc.weight, trunk.tables(trunk.fc.weight.device)
            trunk.fused = cls.made_of(trunk, (cos_SD.to(weight.dtype), sin_SD.to(weight.dtype)))
        fused: LeanTrunk = trunk.fused
        return fused

    @classmethod
    def made_of(cls, trunk: Trunk, tables: tuple[Tensor, Tensor]) -> LeanTrunk:
        """The fused form of a trunk, which nothing but the caller keeps; `tables` are those of its config and dtype."""
        qkv = Dense.of(torch.cat([p.weight.detach() for p in (trunk.q_proj, trunk.k_proj, trunk.v_proj)]))
        fc, out = Dense.of(trunk.fc.weight), Dense.of(trunk.o_proj.weight)
        norm = RmsNorm.of(trunk.post_attention_layernorm.weight, trunk.config.rms_eps)
        return cls(trunk, fc, qkv, out, norm, LeanExpert.of(trunk.shared_expert), tables)

    @functools.cached_property
    def alone(self) -> Decoder | None:
        """The trunk without any private expert, for batches whose rows have one each; None without kernels."""
        return self.decoder()

    def decoder(self, *experts: LeanExpert) -> Decoder | None:
        """All of a draft with these private experts for all rows; None where the kernels cannot compute it."""
        mlps = [one.parts for one in (self.shared_expert, *experts)]
        weights = Weights(None, self.qkv, None, None, self.out, self.norm, mlps)
        config = self.trunk.config
        return Decoder.of([weights], (config.num_heads, config.num_kv_heads, config.head_dim), self.fc)


class Ends(Protocol):
    """Embedding and head of the rows' targets as a draft uses them; the head may be pruned to a draft vocabulary."""

    @property
    def vocabulary_C(self) -> Tensor | None:  # noqa: N802 - a tensor's name carries its shape
        """Token id of each column of the logits; None: all."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, ..., H] of token ids [B, ...]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, ..., C] of hidden states [B, ..., H]."""
        ...

    def token_ids(self, columns: Tensor) -> Tensor:
        """Token ids of columns of `logits`."""
        ...


class ExpertSum(Protocol):
    """One private expert for all rows, or one for each (farm/draft/routed.py)."""

    def add_to(self, residual_MH: Tensor, normed_MH: Tensor) -> Tensor:
        """residual + E(normed)."""
        ...


@dataclass(frozen=True)
class Own:
    """What each row has of its own, for the kernels: a private expert, and perhaps changes to the trunk."""

    experts: tuple[LeanExpert, ...]
    deltas: tuple[Lora, ...]
    which: tuple[int, ...]  # index of each row's changes in `deltas`, -1 for none

    def by_row(self, num_tokens: int) -> ByRow:
        """Of a call with `num_tokens` tokens a row."""
        device = self.experts[0].down.weight.device
        loras = LoraRows(self.deltas, self.which, num_tokens, device) if self.deltas else None
        return ByRow(loras, [expert.parts for expert in self.experts])


class LeanDraft:
    """Predicted hidden states of a trunk with private experts; called like `Draft`, without gradients."""

    def __init__(
        self, trunk: LeanTrunk, experts: ExpertSum | Own, deltas: RoutedDeltas | None = None
    ) -> None:
        """`deltas` is what rows change in the trunk, operator by operator; None: nothing.

        What rows have of their own may come as `Own` where the trunk is `alone` in the kernels.
        """
        self.config = trunk.trunk.config
        self._lean, self._experts, self._deltas = trunk, experts, deltas
        self._decoder: Decoder | None = None
        if isinstance(experts, Own):
            self._decoder = trunk.alone
        elif isinstance(experts, LeanExpert) and deltas is None:
            self._decoder = trunk.decoder(experts)

    @property
    def parts(self) -> tuple[object, ...]:
        """What it is made of; drafts of the same parts compute the same."""
        return self._lean, self._experts, self._deltas

    @property
    def changed_by_row(self) -> bool:
        """Whether rows have experts or changes of their own: what routes them lives no longer than a batch."""
        return self._deltas is not None or not isinstance(self._experts, LeanExpert)

    @classmethod
    def of(cls, draft: Draft) -> LeanDraft:
        """One draft for all rows; its changes to the trunk are folded into a trunk of its own."""
        return cls(LeanTrunk.of(draft.folded().trunk), LeanExpert.of(draft.expert))

    def __call__(
        self,
        embedded_BTH: Tensor,
        hidden_BTH: Tensor,
        positions_BT: Tensor,
        site: Site,
    ) -> Tensor:
        """Predicted hidden state [B, T, H]; see Trunk.forward for the arguments. Keys and values go to the site."""
        return self.read(embedded_BTH, hidden_BTH, self.rotation(positions_BT), site)

    def rotation(self, positions_BT: Tensor) -> Rotation:
        """What `read` needs of the positions."""
        n, g = self.config.num_heads, self.config.num_kv_heads
        return Rotation(self._lean.tables, positions_BT, n + g, g)

    def foreteller(self, head: Ends, cache: SlotCache, num_steps: int) -> Foreteller | None:
        """For chains of one token and `num_steps` more; None where the kernels cannot compute them."""
        decoder = self._decoder
        if decoder is None or not isinstance(head, LeanHead) or not decoder.can_foretell(head.ends):
            return None
        by_row = self._experts.by_row(1) if isinstance(self._experts, Own) else ALIKE
        return Foreteller(decoder, head.ends, self._lean.tables, cache, num_steps, by_row)

    def read(
        self,
        embedded_BTH: Tensor,
        hidden_BTH: Tensor,
        rotation: Rotation,
        site: Site,
    ) -> Tensor:
        """As calling it, with what it needs of the positions made before."""
        b, t, h = embedded_BTH.shape
        n, g, d = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        if self._decoder is not None:
            by_row = self._experts.by_row(t) if isinstance(self._experts, Own) else ALIKE
            return self._decoder.predict(embedded_BTH, hidden_BTH, rotation, site, by_row)
        assert not isinstance(self._experts, Own)
        deltas = None if self._deltas is None else self._deltas.rows(t)
        x_MX = torch.cat((embedded_BTH, hidden_BTH), dim=-1).view(b * t, 2 * h)
        u_MH = self._lean.fc(x_MX)
        if deltas is not None:
            u_MH = deltas.add(0, "fc", x_MX, u_MH)
        qkv_MX = self._lean.qkv(u_MH)
        if deltas is not None:
            qkv_MX = deltas.add(0, "qkv", u_MH, qkv_MX)
        qkv_BTND = rotation(qkv_MX.view(b, t, n + 2 * g, d))
        k_BGSD, v_BGSD = site.window.write(0, qkv_BTND[:, :, n:])
        mixed_MX = attend_cached(qkv_BTND[:, :, :n], k_BGSD, v_BGSD, site.visible).view(b * t, n * d)
        a_MH = self._lean.out.add_to(u_MH, mixed_MX)
        if deltas is not None:
            a_MH = deltas.add(0, "out", mixed_MX, a_MH)
        n_MH = self._lean.norm(a_MH)
        a_MH = self._experts.add_to(self._lean.shared_expert.add_to(a_MH, n_MH), n_MH)
        return a_MH.view(b, t, h)


class LeanHead:
    """A target's embedding and head as decoding uses them for a draft; like `DraftHead`, without gradients."""

    def __init__(self, head: DraftHead, whole: Dense) -> None:
        """`whole` is the target's own head, shared where the draft's vocabulary is not pruned."""
        self.vocab_size, self.vocabulary_C = head.embedding_VH.shape[0], head.vocabulary_C
        self.embed, self.token_ids = head.embed, head.token_ids
        self._product = whole if head.vocabulary_C is None else Dense.of(head.weight_CH)
        self.ends = TokenEnds(head.embedding_VH, self._product, head.vocabulary_C)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] of hidden states [..., H]."""
        logits = self._product(hidden.reshape(-1, hidden.shape[-1]))
        return logits.view(*hidden.shape[:-1], logits.shape[-1])
