"""What a store's family becomes in a replica: a checkpoint that LoRA targets have in common is in memory once."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from farm.registry import Registry
from farm.store import open_store
from serve.family import Family
from tests.farm.decode.family import write_lora
from tests.serve.family import build_family


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Full targets `alpha` and `beta`, and on alpha's checkpoint the LoRAs `one` and `two`, and the DoRA `odd`."""
    store = build_family(tmp_path, ("alpha", "beta"))
    registry = Registry(open_store(store))
    record = registry.family()
    checkpoint = record["targets"]["alpha"]["model"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for seed, name in enumerate(("one", "two", "odd")):
        folder = write_lora(tmp_path / name, model, rank=2, seed=seed)
        record["targets"][name] = record["targets"]["alpha"] | {"lora": str(folder)}
    config = tmp_path / "odd" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    registry.put_family(record)
    return store


def test_lora_targets_of_a_checkpoint_share_its_forward(store: str) -> None:
    targets = {target.name: target for target in Family(store).targets()}
    assert targets["one"].forward is targets["two"].forward is targets["alpha"].forward
    assert targets["beta"].forward is not targets["alpha"].forward
    assert targets["alpha"].lora is None
    assert targets["one"].lora is not targets["two"].lora
    assert targets["one"].num_bytes < targets["alpha"].num_bytes / 4


def test_an_adapter_that_cannot_be_read_leaves_the_others_served(store: str, tmp_path: Path) -> None:
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    names = {target.name for target in Family(store).targets()}
    assert "one" not in names
    assert {"alpha", "beta", "two"} <= names
