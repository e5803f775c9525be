import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from farm.config import OWN_DRAFT, Manifest, UserError, check_placeable, dump, load_manifest, rows_overlap
from farm.sections import AdaptSettings, TreeSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A manifest's folder with a base and a prompts file."""
    (tmp_path / "base").mkdir()
    (tmp_path / "legal.jsonl").write_text('{"prompt": "hello"}\n')
    return tmp_path


def tree(**changes: Any) -> dict[str, Any]:
    target = {"name": "legal", "model": "legal", "prompts": "legal.jsonl"}
    return {"base": "base", "store": "store", "targets": [target], **changes}


def write(folder: Path, content: Any) -> Path:
    path = folder / "manifest.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def mistake(folder: Path, content: Any, *overrides: str, in_job: bool = False) -> str:
    """The one message of the refusal; it must name the manifest's file."""
    path = write(folder, content)
    with pytest.raises(UserError) as caught:
        load_manifest(path, overrides, in_job=in_job)
    assert str(path) in str(caught.value)
    return str(caught.value)


def with_target(**changes: Any) -> dict[str, Any]:
    return tree(targets=[{"name": "legal", "model": "legal", "prompts": "legal.jsonl", **changes}])


def test_relative_paths_resolve_against_the_manifest_not_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir("/")
    manifest = load_manifest(write(folder, tree()), in_job=False)
    assert manifest.base == str(folder / "base")
    assert manifest.store == (folder / "store").as_uri()
    assert manifest.targets[0].model == str(folder / "legal")
    assert manifest.targets[0].prompts == str(folder / "legal.jsonl")


def test_a_resolved_manifest_survives_dump_and_reload_from_another_folder(folder, tmp_path_factory):
    manifest = load_manifest(write(folder, tree(evaluate={"rows": [0, 8]}, regenerate={"rows": [8, None]})))
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), dump(manifest))
    assert load_manifest(elsewhere, in_job=True) == manifest


def test_a_file_uri_with_a_space_is_the_same_store_as_its_path(folder):
    path = write(folder, tree(store=(folder / "my store").as_uri()))
    assert load_manifest(path).store == load_manifest(write(folder, tree(store="my store"))).store


def test_a_model_on_the_hub_is_no_path(folder):
    content = tree(base="organisation/model-1.5B", store=str(folder))
    content["targets"][0]["model"] = "organisation/legal"
    manifest = load_manifest(write(folder, content), in_job=True)
    assert (manifest.base, manifest.targets[0].model) == ("organisation/model-1.5B", "organisation/legal")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".hidden", "a..b", "-flag", "a b", "x" * 64, "ä", "a\n", "/abs"]
)
def test_a_name_that_would_leave_its_folder_or_break_a_url_is_refused(folder, name):
    assert "targets.0.name" in mistake(folder, with_target(name=name))


def test_a_name_used_twice_is_refused(folder):
    content = tree()
    content["targets"] *= 2
    assert "'legal' is used twice" in mistake(folder, content)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stoer": "x"}, "stoer"),
        ({"regenerate": {"max_tokens": 3}}, "regenerate.max_tokens"),
        ({"resources": {"adapt": {"gpus": 1}}}, "resources.adapt.gpus"),
        ({"adapt": {"early_stop": {"patiense": 2}}}, "adapt.early_stop.patiense"),
        ({"adapt": {"adaspec": {"kept": 0.2}}}, "adapt.adaspec.kept"),
        ({"serve": {"tree": {"wide": 2}, "control": "off"}}, "serve.tree.wide"),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_ones(folder, changes, field):
    message = mistake(folder, tree(**changes))
    assert f"{field}: unknown field" in message
    assert "use one of:" in message


def test_an_unknown_key_of_a_target_lists_the_fields_of_a_target(folder):
    assert "chat_template, lora, model" in mistake(folder, with_target(modle="x"))


def test_every_mistake_is_counted_but_one_is_told(folder):
    message = mistake(folder, tree(stoer="x", trnk="y"))
    assert message.count("unknown field") == 1
    assert "1 more" in message


@pytest.mark.parametrize("temperatures", [[], [-0.5], [0.0, float("nan")]])
def test_temperatures_that_nothing_can_be_measured_at_are_refused_at_once(folder, temperatures):
    """The first one decides: without it the run would end at its gate, after everything was adapted."""
    assert "evaluate.temperatures" in mistake(folder, tree(evaluate={"temperatures": temperatures}))


@pytest.mark.parametrize("field", ["base", "store", "targets"])
def test_a_missing_field_is_named(folder, field):
    content = tree()
    del content[field]
    assert f"{field}: is missing" in mistake(folder, content)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (tree(base="nothing"), "base"),
        (tree(trunk="nothing"), "trunk"),
        (with_target(prompts="nothing.jsonl"), "targets.0 (legal).prompts"),
        (with_target(prompts="./nothing"), "targets.0 (legal).prompts"),
        (with_target(chat_template="nothing.jinja"), "targets.0 (legal).chat_template"),
        (tree(train_trunk={"prompts": "nothing.parquet"}), "train_trunk.prompts"),
    ],
)
def test_a_missing_file_is_named_with_its_field(folder, content, field):
    message = mistake(folder, content)
    assert f"{field}: " in message
    assert "does not exist" in message


def test_a_missing_model_of_one_target_leaves_the_manifest_usable(folder):
    assert load_manifest(write(folder, with_target(model="gone"))).targets[0].model == str(folder / "gone")


@pytest.mark.parametrize(
    "content",
    [
        tree(store="store"),
        tree(store="/tmp/s", base="base"),
        tree(store="/tmp/s", base="/tmp", trunk="trunk"),
    ],
)
def test_a_relative_path_inside_a_job_is_refused_with_the_remedy(folder, content):
    assert "give an absolute path or URI" in mistake(folder, content, in_job=True)


@pytest.mark.parametrize("field", ["model", "lora"])
def test_a_relative_model_inside_a_job_is_refused(folder, field):
    content = with_target(model=str(folder), **({"lora": "lora"} if field == "lora" else {}))
    if field == "model":
        content["targets"][0]["model"] = "legal"
    content |= {"store": str(folder / "store"), "base": str(folder / "base")}
    assert f"targets.0 (legal).{field}" in mistake(folder, content, in_job=True)


def test_prompts_carried_by_the_working_directory_may_be_relative_inside_a_job(folder, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    content = with_target(model="/m") | {"store": "/s", "base": str(folder / "base")}
    assert load_manifest(write(folder, content)).targets[0].prompts == str(folder / "legal.jsonl")
    with pytest.raises(UserError, match="absolute path"):
        load_manifest(write(folder, tree()))


def test_rows_that_are_adapted_on_and_evaluated_are_refused(folder):
    message = mistake(folder, tree(regenerate={"rows": [0, 101]}, evaluate={"rows": [100, None]}))
    assert "overlap" in message
    assert "regenerate.rows" in message
    assert load_manifest(write(folder, tree(regenerate={"rows": [0, 100]}, evaluate={"rows": [100, None]})))


@given(*[st.tuples(st.integers(0, 12), st.none() | st.integers(0, 12)) for _ in range(2)])
def test_overlap_agrees_with_python_slices_of_a_long_file(left, right):
    rows = range(20)
    assert rows_overlap(left, right) == bool(set(rows[slice(*left)]) & set(rows[slice(*right)]))


def test_overrides_set_nested_fields_with_their_types(folder):
    overrides = [
        "evaluate.k=3",
        "regenerate.rows=[0, 5]",
        "targets.0.name=law",
        "store=/tmp/other",
        "trunk=null",
    ]
    manifest = load_manifest(write(folder, tree(evaluate=None)), overrides)
    assert (manifest.evaluate.k, manifest.regenerate.rows) == (3, (0, 5))
    assert (manifest.targets[0].name, manifest.store) == ("law", "file:///tmp/other")


def test_placeholders_take_values_whole_and_inside_text(folder):
    (folder / "d").mkdir()
    (folder / "d" / "legal.jsonl").write_text('{"prompt": "x"}\n')
    content = with_target(prompts="${data}/legal.jsonl") | {"probe": {"prompts": "${count}"}}
    manifest = load_manifest(write(folder, content), [f"data={folder / 'd'}", "count=5"])
    assert manifest.targets[0].prompts == str(folder / "d" / "legal.jsonl")
    assert manifest.probe.prompts == 5


@pytest.fixture
def here(tmp_path_factory, monkeypatch):
    """The working directory, which has data/p.jsonl and is not the manifest's folder."""
    here = tmp_path_factory.mktemp("here")
    (here / "data").mkdir()
    (here / "data" / "p.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.chdir(here)
    return here


def test_a_path_typed_for_a_placeholder_counts_from_the_working_directory(folder, here):
    manifest = load_manifest(write(folder, with_target(prompts="${data}/p.jsonl")), ["data=./data"])
    assert manifest.targets[0].prompts == str(here / "data" / "p.jsonl")


def test_a_bare_name_typed_for_a_folder_of_the_working_directory_is_told_where_it_is(folder, here):
    """`--set data=data` counts from the manifest's folder: the message named a path that nobody had written."""
    told = mistake(folder, with_target(prompts="${data}/p.jsonl"), "data=data")
    assert f"if {here / 'data' / 'p.jsonl'} is meant, write that" in told


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "--set data=VALUE"),
        (("data=legal.jsonl", "dtaa=x"), "'dtaa' is neither"),
        (("data=legal.jsonl", "evaluate.kk=3"), "evaluate.kk: unknown field"),
        (
            ("data=legal.jsonl", "adapt.early_stop.patiense=2"),
            "use one of: every, held_out, min_gain, patience",
        ),
        (("data=legal.jsonl", "evaluate"), "is not name=value"),
        (("data=legal.jsonl", "base.x=3"), "is a value, not a section"),
        (("data=legal.jsonl", "targets.7.name=x"), "no position in a list of 1"),
        (("data=legal.jsonl", "evaluate.k=[1"), "is not a YAML value"),
        (("data=legal.jsonl", "evaluate.k=-1"), "evaluate.k"),
    ],
)
def test_a_wrong_override_is_one_clear_message(folder, overrides, told):
    assert told in mistake(folder, with_target(prompts="${data}"), *overrides)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "must be a mapping with base, store and targets"),
        ("- a\n", "must be a mapping with base, store and targets"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("targets: &x [*x]", "an alias refers to itself; remove it"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_what_is_wrong(folder, content, told):
    assert told in mistake(folder, content)


def test_a_manifest_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "gone.yaml"))):
        load_manifest(tmp_path / "gone.yaml")


def test_a_template_text_is_kept_and_a_template_file_is_resolved(folder):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat.jinja").write_text(text)
    assert load_manifest(write(folder, with_target(chat_template=text))).targets[0].chat_template == text
    spec = load_manifest(write(folder, with_target(chat_template="chat.jinja"))).targets[0]
    assert spec.chat_template == str(folder / "chat.jinja")


@pytest.mark.parametrize(
    ("section", "request_", "told"),
    [
        ("regenerate", {"num_gpus": 1}, "resources.regenerate needs 1 GPU"),
        ("regenerate", {"num_cpus": 5}, "resources.regenerate needs 5 CPU"),
        ("regenerate", {"min_actors": 5, "max_actors": 5}, "resources.regenerate needs 5 CPU"),
        ("adapt", {"workers": 2, "gpus_per_worker": 0.5}, "resources.adapt needs 1 GPU"),
        ("adapt", {"workers": 9}, "resources.adapt needs 9 CPU"),
        ("serve", {"replicas": 3, "num_gpus": 1}, "resources.serve needs 3 GPU"),
        ("serve", {"replicas": 3, "num_cpus": 2}, "resources.serve needs 6 CPU"),
    ],
)
def test_a_request_that_no_node_could_ever_hold_is_refused(folder, section, request_, told):
    manifest = load_manifest(write(folder, tree(resources={section: request_})))
    with pytest.raises(UserError, match=told):
        check_placeable(manifest, {"CPU": 4.0}, 1)
    check_placeable(manifest, {"CPU": 16.0, "GPU": 8.0}, 1)


@pytest.mark.parametrize(
    ("section", "request_", "told"),
    [
        ("regenerate", {"num_gpus": 1, "num_cpus": 8}, "8 CPU and 1 GPU on one node.*regenerate.num_cpus or"),
        ("regenerate", {"num_gpus": 3}, "3 GPU on one node"),
        (
            "adapt",
            {"gpus_per_worker": 3},
            "1 CPU and 3 GPU on one node.*lower resources.adapt.gpus_per_worker",
        ),
        ("serve", {"num_cpus": 65}, "65 CPU and 0 GPU on one node"),
    ],
)
def test_a_request_that_all_nodes_hold_together_and_none_alone_is_refused(folder, section, request_, told):
    """64 CPUs are on one node, and GPUs on others."""
    manifest = load_manifest(write(folder, tree(shared_filesystem=True, resources={section: request_})))
    kinds = ({"CPU": 64.0}, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0})
    with pytest.raises(UserError, match=told):
        check_placeable(manifest, {"CPU": 72.0, "GPU": 4.0}, 3, kinds)
    check_placeable(manifest, {"CPU": 72.0, "GPU": 4.0}, 3, (*kinds, {"CPU": 72.0, "GPU": 4.0}))


def test_a_folder_as_store_of_several_nodes_needs_a_shared_file_system(folder):
    with pytest.raises(UserError, match="shared_filesystem: true"):
        check_placeable(load_manifest(write(folder, tree())), {"CPU": 4.0}, 2)
    check_placeable(load_manifest(write(folder, tree(shared_filesystem=True))), {"CPU": 4.0}, 2)


def test_off_needs_no_quotes_though_yaml_reads_it_as_false(folder):
    text = yaml.safe_dump(tree()) + "serve: {control: off}\nregenerate: {draft: off}\n"
    (folder / "off.yaml").write_text(text)
    manifest = load_manifest(folder / "off.yaml", ["serve.control=off"])
    assert (manifest.serve.control, manifest.regenerate.draft) == ("off", "off")


def test_a_revision_that_would_not_be_read_is_refused(folder):
    assert "download that revision" in mistake(folder, with_target(revision="v2"))


def test_more_min_than_max_actors_is_refused(folder):
    assert "max_actors" in mistake(folder, tree(resources={"regenerate": {"min_actors": 2}}))


def test_a_manifest_cannot_be_changed_after_it_was_checked(folder):
    manifest = load_manifest(write(folder, tree()))
    with pytest.raises(ValueError, match="frozen"):
        manifest.evaluate.k = 9
    assert hash(manifest) == hash(Manifest.model_validate(dump(manifest)))


def test_config_and_store_load_without_torch_or_ray():
    code = (
        "import sys, farm.config, farm.store, farm.artifacts, farm.registry\n"
        "print(sorted({'torch', 'ray', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_a_fixed_length_beyond_k_is_refused(folder):
    assert "raise k" in mistake(folder, tree(serve={"control": "fixed-9"}))


def test_a_tree_goes_with_no_control_that_cuts_chains(folder):
    fixed = load_manifest(write(folder, tree()), ["serve.tree.width=2", "serve.control=fixed"])
    assert fixed.serve.tree == TreeSettings(kind="top-k", width=2, depth=5, nodes=12)
    assert Manifest.model_validate(dump(fixed)) == fixed
    for control in ("cost", "adaedl", "fixed-3"):
        named = mistake(folder, tree(serve={"tree": {"width": 2}, "control": control}))
        assert f"control {control}" in named
        assert "set control to fixed or off" in named
    assert "serve.tree.kind" in mistake(folder, tree(serve={"tree": {"kind": "beam"}, "control": "off"}))


def test_a_tier_that_changes_the_trunk_is_refused_where_targets_share_it(folder):
    for tier, overrides in (("full", []), ("eda", []), ("full", ["adapt.form=unrolled"])):
        told = mistake(folder, tree(adapt={"tier": tier}), *overrides)
        assert f": adapt.tier: {tier} trains the trunk" in told
        assert "use low-rank, expert, expert-fc, expert-lora; " in told
        assert told.endswith(OWN_DRAFT), "one mistake, with what to do about it"
    assert load_manifest(write(folder, tree()), ["adapt.tier=low-rank"]).adapt.tier == "low-rank"
    served = load_manifest(write(folder, tree()), ["adapt.tier=expert-lora", "adapt.form=unrolled"])
    assert served.adapt.tier == "expert-lora"


def test_a_cached_form_of_a_tier_that_trains_fc_is_refused():
    with pytest.raises(ValueError, match="form cached needs a trunk that stays the same"):
        AdaptSettings(tier="expert-fc", form="cached")


def test_an_endpoint_needs_a_url_for_every_target_and_it_holds_no_secret(folder):
    asked = {"engine": "openai"}
    assert "regenerate.url: engine openai needs one" in mistake(folder, tree(regenerate=asked))
    for url in ("gpu:8000/v1", "http://user:pass@gpu:8000/v1", "file:///etc"):
        assert "api_key_env" in mistake(folder, tree(regenerate={**asked, "url": url}))
    given = load_manifest(write(folder, tree(regenerate={**asked, "url": "http://gpu:8000/v1"})))
    assert given.regenerate.url == "http://gpu:8000/v1"


@pytest.mark.parametrize("strategy", ["failure", "flatness", "all"])
def test_prompts_cannot_be_chosen_by_what_their_answers_would_be(folder: Path, strategy: str) -> None:
    said = mistake(folder, tree(select={"strategy": strategy, "before": True}))
    assert f"select: strategy {strategy}" in said
    assert "set strategy to random, mahalanobis or shift, or leave before out" in said
    for possible in ("random", "mahalanobis", "shift"):
        load_manifest(write(folder, tree(select={"strategy": possible, "before": True})), in_job=False)


def test_an_endpoint_is_not_asked_to_draft_with_our_draft(folder: Path) -> None:
    there = {"engine": "openai", "url": "http://a:1/v1", "draft": "base"}
    said = mistake(folder, tree(regenerate=there))
    assert "regenerate: draft base is for engine farm" in said
    assert "set draft to off" in said
    load_manifest(write(folder, tree(regenerate={"draft": "base"})), in_job=False)


@pytest.mark.parametrize(
    ("fields", "tier"),
    [
        ({}, "expert-lora"),
        ({"form": "cached"}, "expert"),
        ({"form": "cached", "tier": "low-rank"}, "low-rank"),
    ],
)
def test_the_tier_that_nobody_named_goes_with_the_form(folder, fields, tier):
    """Manifests that ask for the cached form alone were written when an expert was the default."""
    assert load_manifest(write(folder, tree(adapt=fields))).adapt.tier == tier
