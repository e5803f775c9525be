"""What a store's family becomes in a replica: a checkpoint that LoRA targets have in common is in memory once."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import farm.target.load
from farm.artifacts import Artifacts
from farm.card import tokenizer_digest
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.errors import Denied, StoreUnusable, UserError
from farm.registry import Registry, Version
from farm.store import FileStore, open_store
from serve.family import Family
from tests.farm.decode.family import write_lora
from tests.serve.family import TRUNK_KEY, build_family, tiny_expert, tiny_tokenizer


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


def test_a_store_that_fails_for_a_moment_leaves_no_replica_without_a_target_or_its_trunk(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised starts the replica anew, what is logged would be so for its whole life."""
    family = Family(store)

    def fails(*_: object) -> Path:
        raise StoreUnusable("the server answered 503")

    with monkeypatch.context() as away:
        away.setattr(farm.target.load, "local_copy", fails)
        with pytest.raises(UserError, match="answered 503"):
            list(family.targets())
    monkeypatch.setattr(FileStore, "local_path", fails)
    with pytest.raises(StoreUnusable):
        Family(store)


def test_a_checkpoint_that_may_not_be_read_costs_its_own_targets_alone(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Family(store)
    everything = {target.name for target in family.targets()}
    read = farm.target.load.local_copy

    def denies(uri: str) -> Path:
        if uri.endswith("beta"):
            raise Denied(f"{uri}: refuses these credentials (AccessDenied)")
        return read(uri)

    monkeypatch.setattr(farm.target.load, "local_copy", denies)
    assert {target.name for target in family.targets()} == everything - {"beta"}


def test_an_adapter_of_another_trunk_or_tokenizer_is_refused_with_both_digests(store: str) -> None:
    """The trunk's key may be the same while its bytes are not: it was trained again."""
    registry, artifacts = Registry(open_store(store)), Artifacts(open_store(store))
    trunk = artifacts.find("trunk", TRUNK_KEY)
    assert trunk is not None
    digests = {
        "trunk_digest": trunk.manifest["files"][TRUNK_FILE]["sha256"],
        "tokenizer_digest": tokenizer_digest(tiny_tokenizer().get_vocab()),
    }
    family = Family(store)
    alpha = next(target for target in family.targets() if target.name == "alpha")

    def publish(**changed: str) -> Version:
        card = {"trunk_key": TRUNK_KEY, "hidden_size": 64, "vocabulary_digest": "full", **digests, **changed}
        return registry.publish("alpha", {EXPERT_FILE: tiny_expert(1)}, card)

    assert family.draft(alpha, publish()).version == "v1"
    for field, here in digests.items():
        with pytest.raises(UserError) as caught:
            family.draft(alpha, publish(**{field: "e" * 64}))
        assert "e" * 64 in str(caught.value)
        assert here in str(caught.value)
    for field, other in (("hidden_size", "65"), ("vocabulary_digest", "f" * 64)):
        with pytest.raises(UserError, match=other):
            family.draft(alpha, publish(**{field: other}))
