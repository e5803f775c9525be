"""Counters of a process that really serves them, registered and counted as vLLM and SGLang do."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from farm.bench.vllm_engine import environment, find_python
from farm.cli.main import app
from farm.errors import UserError
from farm.evaluate.counters import (
    StepCosts,
    best_length,
    even_survival,
    parse_counters,
    read_counters,
    tau_of_alpha,
)
from farm.evaluate.records import TargetRow
from farm.store import FileStore
from tests.farm.evaluate.reports import put_report

Rounds = Sequence[tuple[int, int]]  # drafted, accepted

SERVE = """
server, _ = start_http_server(0, addr="127.0.0.1")
print(server.server_port, flush=True)
sys.stdin.read()
"""
# What vllm/v1/spec_decode/metrics.py and v1/metrics/loggers.py of vLLM 0.32 register and add.
VLLM = """
import sys
from prometheus_client import Counter, Histogram, start_http_server

K, engines = {k}, {engines}
names = ["model_name", "engine"]
drafts = Counter("vllm:spec_decode_num_drafts", "d", names)
tokens = Counter("vllm:spec_decode_num_draft_tokens", "d", names)
accepted = Counter("vllm:spec_decode_num_accepted_tokens", "d", names)
by_position = Counter("vllm:spec_decode_num_accepted_tokens_per_pos", "d", [*names, "position"])
seconds = Histogram("vllm:request_time_per_output_token_seconds", "d", names, buckets=[0.01, 0.1, 1])
Counter("vllm:generation_tokens", "d", names).labels("m", "0").inc(7)
for engine, rounds in engines.items():
    seconds.labels("m", engine).observe(0.02)
    for num_drafted, num_accepted in rounds:
        drafts.labels("m", engine).inc()
        tokens.labels("m", engine).inc(num_drafted)
        accepted.labels("m", engine).inc(num_accepted)
        for position in range(K):
            by_position.labels("m", engine, str(position)).inc(position < num_accepted)
"""
# What srt/observability/metrics_collector.py of SGLang 0.5.23 registers and adds.
SGLANG = """
import sys
from prometheus_client import Counter, Gauge, Histogram, start_http_server

names = ["model_name", "engine_type", "tp_rank"]
labels = {"model_name": "m", "engine_type": "unified", "tp_rank": "0"}
streamed = [*names, "is_streaming"]
generated = Counter("sglang:generation_tokens_total", "d", streamed)
requests = Counter("sglang:num_requests_total", "d", streamed)
verified = Counter("sglang:spec_verify_calls_total", "d", names)
Gauge("sglang:spec_accept_length", "d", names).labels(**labels).set(2.4)
Gauge("sglang:spec_num_steps", "d", names).labels(**labels).set(3)
Histogram("sglang:inter_token_latency_seconds", "d", names).labels(**labels).observe(0.03)
for finished in %s:
    generated.labels(**labels, is_streaming="true").inc(finished[0])
    requests.labels(**labels, is_streaming="true").inc(1)
    verified.labels(**labels).inc(finished[1])
"""


@contextmanager
def served(program: str, python: str = sys.executable, **options: object) -> Iterator[str]:
    """The URL of a process that runs `program` and then serves its metrics."""
    command = [python, "-c", program + SERVE]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(child.stdout.readline().split()[-1])}"
    finally:
        child.stdin.close()
        child.wait()


def vllm(k: int, **engines: Rounds) -> str:
    return VLLM.format(k=k, engines={name: list(rounds) for name, rounds in engines.items()})


def test_vllms_counters_give_tau_and_survival_over_all_its_engines() -> None:
    first, second = [(3, 3), (3, 0), (3, 1)], [(3, 2)]
    with served(vllm(3, e0=first, e1=second)) as url:
        (counters,) = read_counters(url)
    accepted = [number for _, number in [*first, *second]]
    assert (counters.model, counters.engine, counters.rounds, counters.k) == ("m", "vLLM", 4, 3)
    assert counters.tau == pytest.approx(1 + sum(accepted) / 4)  # the next token of every round included
    assert counters.survival == (3 / 4, 2 / 4, 1 / 4)
    assert counters.tau == pytest.approx(1 + sum(counters.survival))
    assert counters.alpha == pytest.approx(6 / (4 + 3 + 2))  # 4 + 3 + 2 positions were reached
    assert counters.survival != (3 / 4, 2 / 3, 1 / 2)  # each given the one before
    assert counters.by_position
    assert counters.steady
    assert counters.token_s == pytest.approx(0.02)


def test_rounds_that_drafted_less_make_survival_a_lower_bound() -> None:
    with served(vllm(3, e0=[(3, 3), (1, 1)])) as url:
        (counters,) = read_counters(f"{url}/metrics")
    assert not counters.steady
    assert counters.tau == 3


def test_what_was_counted_before_the_watch_is_left_out() -> None:
    growing = """
import threading, time
def decode():
    while time.sleep(0.002) is None:
        drafts.labels("m", "e0").inc()
        tokens.labels("m", "e0").inc(2)
        accepted.labels("m", "e0").inc()
        by_position.labels("m", "e0", "0").inc()
threading.Thread(target=decode, daemon=True).start()
"""
    with served(vllm(2, e0=[(2, 2)] * 5000) + growing) as url:
        (whole,) = read_counters(url)
        (late,) = read_counters(url, watch_s=0.5)
    assert whole.rounds > 5000 > late.rounds > 10
    assert whole.tau > 2.7
    assert late.tau == pytest.approx(2.0, abs=0.2)  # a scrape may fall between two counters of a round


def test_sglangs_tau_leaves_out_the_tokens_of_prefills() -> None:
    with served(SGLANG % [(21, 10), (31, 10)]) as url:
        (counters,) = read_counters(url)
    assert counters.tau == pytest.approx((52 - 2) / 20)
    assert counters.tau != pytest.approx(52 / 20)
    assert not counters.by_position
    assert counters.k == 3
    assert 1 + sum(counters.survival) == pytest.approx(counters.tau)
    assert counters.token_s == pytest.approx(0.03)


def test_before_sglang_finished_a_request_its_gauge_speaks() -> None:
    with served(SGLANG % []) as url:
        (counters,) = read_counters(url)
    assert counters.tau == pytest.approx(2.4)


def test_the_command_prints_tau_survival_best_length_and_the_break_even() -> None:
    rounds = [(4, 4)] * 10 + [(4, 1)] * 30 + [(4, 0)] * 60
    with served(vllm(4, e0=rounds)) as url:
        given_all = [
            "--tau-base",
            "3.5",
            "--adapt-seconds",
            "600",
            "--draft-cost",
            "0.1",
            "--verify-cost",
            "0",
        ]
        full = CliRunner().invoke(app, ["probe", "--metrics", url, *given_all, "--tokens", "1e9"])
        plain = CliRunner().invoke(app, ["probe", "--metrics", url])
    assert full.exit_code == plain.exit_code == 0, full.output
    assert "m: vLLM, 100 rounds of up to 4 drafted tokens" in full.output
    assert "tau 1.70, alpha 0.44, survival by position 0.40 / 0.10 / 0.10 / 0.10" in full.output
    assert "best k 1: 1.27 times plain decoding" in full.output  # 1.4 / 1.1 is above 1.7 / 1.4
    assert "assumed" not in full.output
    # 0.02 s a token at tau 1.7 are rounds of 0.034 s; full, never measured, wins back 0.9 of the lost 1.8
    saved_s = 0.02 - 0.034 / (1.7 + 0.9 * 1.8)
    tokens = 600 * 2.55 / saved_s
    assert f"adapting 1,530 s, paid after {float(f'{tokens:.2g}'):,.0f} served tokens" in full.output
    assert "assumed, not measured: --tau-base" in plain.output
    assert "--adapt-seconds (7,200" in plain.output
    assert "paid after" in plain.output


def test_past_runs_of_a_store_stand_in_for_what_was_not_given(tmp_path: Path) -> None:
    row = TargetRow(
        name="math", kind="full", decision="promoted", tau_base_draft=1.0, tau_adapted=2.5, rows=10,
        stage_seconds={"regenerate": 30.0, "adapt": 60.0}, adapter_version="v1",
    )  # fmt: skip
    put_report(FileStore(tmp_path / "store"), row, k=4)
    (tmp_path / "base").mkdir()
    (tmp_path / "p.jsonl").write_text("{}")
    manifest = tmp_path / "m.yaml"
    manifest.write_text("base: base\nstore: store\ntargets: [{name: a, model: base, prompts: p.jsonl}]\n")
    with served(vllm(2, e0=[(2, 1), (2, 0)])) as url:
        done = CliRunner().invoke(app, ["probe", str(manifest), "--metrics", url])
    assert "assumed" not in done.output
    # two guesses of 0.85 and half of it measured once, of the 2.5 that were lost
    recovered = (2 * 0.85 * (2 + 0.5 / 0.85) / 3 + 0.5) / 3
    assert f"m: expert: tau 1.50 -> {1.5 + 2.5 * recovered:.2f} expected" in done.output
    assert "adapting 90 s" in done.output


def test_reading_counters_needs_neither_torch_nor_a_model() -> None:
    with served(vllm(2, e0=[(2, 1)])) as url:
        program = (
            "import sys; from typer.testing import CliRunner; from farm.cli.main import app;"
            f"done = CliRunner().invoke(app, ['probe', '--metrics', '{url}']); assert not done.exit_code, done.output;"
            "assert not {'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/metrics", "file:///etc/hosts", "localhost:9"])
def test_a_server_that_is_not_there_is_the_users_to_start(url: str) -> None:
    with pytest.raises(UserError, match="--metrics"):
        read_counters(url)


@pytest.mark.parametrize("text", ["", 'vllm:spec_decode_num_drafts_total{model_name="m",engine="0"} 0\n'])
def test_a_server_that_has_not_speculated_says_so(text: str) -> None:
    with pytest.raises(UserError, match="--speculative-config"):
        parse_counters(text, "url")
    with pytest.raises(UserError, match="not Prometheus text"):
        parse_counters("<html>{", "url")


@given(st.floats(0, 1), st.integers(1, 8))
def test_an_even_survival_has_the_tau_it_was_made_from(alpha: float, length: int) -> None:
    tau = tau_of_alpha(alpha, length)
    assert 1 + sum(even_survival(tau, length)) == pytest.approx(tau, abs=1e-9)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0.01, 1), st.floats(0, 0.5),
)  # fmt: skip
def test_the_best_length_is_the_best_of_all(alphas: list[float], draft: float, verify: float) -> None:
    survival, product = [], 1.0
    for alpha in alphas:
        product *= alpha
        survival.append(product)
    length, speedup = best_length(survival, StepCosts(draft, verify))
    rates = [(1 + sum(survival[:n])) / (1 + n * (draft + verify)) for n in range(len(survival) + 1)]
    assert speedup == pytest.approx(max(rates), rel=1e-6)
    assert rates[length] == pytest.approx(max(rates), rel=1e-6)


@pytest.mark.vllm
def test_vllms_own_class_serves_what_is_read_here() -> None:
    program = """
import sys
from prometheus_client import start_http_server
from vllm.config import SpeculativeConfig
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

config = SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_max=2)
prom = SpecDecodingProm(config, ["model_name", "engine"], {0: ["m", "0"]})
stats = SpecDecodingStats.new(3)
for accepted in (3, 0, 1, 2):
    stats.observe_draft(3, accepted)
prom.observe(stats)
"""
    python = find_python()
    with served(program, str(python), env={**os.environ, **environment(python, 1)}) as url:
        (counters,) = read_counters(url)
    assert counters.survival == (3 / 4, 2 / 4, 1 / 4)
    assert counters.tau == 2.5
    assert counters.steady
