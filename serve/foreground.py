"""`python -m serve.foreground store=STORE [num_slots=8 ...]`: the endpoint in the foreground, which ends politely.

Told to end (SIGTERM, or Ctrl-C), it takes no new requests, lets the open answers go on for `drain_s` seconds at most,
and shuts Serve down, or its own application where Serve has others; told twice, or while it starts, it stops at once.
`serve run` would cut the open streams.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from farm.errors import UserError
from serve.app import build
from serve.placement import GIB
from serve.plan import BuildArgs, groups, parse

APP = "farm"
POLL_S = 0.2
BROADCAST_S = 10.0
RAISED = re.compile(r"^(?:(?:\w+\.)+\w+|\w+Error): .+", re.MULTILINE)  # the last line of a traceback


class NotStarted(Exception):
    """The endpoint could not be started; the message says why, and the remedy."""


def drain(wait_s: float) -> int:
    """Let the endpoint take nothing new and finish what is open; how many answers were still open after `wait_s`."""
    gateways: DeploymentHandle = serve.get_deployment_handle("Gateway", APP)
    # There is no loop here, whatever Serve's own processes do.
    gateways._init(_run_router_in_separate_loop=True)
    end = time.monotonic() + wait_s
    while num_open := sum(gateways.broadcast("drain").results(timeout_s=BROADCAST_S)):
        if time.monotonic() >= end:
            break
        time.sleep(POLL_S)
    return num_open


def leave() -> None:
    """End the application, and Serve with it unless it has others, as in a cluster where it ran before."""
    try:
        others = serve.status().applications.keys() - {APP}
    except (RayError, RayServeException):  # a controller that died has none to go on with
        others = set()
    if others:
        with suppress(TimeoutError):  # answers that go on for longer are cut when this process ends
            serve.delete(APP)
    else:
        serve.shutdown()


def check_port(args: BuildArgs) -> None:
    """NotStarted where something listens already: Serve's proxy would be started again and again."""
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy does
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            raise NotStarted(
                f"serve.port: {args.host}:{args.port} cannot be had: {error.strerror}; end what listens there, "
                "or choose another with `--set serve.port=PORT`"
            ) from None


def check_room(args: BuildArgs, num_groups: int, has: Mapping[str, float]) -> None:
    """NotStarted where the replicas ask for more than there is: Serve would wait for it for ever.

    `has` are the resources of the machine, as Ray counts them.
    """
    num, on_cpu = num_groups * args.replicas, not args.num_gpus
    asked = [("num_cpus", args.num_cpus, has.get("CPU", 0), "CPUs")]
    asked.append(("num_gpus", args.num_gpus, has.get("GPU", 0), "GPUs"))
    if args.memory_gib is not None and on_cpu:
        asked.append(("memory_gib", args.memory_gib, has.get("memory", 0) / GIB, "GiB of memory"))
    for field, of_replica, there, unit in asked:
        if num * of_replica > there:
            raise NotStarted(
                f"resources.serve.{field}: {num} x {of_replica:g} {unit} do not fit into this machine's {there:.3g}; "
                "lower it or `replicas`, or name a larger cluster in RAY_ADDRESS"
            )


def start(application: Application) -> None:
    """Run it until it answers. NotStarted, with the replica's own words, if it never will."""
    try:
        serve.run(application, name=APP, route_prefix="/")
    except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
        raise NotStarted(
            f"the endpoint does not start: {why(error)}; mend that and start again; "
            "the lines above have the rest"
        ) from error


def why(error: Exception) -> str:
    """The last line of the tracebacks that Serve has of the deployments that failed, else of the error."""
    try:
        deployments = serve.status().applications[APP].deployments.values()
        told = "\n".join(one.message for one in deployments)
    except (RayError, RayServeException, KeyError):
        told = ""
    for text in (told, str(error)):
        if found := RAISED.findall(text):
            return str(found[-1])
    return str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    answers, ended = threading.Event(), threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if ended.is_set() or not answers.is_set():
            sys.exit(128 + number)
        ended.set()

    # As for an onboarding: a cluster that is named, else an own one. Left to itself Ray would look for one that an
    # address file names, and wait for it long after it died.
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        check_port(args)
    try:
        ray.init(address=address, namespace="serve")
    except ConnectionError as error:
        raise NotStarted(f"RAY_ADDRESS: no Ray answers at {address}: {error}") from error
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(number, end)
    if address == "local":
        check_room(args, len(groups(args)), ray.cluster_resources())
    application = build(args)
    try:
        start(application)
        answers.set()
    except BaseException:  # SystemExit too
        # An own Ray ends with this process; a cluster would go on starting what nobody waits for.
        if address != "local":
            leave()
        raise
    say(f"http://{args.host}:{args.port}/v1 answers")
    while not ended.wait(1.0):
        pass
    say("ending: open answers are finished, new requests get 503")
    told = finish(args.drain_s)
    leave()
    ray.shutdown()
    say(told)


def finish(wait_s: float) -> str:
    """Drain, and what is to be said of it."""
    try:
        left = drain(wait_s)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from waiting, it is not to go on
        return f"ended; the open answers were not waited for: {error!r}"
    return f"ended; {left} answers were cut off" if left else "ended"


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except NotStarted as error:
        ray.shutdown()  # its lines come before the one that counts
        say(f"error: {error}")
        sys.exit(1)
