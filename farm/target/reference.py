# B rows, T tokens, S positions read, H hidden, V vocab, G key/value heads, P = 2 G, D head size
"""Any causal LM of `transformers` behind the interface of the lean forward, for architectures that it does not compute.

The model's own code runs: its decoder over a slot cache with an explicit mask and explicit positions, its own path
from hidden states to logits. What an architecture keeps is found out by running it, and a short ragged run is
compared with the model's plain forward when it is opened, so that nothing is served that is computed differently.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from farm.layers.cache import AnyRows, Rows, SlotCache, Window
from farm.layers.dense import Dense
from farm.layers.lora import LoraRows
from farm.target.model import Reading

# Of the trial, as shares of the logits' norm: two orders of summation differ by far less, a wrong mask by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
TRIAL_LENGTHS, TRIAL_KEPT, TRIAL_TOKENS = (5, 9), (3, 7), 4
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class ReferenceForward:
    """`forward(tokens, rows, cache)` gives hidden states, `logits` applies the model's head, as TargetForward does.

    Attributes: `embedding` [V, H], `head_weight` [V, H], `head` (its linear part, for drafts), sizes, `dtype`,
    `device`. `max_positions` ends where a sliding window or a RoPE that depends on the length would begin to matter.
    """

    capturable = False

    def __init__(self, model: Any) -> None:
        """`model` is a `transformers` causal LM in eval mode on its device.

        Raises ValueError, naming the architecture and the reason, for one that cannot be run exactly this way.
        """
        self._model, self._decoder = model, model.base_model
        self._name = f"model_type {model.config.model_type!r}"
        self._head_model = with_given_states(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if embedding is None or head is None or embedding.weight.shape != head.weight.shape:
            raise ValueError(f"{self._name}: its head and its embedding differ in shape")
        self.embedding: Tensor = embedding.weight.detach()
        tied = head.weight.data_ptr() == embedding.weight.data_ptr()
        self.head_weight: Tensor = self.embedding if tied else head.weight.detach()
        bias = getattr(head, "bias", None)
        self.head = Dense.of(self.head_weight, None if bias is None else bias.detach())
        self.vocab_size, self.hidden_size = self.embedding.shape
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        try:
            num_layers, (self.num_kv_heads, self.head_dim), window = self._probe()
            self.layers = range(num_layers)  # indices only: what a layer is, the model knows
            self.max_positions = self._positions(window)
            error = self._trial()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as problem:
            raise ValueError(f"{self._name} does not run over a slot cache: {problem}") from problem
        if not error <= TOLERANCE[self.dtype]:
            raise ValueError(f"{self._name} computes other logits over a slot cache (off by {error:.1%})")

    @property
    def num_bytes(self) -> int:
        """Of weights in memory."""
        unique = {parameter.data_ptr(): parameter.nbytes for parameter in self._model.parameters()}
        return sum(unique.values()) + (self.head.num_bytes if self.device.type == "cpu" else 0)

    def new_cache(self, num_slots: int, capacity: int) -> SlotCache:
        """A cache for `num_slots` sequences of at most `capacity` positions."""
        return SlotCache.of(self, num_slots, capacity)

    @torch.inference_mode()
    def forward(
        self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache, loras: LoraRows | None = None
    ) -> Tensor:
        """Post-norm hidden states [B, T, H] of the tokens, each at its row's start + index; the cache is extended.

        Raises ValueError for `loras`: a LoRA has to be merged into this model.
        """
        if loras is not None:
            raise ValueError(f"{self._name}: LoRAs beside the model are not supported")
        window = cache.window(rows, tokens_BT.shape[1])
        mask = window.mask(1, self.dtype)
        if mask is None:
            mask = torch.zeros(1, 1, 1, window.context, dtype=self.dtype, device=self.device)
        hidden_BTH: Tensor = self._decoder(
            input_ids=tokens_BT,
            attention_mask=mask,
            # A verification may run past the last position; nothing that is kept reads what comes of it.
            position_ids=window.positions_BT.clamp(max=self.max_positions - 1),
            past_key_values=WindowCache(window, len(self.layers)),
            use_cache=True,
        ).last_hidden_state
        return hidden_BTH

    def read(
        self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache, loras: LoraRows | None = None
    ) -> Reading:
        """As `forward`, with the logits after every token."""
        hidden_BTH = self.forward(tokens_BT, rows, cache, loras)
        return Reading(hidden_BTH, self.logits(hidden_BTH))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of post-norm hidden states [..., H], by all that the model does to them."""
        out: Tensor = self._head_model(inputs_embeds=hidden.reshape(1, -1, self.hidden_size)).logits
        return out.view(*hidden.shape[:-1], self.vocab_size)

    @torch.inference_mode()
    def _probe(self) -> tuple[int, tuple[int, int], int | None]:
        """Layers, (G, D) of keys and values, and the smallest sliding window, read off the cache of one token."""
        token_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        kept = getattr(self._decoder(input_ids=token_11, use_cache=True), "past_key_values", None)
        if not isinstance(kept, Cache) or not kept.layers:
            raise ValueError("it keeps no keys and values that can be rolled back")
        windows, shapes = [], set()
        for layer in kept.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
                raise ValueError(f"its {type(layer).__name__} cannot be rolled back")
            if isinstance(layer, DynamicSlidingWindowLayer):
                windows.append(layer.sliding_window)
            shapes |= {tuple(layer.keys.shape[1::2]), tuple(layer.values.shape[1::2])}
        if len(shapes) != 1:
            raise ValueError(f"its keys and values have several shapes, {sorted(shapes)}")
        return len(kept.layers), shapes.pop(), min(windows, default=None)

    def _positions(self, window: int | None) -> int:
        config = self._model.config.get_text_config()
        trained = getattr(config, "max_position_embeddings", None)
        if trained is None:
            raise ValueError("its config names no max_position_embeddings")
        # GPT-Neo's local layers keep every key and mask by themselves, counting from the end of the longest row.
        windows = (window, getattr(config, "window_size", None))
        limits = [trained, *(size for size in windows if size)]
        for rope in _ropes(getattr(config, "rope_parameters", None)):
            if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
                original = rope.get("original_max_position_embeddings")
                limits.append(original or getattr(config, "original_max_position_embeddings", trained))
        return int(min(limits))

    @torch.inference_mode()
    def _trial(self) -> float:
        """How far a ragged run with a roll-back is from the model's plain forward, as a share of the logits' norm."""
        generator = torch.Generator().manual_seed(0)
        width = max(TRIAL_LENGTHS)
        first_BT = torch.randint(self.vocab_size, (len(TRIAL_LENGTHS), width), generator=generator)
        then_BT = torch.randint(self.vocab_size, (len(TRIAL_LENGTHS), TRIAL_TOKENS), generator=generator)
        first_BT, then_BT = first_BT.to(self.device), then_BT.to(self.device)
        cache = self.new_cache(len(TRIAL_LENGTHS), width + TRIAL_TOKENS)
        self.forward(first_BT, Rows([0] * len(TRIAL_LENGTHS)), cache)
        got_BTV = self.logits(self.forward(then_BT, Rows(TRIAL_KEPT), cache)).float()
        errors = []
        for row, kept in enumerate(TRIAL_KEPT):
            tokens_1T = torch.cat((first_BT[row, :kept], then_BT[row]))[None]
            expected_TV = self._model(input_ids=tokens_1T, use_cache=False).logits[0, -TRIAL_TOKENS:].float()
            errors.append(float((got_BTV[row] - expected_TV).norm() / expected_TV.norm()))
        return max(errors)


class WindowCache(Cache):
    """One forward call's window of a slot cache, as `transformers` attention layers write and read it."""

    def __init__(self, window: Window, num_layers: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self._window = window

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Keeps keys and values [B, G, T, D]; returns all that may be read, [B, G, S, D] each."""
        kv_BTPD = torch.cat((key_states, value_states), dim=1).transpose(1, 2)
        return self._window.write(layer_idx, kv_BTPD)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the signature of the base
        """Positions before the call's tokens, of the longest row."""
        return self._window.context - self._window.positions_BT.shape[1]


class _Given(nn.Module):
    """Stands where a causal LM expects its decoder and hands over states that were computed before."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> _Output:
        return _Output(inputs_embeds)

    @property
    def decoder(self) -> _Given:
        """Where a causal LM calls the decoder inside its model."""
        return self


class _Output:
    """A decoder's output of which only the last hidden state is there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def with_given_states(model: Any) -> Any:
    """The causal LM without its decoder: what it does to hidden states on their way to logits, whatever that is.

    They are its `inputs_embeds`, [B, T, H]; its weights are the model's own.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    return head


def _ropes(rope: Any) -> Iterator[dict[str, Any]]:
    """A config's RoPE parameters, or those of each kind of layer."""
    if isinstance(rope, dict):
        yield rope
        for value in rope.values():
            yield from _ropes(value)
