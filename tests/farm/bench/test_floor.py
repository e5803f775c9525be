"""The bytes of a step are those of the weights that it multiplies with, each once."""

import pytest
import torch

from farm.bench.floor import step_bytes
from farm.target.forward import TargetForward
from tests.farm.models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_head_and_every_layer_once(tied: bool, dtype: torch.dtype) -> None:
    """A CPU holds the head plain and packed; of SmolLM2 that made 326 MB out of 269."""
    model = tiny_model(vocab=64, tie_word_embeddings=tied).to(dtype)
    products = {
        name: weight
        for name, weight in model.state_dict().items()
        if name.endswith("_proj.weight") or name == "lm_head.weight"
    }
    assert len(products) == 2 * 7 + 1
    assert step_bytes(TargetForward.of(model)) == sum(weight.nbytes for weight in products.values())
