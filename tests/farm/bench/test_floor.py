"""The bytes of a step are those of the weights that it multiplies with, each once."""

import pytest
import torch

from farm.bench.floor import round_bytes, step_bytes
from farm.decode.engine import Route
from farm.target.forward import TargetForward
from tests.farm.models import tiny_model, tiny_pair


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


def test_drafts_of_a_pruned_vocabulary_read_its_rows_of_the_head_alone() -> None:
    forward, draft = TargetForward.of(tiny_model().double()), tiny_pair()[1].double()
    route, (vocab_size, hidden_size) = Route(forward, frozenset(), draft), forward.head_weight.shape
    whole = round_bytes([route], forwards=3)
    draft.trunk.vocabulary_C = torch.arange(5)
    assert whole - round_bytes([route], forwards=3) == 3 * (vocab_size - 5) * hidden_size * 8
    assert round_bytes([route], forwards=0) == step_bytes(forward)
