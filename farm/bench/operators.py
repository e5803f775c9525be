# M rows, X inputs, Y outputs, H hidden, B batch, T tokens, S context, V vocabulary
"""`farm bench operators`: what the farm computes its own way beside the library's way, at the sizes of a model.

The two sides of a pair compute the same values and take turns within one run, so that a machine that slows down slows
both. Weights are used in the turn of the layers, as a step reads them, so that a small one may stay in a cache and a
large one may not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farm.bench.pairs import Pair
from farm.config import Manifest
from farm.data.chat import encode_chat
from farm.data.prompts import load_prompts
from farm.decode.sampling import SamplingBatch, SamplingParams, distribution
from farm.layers.attention import attend_cached
from farm.layers.cache import Rows
from farm.layers.dense import Dense, Gated, RmsNorm
from farm.sections import TargetSpec
from farm.target.forward import TargetForward
from farm.target.load import load_model, load_tokenizer, placement

Product = Callable[[Tensor], Tensor]
DTYPES = ("float32", "bfloat16")
ROWS = (1, 4, 8, 32)
ATTENDING_ROWS = (1, 8, 16)
FORWARDS = ((1, 1), (1, 4), (8, 1))  # sequences, new tokens of each
CONTEXT = 200
TEXT_TOKENS = CONTEXT + max(tokens for _, tokens in FORWARDS)
SAMPLED_ROWS = 64
FILTERS = (
    SamplingParams(temperature=0.7, top_p=0.95),
    SamplingParams(temperature=0.7, top_p=0.95, top_k=50),
)
# Weights of one shape beyond this much are more than a cache holds; no further copy is made.
COLD_BYTES = 2**28


def model_pairs(manifest: Manifest) -> Iterator[Pair]:
    """Every pair at the sizes of the manifest's base, in float32 and bfloat16, one model in memory at a time.

    Raises Refused when the base cannot be loaded, UserError when the first target's prompts cannot be read.
    """
    base, device = TargetSpec(name="base", model=manifest.base, prompts=""), placement("auto")[1]
    text = text_ids(manifest)
    for dtype in DTYPES:
        yield from pairs(load_model(base, dtype).to(device), text)


def text_ids(manifest: Manifest) -> list[int]:
    """TEXT_TOKENS token ids of the first target's prompts: on real text a distribution is as peaked as it is served."""
    tokenizer = load_tokenizer(manifest.base)
    prompts = load_prompts(manifest.targets[0].prompts).prompts
    ids = (token for prompt in itertools.cycle(prompts) for token in encode_chat(tokenizer, prompt.messages))
    return list(itertools.islice(ids, TEXT_TOKENS))


def pairs(model: Any, text: Sequence[int]) -> Iterator[Pair]:
    """The pairs of one `transformers` model in its dtype; `text` holds TEXT_TOKENS ids.

    Sampling comes in float32 alone: logits are turned to it before they are filtered.
    """
    forward = TargetForward.of(model)
    text_S = torch.tensor(text, device=forward.device)
    yield from _linears(model.config, forward)
    yield from _attentions(forward)
    yield from _norms(forward)
    if forward.dtype == torch.float32:
        yield from _samplings(forward, text_S)
    for batch, tokens in FORWARDS:
        yield _forward(model, forward, text_S[: CONTEXT + tokens].expand(batch, -1))


def _linears(config: Any, forward: TargetForward) -> Iterator[Pair]:
    hidden, width = forward.hidden_size, config.intermediate_size
    heads, groups, size = forward.num_heads, forward.num_kv_heads, forward.head_dim
    shapes = {
        "qkv": (hidden, (heads + 2 * groups) * size),
        "out": (heads * size, hidden),
        "gate and up": (hidden, 2 * width),
        "down": (width, hidden),
        "head": (hidden, forward.vocab_size),
    }
    for name, (x, y) in shapes.items():
        room = -(-COLD_BYTES // (x * y * forward.dtype.itemsize))
        count = 1 if name == "head" else min(len(forward.layers), room)
        weights = [_normal(forward, y, x) * x**-0.5 for _ in range(count)]
        library = [partial(functional.linear, weight=weight) for weight in weights]
        ours = [Dense.of(weight) for weight in weights]
        for rows in ROWS:
            yield _layerwise("linear", f"{name}, {x} to {y}", _normal(forward, rows, x), library, ours)
            if name == "gate and up":
                gated = [partial(_gated, one) for one in library], [Gated.of(*w.chunk(2)) for w in weights]
                yield _layerwise("gated", f"{name}, {x} to {y // 2}", _normal(forward, rows, x), *gated)


def _gated(product: Product, x_MX: Tensor) -> Tensor:
    gate_MF, up_MF = product(x_MX).chunk(2, dim=-1)
    return functional.silu(gate_MF) * up_MF


def _attentions(forward: TargetForward) -> Iterator[Pair]:
    """Of one new token a row over CONTEXT others, each layer's cache in turn."""
    heads, group = forward.num_heads, forward.num_heads // forward.num_kv_heads
    for rows in ATTENDING_ROWS:
        cache = forward.new_cache(rows, CONTEXT + 1)
        cache.buffer.normal_()
        window = cache.window(Rows([CONTEXT] * rows), 1)
        mask, visible = window.mask(group, forward.dtype), window.site(group).visible
        read = list(zip(*window.readable, strict=True))
        q_BTND = _normal(forward, rows, 1, heads, forward.head_dim)
        yield Pair(
            "attention", f"context {CONTEXT}", f"{rows} x {heads} x {forward.head_dim}", _name(forward.dtype),
            partial(_each, [partial(_grouped_attention, k=k, v=v, mask=mask) for k, v in read], q_BTND),
            partial(_each, [partial(attend_cached, k_BGSD=k, v_BGSD=v, visible=visible) for k, v in read], q_BTND),
            len(read),
        )  # fmt: skip


def _grouped_attention(q_BTND: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's own with as many key/value heads as there are."""
    mixed_BNTD = functional.scaled_dot_product_attention(
        q_BTND.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
    )
    return mixed_BNTD.transpose(1, 2).flatten(2)


def _norms(forward: TargetForward) -> Iterator[Pair]:
    hidden, eps, count = forward.hidden_size, forward.eps, len(forward.layers)
    weights = [1 + 0.1 * _normal(forward, hidden) for _ in range(count)]
    library = [partial(functional.rms_norm, normalized_shape=(hidden,), weight=w, eps=eps) for w in weights]
    ours = [RmsNorm.of(weight, eps) for weight in weights]
    for rows in ROWS:
        yield _layerwise("rms_norm", f"hidden {hidden}", _normal(forward, rows, hidden), library, ours)


def _layerwise(
    operator: str, case: str, x_MX: Tensor, library: Sequence[Product], ours: Sequence[Product]
) -> Pair:
    """Both sides over the same input, a call for each layer's weight."""
    rows, width = x_MX.shape
    return Pair(
        operator, case, f"{rows} x {width}", _name(x_MX.dtype),
        partial(_each, library, x_MX), partial(_each, ours, x_MX), len(ours),
    )  # fmt: skip


def _samplings(forward: TargetForward, text_S: Tensor) -> Iterator[Pair]:
    cache = forward.new_cache(1, CONTEXT)
    hidden_1SH = forward.forward(text_S[None, :CONTEXT], Rows([0]), cache)
    logits_BV = forward.logits(hidden_1SH[0, -SAMPLED_ROWS:])
    for params in FILTERS:
        batch = SamplingBatch.of([params] * SAMPLED_ROWS, [0] * SAMPLED_ROWS)
        kept = f"top-k {params.top_k}, top-p {params.top_p}" if params.top_k else f"top-p {params.top_p}"
        yield Pair(
            "distribution", kept, f"{SAMPLED_ROWS} x {forward.vocab_size}", _name(forward.dtype),
            partial(sorted_distribution, logits_BV, params), partial(distribution, logits_BV, batch),
        )  # fmt: skip


def sorted_distribution(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [B, V] of temperature, top-k and top-p by sorting the whole vocabulary of every row."""
    ranked_BV, order_BV = (logits_BV / params.temperature).sort(dim=-1, descending=True)
    if params.top_k:
        ranked_BV[:, params.top_k :] = -torch.inf
    p_BV = ranked_BV.softmax(dim=-1)
    ranked_BV = ranked_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= params.top_p, -torch.inf)
    return torch.empty_like(ranked_BV).scatter_(-1, order_BV, ranked_BV).softmax(dim=-1)


def _forward(model: Any, forward: TargetForward, tokens_BS: Tensor) -> Pair:
    """Logits of the tokens after CONTEXT, whose keys and values both sides hold already."""
    from transformers import DynamicCache

    (batch, length), context_BS, new_BT = tokens_BS.shape, tokens_BS[:, :CONTEXT], tokens_BS[:, CONTEXT:]
    past = DynamicCache(config=model.config)
    model(context_BS, past_key_values=past)
    cache = forward.new_cache(batch, length)
    forward.forward(context_BS, Rows([0] * batch), cache)
    rows = Rows([CONTEXT] * batch)
    return Pair(
        "forward", f"context {CONTEXT}", f"{batch} x {length - CONTEXT} tokens", _name(forward.dtype),
        lambda: model(new_BT, past_key_values=past).logits,
        lambda: forward.logits(forward.forward(new_BT, rows, cache)),
        rewind=lambda: past.crop(CONTEXT - past.get_seq_length()),
    )  # fmt: skip


def _each(calls: Sequence[Product], x: Tensor) -> Tensor:
    for call in calls:
        out = call(x)
    return out


def _normal(forward: TargetForward, *shape: int) -> Tensor:
    return torch.randn(shape, device=forward.device).to(forward.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
