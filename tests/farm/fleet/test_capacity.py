"""What a cluster may grow to, from the project's own cluster.yaml and from made-up ones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from farm.config import UserError
from farm.fleet.capacity import CONFIG_VARIABLE, Capacity, allowed_by, larger, largest_cluster
from farm.fleet.session import check_cluster, runs_at_once
from farm.resources import AdaptResources, Resources
from tests.test_cluster_yaml import ROOT, manifest

CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
GPUS = Resources.model_validate(
    {"regenerate": {"num_gpus": 1, "max_actors": 4}, "adapt": {"gpus_per_worker": 1, "parallel": 8}}
)


def test_a_cluster_of_a_head_alone_may_grow_by_all_its_workers() -> None:
    allowed = allowed_by(CLUSTER)
    assert allowed.num_nodes == 7
    assert allowed.resources == {"CPU": 4 * 32 + 2 * 14, "GPU": 4 * 4 + 2 * 1}


def test_the_bound_on_all_workers_takes_the_largest_first() -> None:
    bounded = copy.deepcopy(CLUSTER) | {"max_workers": 3}
    allowed = allowed_by(bounded)
    assert (allowed.num_nodes, allowed.resources) == (4, {"CPU": 96.0, "GPU": 12.0})


def test_a_kind_of_node_of_which_none_may_be_started_is_none() -> None:
    """One actor needs all that it asks for on one node, and no sum says whether there is such a node."""
    assert allowed_by(CLUSTER).kinds == ({"CPU": 0}, {"CPU": 32, "GPU": 4}, {"CPU": 14, "GPU": 1})
    without = copy.deepcopy(CLUSTER)
    without["available_node_types"]["gpu_adapt"]["max_workers"] = 0
    assert allowed_by(without).kinds == ({"CPU": 0}, {"CPU": 14, "GPU": 1})


def test_nodes_that_live_count_where_they_are_more_than_a_configuration_allows() -> None:
    now = Capacity(2, {"CPU": 8.0}, ({"CPU": 4.0}, {"CPU": 4.0}))
    grown = Capacity(5, {"CPU": 4.0, "GPU": 1.0}, ({"CPU": 1.0},))
    kinds = ({"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 1.0})
    assert larger(now, grown) == Capacity(5, {"CPU": 8.0, "GPU": 1.0}, kinds)


def test_no_request_at_all_fits_any_number_of_times() -> None:
    assert Capacity(1, {}).fit({"GPU": 0.0}) == float("inf")
    assert Capacity(1, {"CPU": 7.0}).fit({"CPU": 2.0, "GPU": 0.0}) == 3
    assert Capacity(1, {"CPU": 7.0}).fit({"CPU": 2.0, "GPU": 1.0}) == 0


def test_shares_of_a_gpu_fit_as_often_as_ray_places_them() -> None:
    for share, times in ((0.1, 10), (0.2, 5), (0.3, 3), (0.5, 2), (1.0, 1)):
        assert Capacity(1, {"GPU": 1.0}).fit({"GPU": share}) == times


@pytest.mark.ray
def test_a_manifest_for_gpus_is_taken_by_a_cluster_that_has_none_yet_and_may_start_some(
    ray_cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "GPU" not in ray_cluster
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="none.yaml is no file"):
        check_cluster(manifest(GPUS))
    monkeypatch.delenv(CONFIG_VARIABLE)
    with pytest.raises(UserError, match="needs 1 GPU, the cluster has 0"):
        check_cluster(manifest(GPUS))
    assert runs_at_once(GPUS.adapt) == 1
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(CLUSTER))
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    check_cluster(manifest(GPUS))
    assert runs_at_once(GPUS.adapt) == 8
    assert runs_at_once(AdaptResources(workers=8, gpus_per_worker=1, parallel=8)) == 2
    monkeypatch.delenv("RAY_ADDRESS")  # a cluster of this process alone grows by nothing
    assert largest_cluster().num_nodes == 1


@pytest.mark.ray
def test_a_folder_of_one_node_is_no_store_for_a_cluster_that_grows(
    ray_cluster: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(CLUSTER))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    alone = manifest(Resources()).model_copy(update={"shared_filesystem": False})
    with pytest.raises(UserError, match="the cluster has 7 nodes"):
        check_cluster(alone)
