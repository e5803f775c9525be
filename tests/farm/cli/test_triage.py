"""`farm probe` on the command line: options that would not count are refused, JSON is all that it prints."""

import json

import pytest
from typer.testing import CliRunner

from farm.cli.main import app
from farm.config import UserError
from tests.farm.evaluate.test_counters import served, vllm

ROUNDS = [(2, 2)] * 3 + [(2, 0)] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m.yaml", "--seconds", "0"], "--seconds: counts only with --metrics"),
        (["m.yaml", "--tau-base", "3"], "--tau-base: counts only with --metrics"),
        (["m.yaml", "--adapt-seconds", "9"], "--adapt-seconds: counts only with --metrics"),
        (["m.yaml", "--token-seconds", "0.1"], "--token-seconds: counts only with --metrics"),
        (["m.yaml", "--draft-cost", "0.1"], "--draft-cost: counts only with --metrics"),
        (["m.yaml", "--verify-cost", "0.1"], "--verify-cost: counts only with --metrics"),
        (["m.yaml", "--batch", "2"], "--batch: counts only with --metrics"),
        (["--metrics", "localhost:9", "--prompts", "32"], "--prompts: is not used with --metrics"),
        (["--metrics", "localhost:9", "--set", "store=s"], "--set store=s: sets a field of a manifest"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused_by_name(arguments: list[str], said: str) -> None:
    """Also one that is given with the value that it has anyway."""
    done = CliRunner().invoke(app, ["probe", *arguments])
    assert isinstance(done.exception, UserError), done.output
    assert said in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1


def test_json_of_a_server_is_its_counters_and_the_verdict_and_assumptions_go_elsewhere() -> None:
    with served(vllm(2, e0=ROUNDS)) as url:
        done = CliRunner().invoke(app, ["probe", "--metrics", url, "--json"])
        slow = CliRunner().invoke(app, ["probe", "--metrics", url, "--json", "--tau-base", "3"])
    (model,) = json.loads(done.stdout)
    assert (model["counters"]["model"], model["counters"]["rounds"]) == ("m", 6)
    assert model["counters"]["survival"] == [0.5, 0.5]
    assert model["best_k"] == 2
    assert model["verdict"]["seen"]["tau"] == model["counters"]["tau"] == 2
    assert [offer["tier"] for offer in model["verdict"]["offers"]] == ["low-rank", "expert", "full"]
    assert done.stderr.startswith("assumed, not measured: --tau-base")
    assert json.loads(slow.stdout)[0]["verdict"]["tau_base"] == 3


def test_what_no_server_says_is_null_in_json() -> None:
    """nan is no JSON."""
    without_seconds = vllm(2, e0=ROUNDS).replace('seconds.labels("m", engine).observe(0.02)', "pass")
    with served(without_seconds) as url:
        done = CliRunner().invoke(app, ["probe", "--metrics", url, "--json"])
    assert "NaN" not in done.stdout
    (model,) = json.loads(done.stdout)
    assert model["counters"]["token_s"] is None
    assert model["verdict"]["decision"] == "skip"
    assert model["verdict"]["offers"][0]["saved_s"] is None


def test_an_adaptation_that_costs_nothing_is_taken_at_its_word() -> None:
    with served(vllm(2, e0=ROUNDS)) as url:
        done = CliRunner().invoke(app, ["probe", "--metrics", url, "--tau-base", "3", "--adapt-seconds", "0"])
    assert "assumed" not in done.output
    assert "adapting 0 s" in done.output
