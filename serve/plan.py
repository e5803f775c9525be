"""What will be started: the arguments of the application, its groups of targets, and the table of them."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from farm.artifacts import TRUNK, Artifacts
from farm.config import Refused, UserError
from farm.draft.checkpoint import CONFIG_FILE, EXPERT_FILE, TRUNK_FILE
from farm.errors import is_denied, is_unusable
from farm.registry import Registry
from farm.resources import ServeResources
from farm.sections import Dtype, ServeSettings, TargetSpec
from farm.store import NotFound, open_store
from farm.target.load import resolve_dtype
from serve.lengths import shortened
from serve.placement import GIB, Need, Packed, pack
from serve.sizes import DraftSizes, Sizes, delta_weights

MIB = 2**20
log = logging.getLogger("ray.serve")


class BuildArgs(ServeSettings, ServeResources):
    """Arguments of `serve.app.build`: the store, and the fields of a manifest's `serve` and `resources.serve`."""

    store: str
    dtype: Dtype | None = None  # None: the dtype that the family was onboarded in

    @property
    def settings(self) -> ServeSettings:
        return ServeSettings(**self.model_dump(include=set(ServeSettings.model_fields)))

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


def parse(arguments: Sequence[str]) -> BuildArgs:
    """`name=value` each, as `serve run` takes them. UserError names what is wrong."""
    fields = dict(argument.partition("=")[::2] for argument in arguments)
    try:
        return BuildArgs.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def groups(args: BuildArgs) -> tuple[tuple[str, ...], ...]:
    """The targets of each engine deployment. UserError when the store holds no family, or none of it fits.

    A target that fits nowhere is left out, with both numbers in the log. Without a budget nothing is measured.
    """
    if args.memory_gib is None:
        return (tuple(sorted(Registry(open_store(args.store)).family()["targets"])),)
    packed = plan(args)
    for reason in packed.refused.values():
        log.error("not served: %s", reason)
    if not packed.groups:
        raise UserError(next(iter(packed.refused.values()), f"{args.store}: the family has no targets"))
    return tuple(group.targets for group in packed.groups)


def plan(args: BuildArgs) -> Packed:
    """The placement with its bytes. Raises UserError when the store holds no family."""
    store = open_store(args.store)
    registry = Registry(store)
    record = registry.family()
    dtype = resolve_dtype(args.dtype or record.get("dtype", "auto"), args.device)
    deltas = {name: _delta_weights(registry, name) for name in record["targets"]}
    draft = _draft(Artifacts(store), str(record["trunk_key"]))
    if draft is not None and (said := shortened(args.settings)):
        log.warning("%s", said)
    sizes = Sizes(args.settings, dtype, args.device, draft, deltas)
    specs = [
        TargetSpec.model_validate({**fields, "name": name, "prompts": ""})
        for name, fields in sorted(record["targets"].items())
    ]
    needs, refused = _needs(sizes, specs)
    packed = pack(needs, sizes.shared_bytes, None if args.memory_gib is None else int(args.memory_gib * GIB))
    return Packed(packed.groups, refused | packed.refused)


def _needs(sizes: Sizes, specs: Iterable[TargetSpec]) -> tuple[list[Need], dict[str, str]]:
    specs = list(specs)
    sharers = Counter(spec.model for spec in specs)
    needs: list[Need] = []
    refused: dict[str, str] = {}
    for spec in specs:
        try:
            needs.append(sizes.need(spec, beside=sharers[spec.model] > 1))
        except Refused as error:
            if is_unusable(error) and not is_denied(error):
                raise  # for as long as the application runs the target would be left out
            refused[spec.name] = str(error)
    return needs, refused


def _draft(artifacts: Artifacts, key: str) -> DraftSizes | None:
    """None for a trunk that is not there: its replicas decode plainly."""
    artifact = artifacts.find(TRUNK, key)
    if artifact is None:
        return None
    for name in (CONFIG_FILE, TRUNK_FILE):  # beside the last one, wherever the store keeps local copies
        artifacts.path(artifact, name)
    return DraftSizes.of(artifacts.path(artifact, EXPERT_FILE).parent)


def _delta_weights(registry: Registry, target: str) -> int:
    """Of the live adapter; 0 for one that cannot be read: it is not served either."""
    live = registry.live(target)
    try:
        return 0 if live is None else delta_weights(registry.path(live, EXPERT_FILE))
    except (UserError, OSError, NotFound) as error:
        log.warning("%s: its live adapter is not counted: %s", target, error)
        return 0


def table(args: BuildArgs, packed: Packed) -> Table:
    """A row a deployment; bytes are those of one replica, `shared` of its process and its trunk."""
    shown = Table(title=f"placement of {args.store}", title_justify="left")
    shown.add_column("deployment", no_wrap=True)
    shown.add_column("targets")
    for column in ("shared MiB", "weights MiB", "caches MiB", "mixtures MiB", "replica MiB", "replicas"):
        shown.add_column(column, justify="right")
    most = args.max_replicas or args.replicas
    replicas = f"{args.replicas}" if most == args.replicas else f"{args.replicas} to {most}"
    for index, group in enumerate(packed.groups):
        parts = (group.shared_bytes, group.weight_bytes, group.cache_bytes, group.mixture_bytes)
        mib = (f"{size / MIB:.1f}" for size in (*parts, group.num_bytes))
        shown.add_row(deployment_name(index), ", ".join(group.targets), *mib, replicas)
    return shown


def deployment_name(index: int) -> str:
    return f"EngineHost-{index}"


def main() -> int:
    """`python -m serve.plan store=STORE [name=value ...]`: the table; 1 when a target is left out, 2 for a mistake."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        args = parse(sys.argv[1:])
        packed = plan(args)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    console.print(table(args, packed))
    for reason in packed.refused.values():
        console.print(f"not served: {reason}", style="red", markup=False, soft_wrap=True)
    return 1 if packed.refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
