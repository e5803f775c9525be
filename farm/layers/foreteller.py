# B rows, T tokens, K drafted tokens, H hidden, C draft vocabulary
"""A draft at work in the kernels: a call a token, or a call a chain."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from farm.layers.by_row import ByRow
from farm.layers.cache import Rows, SlotCache
from farm.layers.decoder import ALIKE, Call, Decoder, Foretelling, TokenEnds
from farm.layers.kernels import address, check_tables, fields, kernels


class Growth(ctypes.Structure):
    """Mirrors the struct of the same name in cpu/decoder.h."""

    _fields_ = fields(
        "accepted expected verify_above draft_above limits positions zeros forwards kept", "bins width length"
    )


class Rule(Protocol):
    """When chains grow, see farm/decode/growth.py."""

    @property
    def accepted(self) -> Sequence[Sequence[float]]: ...

    @property
    def expected(self) -> Sequence[Sequence[float]]: ...

    @property
    def packed(self) -> tuple[array[float], ...]: ...


class RuleOfRows(Protocol):
    """A rule and how far each row may go by it."""

    @property
    def limits(self) -> Sequence[int]: ...

    @property
    def rule(self) -> Rule: ...


class Chain(NamedTuple):
    """Tokens of the positions to verify, largest probabilities at those that were drafted, and the draft forwards."""

    tokens_BK: Tensor
    peaks: list[list[float]]  # [forwards][B]; empty where nothing asks for them
    forwards: int


class Foreteller:
    """A draft at work on a batch: reads tokens from their ids to the logits behind them, a call of the kernels each.

    It first reads T tokens a row, of which `counts[b]` are real and the others padding, then one at a time, up to
    `num_steps` of them; or it goes the whole way by itself. Addresses are worked out once; outputs of each call stay in
    memory of their own.
    """

    def __init__(
        self,
        decoder: Decoder,
        ends: TokenEnds,
        tables: tuple[Tensor, Tensor],
        cache: SlotCache,
        num_steps: int,
        by_row: ByRow = ALIKE,
    ) -> None:
        assert decoder.can_foretell(ends)
        check_tables(tables, decoder.struct.size, cache.buffer.dtype)
        assert cache.buffer.dtype == ends.embedding_VH.dtype == ends.head.weight.dtype
        self._decoder, self._ends, self._tables, self._cache = decoder, ends, tables, cache
        self._num_steps, self._done, self._by_row = num_steps, 0, by_row

    def begin(self, tokens_BT: Tensor, hidden_BTH: Tensor, rows: Rows, counts: Sequence[int]) -> None:
        """Reads the first tokens, row b's from `rows.starts[b]` on."""
        self._prepare(tokens_BT, hidden_BTH, rows, counts)
        self._foretelling.peak = None
        self._run()
        self._call.tokens, self._foretelling.last = 1, self._foretelling.last + 8 * self._size

    def chain(
        self,
        tokens_BT: Tensor,
        hidden_BTH: Tensor,
        rows: Rows,
        counts: Sequence[int],
        growth: RuleOfRows | None,
    ) -> Chain:
        """As `begin`, then each row's likeliest token after the other, as long as `growth` says; None: to the end."""
        self._prepare(tokens_BT, hidden_BTH, rows, counts)
        length, size, told = self._num_steps + 1, self._size, array("q", (0, 0))
        numbers: list[int | None] = [None] * 5
        bins, width = 0, 0
        if growth is None:
            self._foretelling.peak = None
        else:
            rule = growth.rule
            bins, width, limits = len(rule.accepted[0]), len(rule.expected[0]), array("q", growth.limits)
            numbers = [one.buffer_info()[0] for one in (*rule.packed, limits)]
        steps, counted = self._numbers.data_ptr() + 8 * self._first, told.buffer_info()[0]
        call = Growth(*numbers, steps, steps + 8 * size * length, counted, counted + 8, bins, width, length)
        kernels().run("chain", self._scratch.dtype, self._decoder.struct, self._call, self._foretelling, call)
        forwards, kept = told
        peaks = [] if growth is None else self._peak_KB[:forwards].tolist()
        return Chain(self._best_KB[:kept].t(), peaks, forwards)

    def _prepare(self, tokens_BT: Tensor, hidden_BTH: Tensor, rows: Rows, counts: Sequence[int]) -> None:
        (b, t), k, hidden = tokens_BT.shape, self._num_steps, self._decoder.struct.hidden
        tokens_BT, hidden_BTH, cache = tokens_BT.contiguous(), hidden_BTH.contiguous(), self._cache
        end = max(start + max(t, count + k) for start, count in zip(rows.starts, counts, strict=True))
        assert end <= min(cache.capacity, len(self._tables[0]))
        assert rows.branches is None
        assert hidden_BTH.shape == (b, t, hidden)
        assert hidden_BTH.dtype == cache.buffer.dtype
        self._inputs = tokens_BT, hidden_BTH  # the call has their addresses
        read = [start + i for start in rows.starts for i in range(t)]
        steps = [
            start + count + i for i in range(k) for start, count in zip(rows.starts, counts, strict=True)
        ]
        self._numbers = torch.tensor([*read, *steps, *(count - 1 for count in counts), *[0] * b])
        self._first, self._size, self._columns = b * t, b, self._ends.head.num_outputs
        new = hidden_BTH.new_empty
        self._hidden_KBH, self._logits_KBC = new(k + 1, b, hidden), new(k + 1, b, self._columns)
        self._best_KB, self._peak_KB = tokens_BT.new_empty(k + 1, b), new((k + 1, b), dtype=torch.float32)
        # x of the tokens, then what lies between operators.
        self._scratch = new(b * t * (hidden + self._decoder.scratch(self._by_row)))
        layer, sequence, head = cache.buffer.stride()[:3]
        numbers, first_row = self._numbers.data_ptr(), rows.first * sequence * cache.buffer.itemsize
        self._call = Call(
            self._scratch.data_ptr(), self._ends.embedding_VH.data_ptr(), hidden_BTH.data_ptr(),
            *map(address, self._tables), None, numbers, numbers, cache.buffer.data_ptr() + first_row,
            self._scratch.data_ptr() + b * t * hidden * cache.buffer.itemsize, None, None, b, t, end,
            layer, sequence, head, 0, 0,
        )  # fmt: skip
        self._decoder.tables.attach(self._call, self._by_row, b, cache.buffer.dtype)
        self._foretelling = Foretelling(
            tokens_BT.data_ptr(), numbers + 8 * (b * t + k * b), address(self._ends.vocabulary_C),
            None, self._ends.head.weight.data_ptr(), self._hidden_KBH.data_ptr(), self._logits_KBC.data_ptr(),
            self._best_KB.data_ptr(), self._peak_KB.data_ptr(), self._columns,
        )  # fmt: skip

    def step(self, tokens_B: Tensor) -> None:
        """Reads one token more a row."""
        assert tokens_B.is_contiguous()
        assert tokens_B.shape == (self._size,)
        assert self._done <= self._num_steps
        call, told, done = self._call, self._foretelling, self._done
        call.positions = call.offsets = self._numbers.data_ptr() + 8 * (self._first + (done - 1) * self._size)
        call.hidden, told.tokens = told.hidden, tokens_B.data_ptr()
        told.hidden += self._hidden_KBH[0].nbytes
        told.logits += self._logits_KBC[0].nbytes
        told.best += 8 * self._size
        self._run()

    def _run(self) -> None:
        self._done += 1
        kernels().run("foretell", self._scratch.dtype, self._decoder.struct, self._call, self._foretelling)

    @property
    def logits_BC(self) -> Tensor:  # noqa: N802 - a tensor's name carries its shape
        """Behind the token that each row has read last."""
        return self._logits_KBC[self._done - 1]

    @property
    def best_B(self) -> Tensor:  # noqa: N802
        """Token id of the largest logit."""
        return self._best_KB[self._done - 1]
