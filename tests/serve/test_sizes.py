"""What a target is expected to take, against what it takes once it is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from farm.artifacts import TRUNK, Artifacts
from farm.config import Refused, UserError
from farm.decode import drafts
from farm.decode.drafting import longest_drafted
from farm.decode.engine import Route
from farm.decode.runner import Runner
from farm.decode.tree import TreeShape
from farm.draft.checkpoint import adapter_state
from farm.draft.expert import Expert
from farm.registry import Registry
from farm.sections import ServeSettings, TargetSpec, TreeSettings
from farm.store import open_store
from serve.family import Family
from serve.plan import BuildArgs, groups, plan
from serve.sizes import DraftSizes, Sizes, read_header
from tests.farm.decode.family import write_lora
from tests.farm.models import random_delta
from tests.serve.family import TRUNK_KEY, build_family, publish

SETTINGS = ServeSettings(num_slots=3, max_length=100, k=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Full targets `alpha` and `beta`, and the LoRAs `one` and `two` of alpha's checkpoint."""
    root = tmp_path_factory.mktemp("sizes")
    registry = Registry(open_store(build_family(root, ("alpha", "beta"))))
    record = registry.family()
    model = AutoModelForCausalLM.from_pretrained(root / "alpha")
    for seed, name in enumerate(("one", "two")):
        folder = write_lora(root / name, model, rank=2, seed=seed)
        record["targets"][name] = record["targets"]["alpha"] | {"lora": str(folder)}
    registry.put_family(record)
    return root


@pytest.fixture
def sizes(root: Path) -> Sizes:
    artifacts = Artifacts(open_store(str(root / "store")))
    artifact = artifacts.find(TRUNK, TRUNK_KEY)
    assert artifact is not None
    return Sizes(
        SETTINGS, "float32", "cpu", DraftSizes.of(artifacts.path(artifact, "trunk.safetensors").parent)
    )


def spec(root: Path, name: str, lora: str | None = None) -> TargetSpec:
    folder = None if lora is None else str(root / lora)
    return TargetSpec(name=name, model=str(root / name), lora=folder, prompts="")


def test_a_loaded_target_takes_what_was_measured(root, sizes):
    family = Family(str(root / "store"))
    loaded = {target.name: target for target in family.targets()}
    trunk = family.trunk
    assert trunk is not None
    assert sizes.draft is not None
    assert sizes.draft.trunk == sum(weight.numel() for weight in trunk.trunk.parameters())
    assert sizes.draft.expert == sum(weight.numel() for weight in trunk.base_expert.parameters())
    full = sizes.need(spec(root, "beta"), beside=False)
    assert full.checkpoint_bytes == pytest.approx(loaded["beta"].num_bytes, rel=0.01)
    beside = sizes.need(spec(root, "alpha", "one"), beside=True)
    lora = loaded["one"].lora
    assert lora is not None
    experts = full.own_bytes
    assert lora.num_bytes <= beside.own_bytes - experts <= 2 * lora.num_bytes
    merged = sizes.need(spec(root, "alpha", "one"), beside=False)
    assert merged.own_bytes == experts
    assert merged.checkpoint != beside.checkpoint == str(root / "alpha")


def test_shards_that_the_index_does_not_name_take_nothing(root, sizes, tmp_path):
    wanted = sizes.need(spec(root, "beta"), beside=False).checkpoint_bytes
    folder = tmp_path / "beta"
    shutil.copytree(root / "beta", folder)
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    shutil.copy(shard, folder / "model-00009-of-00009.safetensors")
    named = dict.fromkeys(read_header(shard), shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    assert sizes.need(spec(tmp_path, "beta"), beside=False).checkpoint_bytes == wanted


@pytest.mark.parametrize("tree", [None, TreeSettings(width=3, depth=4, nodes=9)])
def test_slots_take_what_the_engine_takes_for_them(root, sizes, tree):
    settings = SETTINGS.model_copy(update={"tree": tree, "control": "fixed"})
    sizes = replace(sizes, settings=settings)
    shape = None if tree is None else TreeShape.of(tree)
    family = Family(str(root / "store"))
    target = next(one for one in family.targets() if one.name == "beta")
    runner = Runner(target.forward, num_slots=3, max_length=100, max_drafted=4, tree=shape)
    runner.host(Route(target.forward, target.stop_ids, family.draft(target, None).draft, target="beta"))
    need = sizes.need(spec(root, "beta"), beside=False)
    assert need.cache_bytes == runner.num_bytes


def test_a_file_that_is_no_safetensors_is_a_refusal_of_its_target_alone(root, sizes, tmp_path):
    broken = tmp_path / "model.safetensors"
    for data in (b"", b"\xff" * 16, (2).to_bytes(8, "little") + b"[]"):
        broken.write_bytes(data)
        with pytest.raises(UserError, match=r"model\.safetensors: not readable"):
            read_header(broken)
    (tmp_path / "config.json").write_text((root / "alpha" / "config.json").read_text())
    with pytest.raises(Refused, match="alpha: cannot be measured"):
        sizes.need(TargetSpec(name="alpha", model=str(tmp_path), prompts=""), beside=False)


def test_a_lora_that_has_to_be_merged_is_a_checkpoint_of_its_own(root, sizes, tmp_path):
    config = json.loads((root / "one" / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (root / "one" / "adapter_model.safetensors").read_bytes()
    )
    odd = spec(root, "alpha").model_copy(update={"lora": str(tmp_path)})
    assert sizes.need(odd, beside=True).checkpoint != str(root / "alpha")


def test_a_budget_divides_a_family_and_keeps_loras_beside_their_checkpoint(root):
    args = BuildArgs(store=str(root / "store"), num_slots=3, max_length=100, k=4)
    assert groups(args) == (("alpha", "beta", "one", "two"),)
    (whole,) = plan(args).groups
    small = args.model_copy(update={"memory_gib": (whole.num_bytes - 1) / 2**30})
    assert sorted(map(sorted, groups(small))) == [["alpha", "one", "two"], ["beta"]]
    with pytest.raises(UserError, match=r"needs .* GiB in a replica, resources.serve.memory_gib is"):
        groups(args.model_copy(update={"memory_gib": 1e-6}))


def test_a_length_that_drafts_cannot_follow_is_said_where_it_is_planned(root, caplog):
    fields = {"store": str(root / "store"), "num_slots": 3, "k": 4}
    most = longest_drafted(4)
    plan(BuildArgs(max_length=most, **fields))
    assert caplog.messages == []
    plan(BuildArgs(max_length=40_000, **fields))
    assert caplog.messages == [
        f"max_length: 40000 is more than drafts can follow; sequences end at {most} tokens"
    ]


def test_what_a_live_adapter_changes_in_the_trunk_is_counted(root):
    args = BuildArgs(store=str(root / "store"), num_slots=3, max_length=100, k=4)
    (before,) = plan(args).groups
    trunk = Family(str(root / "store")).trunk
    assert trunk is not None
    delta = random_delta(trunk.trunk.config, {"fc": 3, "out": 2}, seed=0)
    publish(str(root / "store"), "beta", save(adapter_state(Expert(64, 128), delta)))
    (after,) = plan(args).groups
    num_bytes = 4 * sum(weight.numel() for weight in delta.parameters())
    assert after.weight_bytes - before.weight_bytes == 4 * num_bytes  # live and canary, in two forms each
    # of three slots; the largest target's mixtures count, and beta has no LoRA
    assert 0 <= after.mixture_bytes - before.mixture_bytes <= 3 * drafts.KEPT_STACKS * num_bytes
    folded = 4 * sum(weight.numel() for weight in trunk.trunk.parameters())
    assert after.shared_bytes - before.shared_bytes == drafts.KEPT_TRUNKS * 2 * folded
