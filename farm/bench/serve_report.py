"""What a load on an endpoint came to: a table, a plot, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

LATENCIES = (("ttft_ms", "first token, ms"), ("itl_ms", "between pieces, ms"))


def table(record: dict[str, Any]) -> Table:
    """A load a line."""
    ratio = f"; {record['over_engine']:.2f} of the engine alone" if record.get("over_engine") else ""
    out = Table(caption=f"{record['clients']} clients over {record['adapters']} adapters{ratio}")
    for heading in ("load", "requests", "completed", "429", "errors", "wrong", "tokens/s"):
        out.add_column(heading, justify="left" if heading == "load" else "right")
    for _, heading in LATENCIES:
        out.add_column(f"{heading}: p50 / p95 / p99", justify="right")
    loads = {"closed loop": record, "open loop": record["open_loop"]}
    if "chaos" in record:
        loads["chaos"] = record["chaos"]
    for name, load in loads.items():
        counts = (load[field] for field in ("requests", "completed", "rejected_429", "errors", "wrong_model"))
        shown = (" / ".join(_ms(load[field][p]) for p in ("p50", "p95", "p99")) for field, _ in LATENCIES)
        out.add_row(name, *(f"{count:,}" for count in counts), f"{load['tokens_per_s']:,.1f}", *shown)
    return out


def write(folder: Path, record: dict[str, Any], source: dict[str, Any]) -> list[Path]:
    """serve.json and serve.png; returns their paths. `source` is the `origin` taken when the run began."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve.json").write_text(json.dumps({**source, **record}, indent=1) + "\n")
    plot(folder / "serve.png", record)
    return [folder / "serve.json", folder / "serve.png"]


def plot(path: Path, record: dict[str, Any]) -> None:
    """Latencies of both loads, tokens a second beside the engine's, and whose processor time it was."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    latencies, speed, cores = figure.subplots(1, 3)
    groups = [(load, field) for load in ("closed", "open") for field, _ in LATENCIES]
    for index, percentile in enumerate(("p50", "p95", "p99")):
        values = [
            (record if load == "closed" else record["open_loop"])[field][percentile] or 0.0
            for load, field in groups
        ]
        places = [at + 0.27 * (index - 1) for at in range(len(groups))]
        latencies.bar(places, values, width=0.25, label=percentile)
    named = {"ttft_ms": "first\ntoken", "itl_ms": "between\npieces"}
    latencies.set_xticks(
        range(len(groups)), [f"{named[field]}\n{load}" for load, field in groups], fontsize=8
    )
    latencies.set(yscale="log", ylabel="ms", title="latency")
    latencies.legend(fontsize=8)
    bars = {"endpoint": record["tokens_per_s"], "engine alone": record.get("engine_tokens_per_s") or 0.0}
    speed.bar(list(bars), list(bars.values()), width=0.5, color=["C0", "C7"])
    speed.set(ylabel="tokens/s", title=f"{record['clients']} clients, {record['adapters']} adapters")
    shares = {role: share for role, share in record["cpu_share"].items() if share >= 0.01}
    cores.barh(list(shares), list(shares.values()), color="C2")
    cores.set(xlabel="cores in use", title="who works")
    for panel in (latencies, speed):
        panel.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
