"""The end of the endpoint in the foreground; that of one that answers is in test_secured.py."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve import foreground
from tests.serve.served import free_port


@pytest.fixture
def ended(monkeypatch) -> Iterator[list[str]]:
    """What of Serve and Ray was ended, neither of which runs; the process has its own signal handlers afterwards."""
    done: list[str] = []
    status = SimpleNamespace(applications={foreground.APP: SimpleNamespace(deployments={})})
    monkeypatch.setattr(foreground, "build", lambda args: args)
    monkeypatch.setattr(foreground.ray, "init", lambda **_: None)
    monkeypatch.setattr(
        foreground, "groups", lambda args: (("math",), ("code",))[: 1 + bool(args.memory_gib)]
    )
    monkeypatch.setattr(foreground.ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 8 * 2**30})
    monkeypatch.setattr(foreground.serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(foreground.serve, "status", lambda: status)
    monkeypatch.setattr(foreground.serve, "shutdown", lambda: done.append("serve"))
    monkeypatch.setattr(foreground.ray, "shutdown", lambda: done.append("ray"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield done
    for number, handler in before.items():
        signal.signal(number, handler)


def test_serve_is_shut_down_also_where_the_open_answers_cannot_be_waited_for(monkeypatch, ended):
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.endswith("answers"):
            signal.raise_signal(signal.SIGTERM)

    def drain(wait_s: float) -> int:
        raise TimeoutError(f"no gateway answers within {wait_s:g} s")

    monkeypatch.setattr(foreground, "say", say)
    monkeypatch.setattr(foreground, "drain", drain)
    foreground.main(["store=nowhere", f"port={free_port()}", "drain_s=7"])
    assert ended == ["serve", "ray"]
    assert "no gateway answers within 7 s" in said[-1]


@pytest.mark.parametrize(("address", "left"), [("auto", ["serve"]), (None, [])], ids=["cluster", "own"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_while_it_starts_it_waits_for_no_replica(monkeypatch, ended, number, address, left):
    """What cannot be placed never starts: a first signal that only took note of itself would do nothing for ever."""

    def never_ready(*_: object, **__: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("it goes on starting")

    in_ray(monkeypatch, address)
    monkeypatch.setattr(foreground.serve, "run", never_ready)
    with pytest.raises(SystemExit) as caught:
        foreground.main(["store=nowhere", f"port={free_port()}"])
    assert caught.value.code == 128 + number
    assert ended == left


def test_an_application_that_fails_to_start_is_not_left_in_the_cluster(monkeypatch, ended):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a replica cannot load its targets")

    in_ray(monkeypatch, "auto")
    monkeypatch.setattr(foreground.serve, "run", fails)
    with pytest.raises(foreground.NotStarted, match="cannot load"):
        foreground.main(["store=nowhere"])
    assert ended == ["serve"]


FAILED_REPLICA = """\
The deployment failed to start 3 times in a row. Error:
ray.exceptions.RayTaskError(RuntimeError): ray::ServeReplica:farm:EngineHost-0.initialize_and_get_metadata()
RuntimeError: Traceback (most recent call last):
  File "serve/replica.py", line 70, in __init__
    raise UserError(f"{store}: none of its targets can be loaded; the log has each one's reason")
farm.errors.UserError: file:///store: none of its targets can be loaded; the log has each one's reason
"""


@pytest.mark.usefixtures("ended")
def test_of_an_application_that_fails_to_start_the_replicas_own_words_are_told(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(
            "Deploying application farm failed: Failed to update the deployments ['EngineHost-0']."
        )

    told = {"EngineHost-0": SimpleNamespace(message=FAILED_REPLICA), "Gateway": SimpleNamespace(message="")}
    status = SimpleNamespace(applications={foreground.APP: SimpleNamespace(deployments=told)})
    monkeypatch.setattr(foreground.serve, "run", fails)
    monkeypatch.setattr(foreground.serve, "status", lambda: status)
    in_ray(monkeypatch, None)
    with pytest.raises(foreground.NotStarted) as caught:
        foreground.main(["store=nowhere", f"port={free_port()}"])
    said = str(caught.value)
    assert "start: farm.errors.UserError: file:///store: none of its targets can be loaded" in said
    assert "\n" not in said


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("field", ["num_cpus", "num_gpus"])
def test_replicas_that_this_machine_can_never_hold_are_not_waited_for(monkeypatch, field):
    in_ray(monkeypatch, None)
    with pytest.raises(foreground.NotStarted, match=f"resources.serve.{field}: 2 x 3 .PUs do not fit"):
        foreground.main(["store=nowhere", f"port={free_port()}", f"{field}=3", "replicas=2"])


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            ["memory_gib=1", "replicas=2"],
            "resources.serve.num_cpus: 4 x 1 CPUs do not fit into this machine's 2",
        ),
        (
            ["memory_gib=5"],
            "resources.serve.memory_gib: 2 x 5 GiB of memory do not fit into this machine's 8",
        ),
    ],
)
def test_every_group_of_targets_needs_its_own_room(monkeypatch, asked, told):
    """Two groups of one replica each, where one would fit: Serve would wait for the second for ever."""
    in_ray(monkeypatch, None)
    with pytest.raises(foreground.NotStarted, match=told):
        foreground.main(["store=nowhere", f"port={free_port()}", *asked])


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    in_ray(monkeypatch, f"127.0.0.1:{free_port()}")

    def refuses(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(foreground.ray, "init", refuses)
    with pytest.raises(foreground.NotStarted, match="RAY_ADDRESS: no Ray answers at 127"):
        foreground.main(["store=nowhere"])


def test_a_port_that_is_taken_is_one_line_and_exit_code_1():
    root = Path(foreground.__file__).parents[1]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "serve.foreground", "store=nowhere", f"port={port}"]
        own_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        ended = subprocess.run(
            command, cwd=root, env=own_ray, capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: serve.port: 127.0.0.1:{port} cannot be had: Address already in use")


def in_ray(monkeypatch, address: str | None) -> None:
    """That of a cluster, or an own one."""
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_other_applications_of_a_cluster_are_served_on():
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Here:
        def __call__(self) -> str:
            return "here"

    serve.shutdown()
    serve.start(http_options={"port": free_port()})
    try:
        for name in (foreground.APP, "another"):
            serve.run(Here.bind(), name=name, route_prefix=f"/{name}")
        foreground.leave()
        assert set(serve.status().applications) == {"another"}
        assert serve.get_app_handle("another").remote().result(timeout_s=10) == "here"
    finally:
        serve.shutdown()
