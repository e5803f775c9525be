"""cluster.yaml against Ray's own schema, its own defaults, and what the manifest asks for by default."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from farm.config import Manifest, check_placeable
from farm.resources import RegenerateResources, Resources
from farm.sections import TargetSpec

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def bundles(resources: Resources) -> list[tuple[str, Mapping[str, float]]]:
    """What each stage asks Ray to place on one node: an actor, a worker, a replica."""
    regenerate, adapt, serve = resources.regenerate, resources.adapt, resources.serve
    return [
        ("regenerate", {"CPU": regenerate.num_cpus, "GPU": regenerate.num_gpus}),
        ("adapt", {"CPU": 1, "GPU": adapt.gpus_per_worker}),
        ("serve", {"CPU": serve.num_cpus, "GPU": serve.num_gpus}),
    ]


def hosts(cluster: dict[str, Any], bundle: Mapping[str, float]) -> list[str]:
    types = cluster["available_node_types"].items()
    return [name for name, node in types if all(node["resources"].get(r, 0) >= n for r, n in bundle.items())]


def manifest(resources: Resources) -> Manifest:
    target = TargetSpec(name="legal", model="/m", prompts="/p.jsonl")
    shared = {"store": "file:///mnt/farm/store", "shared_filesystem": True}
    return Manifest(base="/b", targets=(target,), resources=resources, **shared)


def test_rays_own_schema_accepts_it(cluster):
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    misspelt = {**cluster, "idle_timeout_minuets": 5}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelt, schema)


def test_ray_fills_its_defaults_in_and_still_finds_every_node_type(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "gpu_adapt", "gpu_serve"}


def test_the_images_run_the_ray_and_python_that_the_constraints_pin(cluster):
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    docker = cluster["docker"]
    for image in (docker["head_image"], docker["worker_image"]):
        assert image.partition(":")[2].startswith(f"{pins['ray']}-py311")


def test_every_node_asks_for_the_token_and_has_it(cluster):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]


def test_the_autoscaler_may_start_every_node_its_types_allow(cluster):
    workers = {k: v for k, v in cluster["available_node_types"].items() if k != cluster["head_node_type"]}
    assert sum(node["max_workers"] for node in workers.values()) == cluster["max_workers"]
    assert all(node["min_workers"] == 0 for node in workers.values())


@pytest.mark.parametrize(
    "resources",
    [
        Resources(),
        Resources.model_validate(
            {
                "regenerate": {"num_gpus": 1, "max_actors": 4},
                "adapt": {"gpus_per_worker": 1, "workers": 4},
                "serve": {"num_gpus": 1, "replicas": 2},
            }
        ),
    ],
    ids=["default", "gpu"],
)
def test_what_a_manifest_asks_for_has_a_node_to_run_on(cluster, resources):
    for stage, bundle in bundles(resources):
        assert hosts(cluster, bundle), f"{stage} would wait for ever"
        assert cluster["head_node_type"] not in hosts(cluster, bundle)
    full = [
        (node["resources"], node.get("max_workers", 1)) for node in cluster["available_node_types"].values()
    ]
    totals = {r: float(sum(have.get(r, 0) * count for have, count in full)) for r in ("CPU", "GPU")}
    check_placeable(manifest(resources), totals, 1 + cluster["max_workers"])


def test_a_request_above_the_largest_node_is_seen_as_without_a_host(cluster):
    too_big = Resources(regenerate=RegenerateResources(num_gpus=5))
    assert not hosts(cluster, dict(bundles(too_big))["regenerate"])
