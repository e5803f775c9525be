"""The Serve application: `serve run serve.app:build store=STORE [num_slots=8 ...]`, from the checkout."""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from farm.keys import read_keys
from farm.sections import ServeSettings
from farm.store import open_store
from serve.ingress import Gateway
from serve.plan import BuildArgs as BuildArgs
from serve.plan import deployment_name, groups
from serve.replica import EngineHost

SCALING = {"upscale_delay_s": 5, "downscale_delay_s": 60, "look_back_period_s": 15}


def build(args: BuildArgs) -> Application:
    """The gateway bound to the engine hosts of `args.store`: a deployment for each group of targets.

    UserError when the store holds no family. `host` or `port` start Serve there if it does not run yet; on a cluster
    they belong to `serve start` or to the config file's `http_options`.
    """
    placed = groups(args)
    if args.model_fields_set & {"host", "port"}:
        serve.start(http_options={"host": args.host, "port": args.port})
    hosts = {deployment_name(index): _host(args, index, targets) for index, targets in enumerate(placed)}
    group_of = {target: deployment_name(index) for index, targets in enumerate(placed) for target in targets}
    # The gateway mostly waits: it needs no core of its own, and it must never be what is full.
    most = args.max_replicas or args.replicas
    in_flight = len(placed) * (most * args.max_ongoing_requests + args.max_queued_requests)
    gateway = Gateway.options(
        max_ongoing_requests=2 * in_flight + 100,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(hosts, group_of, _with_keys(args.settings))


def _with_keys(settings: ServeSettings) -> ServeSettings:
    """The settings with the place of the keys for any process. UserError when there are no keys in it."""
    if settings.keys is None:
        return settings
    path = Path(settings.keys).resolve()
    read_keys(path)
    return settings.model_copy(update={"keys": str(path)})


def _host(args: BuildArgs, index: int, targets: tuple[str, ...]) -> Application:
    """The engine hosts of one group. Serve's own router shares requests out among them: it prefers those with fewer."""
    actor: dict[str, Any] = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    if args.memory_gib is not None and not args.num_gpus:
        actor["memory"] = int(args.memory_gib * 2**30)  # Ray places a replica where that much is left
    replicas: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        # Half of the slots busy on average: waiting for a slot costs more than an idle one.
        bounds = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        busy = {"target_ongoing_requests": max(1, args.num_slots // 2)}
        replicas = {"autoscaling_config": {**bounds, **busy, **SCALING}}
    host = EngineHost.options(
        name=deployment_name(index),
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options=actor,
        **replicas,
    )
    return host.bind(open_store(args.store).uri, args.settings, args.dtype, args.device, targets)
