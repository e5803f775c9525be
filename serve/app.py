"""The Serve application: `serve run serve.app:build store=STORE [num_slots=8 ...]`, from the checkout."""

from pathlib import Path

from pydantic import Field
from ray import serve
from ray.serve import Application

from farm.keys import read_keys
from farm.registry import Registry
from farm.sections import Dtype, ServeResources, ServeSettings
from farm.store import open_store
from serve.ingress import Gateway
from serve.replica import EngineHost


class BuildArgs(ServeSettings, ServeResources):
    """Arguments of `build`: the store, and the fields of a manifest's `serve` and `resources.serve`."""

    store: str
    num_cpus: float = Field(default=1, gt=0)  # of a replica; also its number of torch threads
    dtype: Dtype | None = None  # None: the dtype that the family was onboarded in


def build(args: BuildArgs) -> Application:
    """The gateway bound to the engine hosts of `args.store`. UserError when the store holds no family, or without keys.

    `host` or `port` start Serve there if it does not run yet; on a cluster they belong to `serve start`
    or to the config file's `http_options`.
    """
    store = open_store(args.store)
    Registry(store).family()
    if args.model_fields_set & {"host", "port"}:
        serve.start(http_options={"host": args.host, "port": args.port})
    settings = ServeSettings(**args.model_dump(include=set(ServeSettings.model_fields)))
    if settings.keys is not None:
        settings = settings.model_copy(update={"keys": str(Path(settings.keys).resolve())})
        read_keys(Path(settings.keys))
    engines = EngineHost.options(
        num_replicas=args.replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
    ).bind(store.uri, settings, args.dtype, "cuda" if args.num_gpus else "cpu")
    # The gateway mostly waits: it needs no core of its own, and it must never be what is full.
    in_flight = args.replicas * args.max_ongoing_requests + args.max_queued_requests
    gateway = Gateway.options(max_ongoing_requests=2 * in_flight + 100, ray_actor_options={"num_cpus": 0})
    return gateway.bind(engines, settings=settings)
