"""`python -m serve.foreground store=STORE [num_slots=8 ...]`: the endpoint in the foreground, which ends politely.

Told to end (SIGTERM, or Ctrl-C), it takes no new requests, lets the open answers go on for `drain_s` seconds at most,
and shuts Serve down, or its own application where Serve has others; told twice, or while it starts, it stops at once.
`serve run` would cut the open streams.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from farm.errors import UserError
from serve.app import build
from serve.plan import parse

APP = "farm"
POLL_S = 0.2
BROADCAST_S = 10.0


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
        serve.delete(APP)
    else:
        serve.shutdown()


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
    ray.init(address=address, namespace="serve")
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(number, end)
    application = build(args)
    try:
        serve.run(application, name=APP, route_prefix="/")
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
