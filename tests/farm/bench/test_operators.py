"""The benchmark of operators compares like with like: both sides of every pair compute the same values."""

from collections import Counter
from typing import Any

import pytest
import torch

from farm.bench.operators import (
    ATTENDING_ROWS,
    DTYPES,
    FILTERS,
    FORWARDS,
    ROWS,
    TEXT_TOKENS,
    pairs,
    sorted_distribution,
)
from farm.decode.sampling import FILTER_WIDTH
from farm.sections import TargetSpec
from farm.target.load import load_model
from tests.farm.models import tiny_model

VOCAB = 1024  # more than the sampler looks at before it sorts
TEXT = [(7 * i) % VOCAB for i in range(TEXT_TOKENS)]
# Relative to the largest output. Float32 sums differ in their order; bfloat16 keeps 8 bits, a forward rounds often.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Read from a checkpoint, which keeps RoPE's frequencies in float32 whatever the dtype."""
    folder = tmp_path_factory.mktemp("base")
    tiny = tiny_model(vocab=VOCAB)
    for parameter in tiny.parameters():
        if parameter.dim() > 1:
            parameter.div_(8.0)  # as peaked as a fresh model: rounding is not what is tested
    tiny.save_pretrained(folder)
    return load_model(TargetSpec(name="base", model=str(folder), prompts=""), request.param)


@pytest.mark.parametrize("packed_above", [0, 2**40], ids=["packed", "plain"])
@torch.inference_mode()
def test_both_sides_of_every_pair_compute_the_same_values_however_often(
    model: Any, packed_above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny weights are below the size that is packed, a real model's are above it."""
    monkeypatch.setattr("farm.layers.dense.PACKED_ABOVE_BYTES", packed_above)
    for pair in pairs(model, TEXT):
        for _ in range(2):
            pair.rewind()
            theirs, ours = pair.library().float(), pair.ours().float()
            assert theirs.shape == ours.shape
            scale = float(theirs.abs().max())
            assert float((theirs - ours).abs().max()) <= TOLERANCE[pair.dtype] * scale, pair


def test_every_operator_is_there_at_the_sizes_of_the_model(model: Any) -> None:
    """The tiny model: hidden 32, 4 heads and 2 groups of 16, width 64, 2 layers."""
    found = list(pairs(model, TEXT))
    sizes = {pair.case for pair in found if pair.operator == "linear"}
    assert sizes == {
        "qkv, 32 to 128", "out, 64 to 32", "gate and up, 32 to 128", "down, 64 to 32", "head, 32 to 1024"
    }  # fmt: skip
    num = Counter(pair.operator for pair in found)
    exact = model.dtype == torch.float32
    assert num["linear"] == len(ROWS) * len(sizes)
    assert num["rms_norm"] == len(ROWS)
    filters = [pair.case for pair in found if pair.operator == "distribution"]
    assert filters == (["top-p 0.95", "top-k 50, top-p 0.95"] if exact else [])
    assert num["forward"] == len(FORWARDS)
    assert num["gated"] == len(ROWS)
    assert num["attention"] == len(ATTENDING_ROWS)


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_the_whole_sort_keeps_the_fewest_tokens_that_hold_top_p_of_the_top_k(params: Any) -> None:
    """By plain Python over one peaked row; it is the reference that the filter is compared with."""
    torch.manual_seed(0)
    logits_V = 3 * torch.randn(4 * FILTER_WIDTH)
    weights = sorted(((float(v) / params.temperature, i) for i, v in enumerate(logits_V)), reverse=True)
    weights = weights[: params.top_k or None]
    total = sum(torch.tensor([v for v, _ in weights]).exp().tolist())
    kept, mass = set(), 0.0
    for value, index in weights:
        if mass >= params.top_p * total:
            break
        kept.add(index)
        mass += float(torch.tensor(value).exp())
    p_V = sorted_distribution(logits_V[None], params)[0]
    assert set(p_V.nonzero().flatten().tolist()) == kept
    assert float(p_V.sum()) == pytest.approx(1.0)
