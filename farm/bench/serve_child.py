"""`farm serve` as a child of a benchmark: started, watched, ended; what its processes take of the machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from farm.errors import UserError

STOP_S = 60.0
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
COMMAND = [sys.executable, "-c", "from farm.cli.main import main; main()", "serve"]
SERVING = ("ray::ServeReplica", "ray::Proxy", "ray::ServeController")


@dataclass(frozen=True)
class Process:
    pid: int
    title: str
    cpu_s: float
    rss_mb: float


@dataclass(frozen=True)
class ServeChild:
    """A running `farm serve`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> list[Process]:
        """Its own and all that it started, by now; empty where there is no /proc."""
        parents = {process.pid: parent for process, parent in _all_processes()}
        return [
            process for process, _ in _all_processes() if _descends(process.pid, self.process.pid, parents)
        ]

    def rss_mb(self) -> float:
        """Resident memory of Serve's replicas, proxies and controller; pages that they share count for each."""
        return round(sum(one.rss_mb for one in self.processes() if one.title.startswith(SERVING)), 1)

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, by the process's role."""
        spent: Counter[str] = Counter()
        for one in self.processes():
            spent[_role(one.title)] += one.cpu_s
        return dict(spent)


@contextmanager
def serving(arguments: Sequence[str], log: Path) -> Iterator[ServeChild]:
    """`farm serve ARGUMENTS` from the checkout, in a Ray of its own; ended when the block is left."""
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ, "RAY_ADDRESS": "local"}
    # Or the child would outlive this process.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield ServeChild(process, log)
    finally:
        _end(process)
        signal.signal(signal.SIGTERM, before)


def check_port_is_free(port: int) -> None:
    """Raises UserError when somebody listens there: the load would go to both, or to the wrong one."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(
                f"serve.port {port}: somebody listens there already; end it, or --set serve.port=N"
            )


def last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def died(child: ServeChild) -> UserError:
    return UserError(f"`farm serve` ended by itself; the end of {child.log}:\n{last_lines(child.log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets it drain; what has not ended after a minute is killed with all of its group."""
    # Not SIGINT, which whoever runs in a shell's background inherits as ignored.
    for end in (process.terminate, lambda: os.killpg(process.pid, signal.SIGKILL)):
        if process.poll() is None:
            end()
        deadline = time.monotonic() + STOP_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)


def _all_processes() -> Iterator[tuple[Process, int]]:
    """Every process with its parent's id."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            resident = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
        cpu_s = (int(fields[11]) + int(fields[12])) / TICKS
        yield Process(int(folder.name), title, cpu_s, resident * PAGE / 2**20), int(fields[1])


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        if pid == ancestor:
            return True
        pid = parents[pid]
    return False


def _role(title: str) -> str:
    if title.startswith("ray::ServeReplica"):
        return title.split(":")[-1].split(".")[0].split()[0]
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split(".")[0].split()[0]
    return "ray"
