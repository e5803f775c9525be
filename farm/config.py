"""Every knob of the farm: a strict, frozen manifest read from YAML. Loads without torch and without Ray."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import Field, ValidationError, model_validator

from farm.errors import Refused as Refused
from farm.errors import UserError as UserError
from farm.manifest import PathResolver, fill_placeholders, read_tree, set_fields, split_overrides
from farm.resources import Resources
from farm.sections import (
    SERVED_TIERS,
    AdaptSettings,
    DraftSettings,
    Dtype,
    ElicitSettings,
    EvaluateSettings,
    ProbeSettings,
    RegenerateSettings,
    Rows,
    SelectSettings,
    ServeSettings,
    Strict,
    TargetSpec,
    Tier,
    TrainTrunkSettings,
)

# What to do for a draft that shares nothing: no onboarding publishes one beside the others.
OWN_DRAFT = (
    "for a draft of its own, onboard the target as base and only target of a manifest with its own store, "
    "then `farm export`"
)
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit` in its entrypoint


class Manifest(Strict):
    """One family: its base, its targets, where results go, and a section for each stage."""

    base: str
    trunk: str | None = None  # a trunk's folder; None: trained as the first stage
    store: str
    shared_filesystem: bool = False  # every node sees the same files under a file:// store
    dtype: Dtype = "auto"  # what targets decode in; auto: bfloat16 on a GPU, else float32
    targets: tuple[TargetSpec, ...] = Field(min_length=1)
    draft: DraftSettings = DraftSettings()
    train_trunk: TrainTrunkSettings = TrainTrunkSettings()
    probe: ProbeSettings = ProbeSettings()
    elicit: ElicitSettings = ElicitSettings()
    regenerate: RegenerateSettings = RegenerateSettings()
    select: SelectSettings = SelectSettings()
    adapt: AdaptSettings = AdaptSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    serve: ServeSettings = ServeSettings()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _keeps_the_trunk(cls, tree: Any) -> Any:
        """Before the sections are checked: what else such a tier would need is of no use to anyone."""
        adapt = tree.get("adapt") if isinstance(tree, Mapping) else None
        tier = adapt.get("tier") if isinstance(adapt, Mapping) else getattr(adapt, "tier", None)
        if tier in get_args(Tier) and tier not in SERVED_TIERS:
            raise ValueError(
                f"adapt.tier: {tier} trains the trunk, which the targets of a family share; "
                f"use {', '.join(SERVED_TIERS)}; {OWN_DRAFT}"
            )
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [target.name for target in self.targets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"targets: the name {twice[0]!r} is used twice; give each target its own name")
        nowhere = [target.name for target in self.targets if not (target.url or self.regenerate.url)]
        if self.regenerate.engine == "openai" and nowhere:
            raise ValueError(
                f"regenerate.url: engine openai needs one for {nowhere[0]}; set it, or the target's"
            )
        if (
            self.regenerate.rows
            and self.evaluate.rows
            and rows_overlap(self.regenerate.rows, self.evaluate.rows)
        ):
            raise ValueError(
                f"regenerate.rows {list(self.regenerate.rows)} and evaluate.rows {list(self.evaluate.rows)} "
                "overlap; choose disjoint ranges, held-out rows may not be trained on"
            )
        return self


def rows_overlap(left: Rows, right: Rows) -> bool:
    """Whether two row ranges share a row in every long enough file; bounds that count from the end say False.

    Ranges with negative bounds are compared once the number of rows is known (`data.prompts.split_rows`).
    """
    bounds = [left[0], right[0], *(end for end in (left[1], right[1]) if end is not None)]
    if any(bound < 0 for bound in bounds):
        return False
    ends = [end for end in (left[1], right[1]) if end is not None]
    return max(left[0], right[0]) < min(ends, default=max(left[0], right[0]) + 1)


def load_manifest(path: str | Path, overrides: Sequence[str] = (), *, in_job: bool | None = None) -> Manifest:
    """Read, fill, check and resolve a manifest.

    `overrides` are `name=value` (fills `${name}`; an existing path counts from the working directory),
    `field=value` or `a.b=value` (set a field, YAML-typed; a path counts from the manifest's folder).
    `in_job` says that the working directory is a job's temporary copy, where relative paths are refused;
    None asks the environment. Raises UserError for any mistake, with the file, the field and the remedy.
    """
    file = Path(path).expanduser().resolve()
    in_job = RAY_JOB_VARIABLE in os.environ if in_job is None else in_job
    try:
        settings, values = split_overrides(overrides, Manifest.model_fields)
        tree = read_tree(file)
        set_fields(tree, settings)
        manifest = Manifest.model_validate(fill_placeholders(tree, values))
        return Manifest.model_validate(PathResolver(file.parent, in_job).resolve(dump(manifest)))
    except ValidationError as error:
        raise UserError(f"{file}: {_first_mistake(error)}") from None
    except RecursionError:
        raise UserError(f"{file}: an alias refers to itself; remove it") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def dump(manifest: Strict) -> dict[str, Any]:
    """The JSON-able tree of a manifest or of one of its sections; loading it again gives an equal record."""
    return manifest.model_dump(mode="json")


def check_placeable(
    manifest: Manifest,
    cluster_resources: Mapping[str, float],
    num_nodes: int,
    nodes: Sequence[Mapping[str, float]] = (),
) -> None:
    """Raise UserError for a request that this cluster can never place: Ray would wait for it for ever.

    `nodes` are the resources of every kind of node that it has or may have; none: of which kinds is not known.
    """
    _check_sums(manifest.resources, cluster_resources)
    if nodes:
        _check_bundles(manifest.resources, nodes)
    if num_nodes > 1 and manifest.store.startswith("file:") and not manifest.shared_filesystem:
        raise UserError(
            f"manifest: store {manifest.store} is a folder, but the cluster has {num_nodes} nodes; "
            "put it on a file system that all nodes mount and set shared_filesystem: true"
        )


def _check_sums(asked: Resources, cluster_resources: Mapping[str, float]) -> None:
    regenerate, adapt, serve = asked.regenerate, asked.adapt, asked.serve
    requests = (
        ("regenerate", "GPU", regenerate.min_actors * regenerate.num_gpus, ("num_gpus", "min_actors")),
        ("regenerate", "CPU", regenerate.min_actors * regenerate.num_cpus, ("num_cpus", "min_actors")),
        ("adapt", "GPU", adapt.workers * adapt.gpus_per_worker, ("gpus_per_worker", "workers")),
        ("adapt", "CPU", float(adapt.workers), ("workers",)),
        ("serve", "GPU", serve.replicas * serve.num_gpus, ("num_gpus", "replicas")),
        ("serve", "CPU", serve.replicas * serve.num_cpus, ("num_cpus", "replicas")),
    )
    for section, resource, amount, fields in requests:
        have = cluster_resources.get(resource, 0.0)
        if amount > have:
            raise UserError(
                f"manifest: resources.{section} needs {amount:g} {resource}, the cluster has {have:g}: "
                f"it could never be placed; lower {_either(section, fields)}"
            )


def _check_bundles(asked: Resources, nodes: Sequence[Mapping[str, float]]) -> None:
    """An actor, a worker, a replica has all that it asks for on one node."""
    regenerate, adapt, serve = asked.regenerate, asked.adapt, asked.serve
    bundles = (
        ("regenerate", regenerate.num_cpus, regenerate.num_gpus, ("num_cpus", "num_gpus")),
        ("adapt", 1.0, adapt.gpus_per_worker, ("gpus_per_worker",)),
        ("serve", serve.num_cpus, serve.num_gpus, ("num_cpus", "num_gpus")),
    )
    for section, cpus, gpus, fields in bundles:
        if not any(node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus for node in nodes):
            raise UserError(
                f"manifest: resources.{section} needs {cpus:g} CPU and {gpus:g} GPU on one node, and no node has "
                f"both: it could never be placed; lower {_either(section, fields)}"
            )


def _either(section: str, fields: Sequence[str]) -> str:
    return " or ".join(f"resources.{section}.{field}" for field in fields)


def _first_mistake(error: ValidationError) -> str:
    """One sentence for the first mistake: field, what is wrong, remedy."""
    details = error.errors(include_url=False)
    first = details[0]
    field = ".".join(str(part) for part in first["loc"])
    more = f" ({len(details) - 1} more mistakes follow)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = ", ".join(_fields_beside(first["loc"]))
        return f"{field}: unknown field; remove it or use one of: {known}{more}"
    if first["type"] == "missing":
        return f"{field}: is missing; add it{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return message + more
    return f"{field}: {message}, not {first['input']!r}; correct it{more}"


def _fields_beside(loc: tuple[int | str, ...]) -> Iterator[str]:
    model: Any = Manifest
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = (get_args(annotation) or (annotation,))[0]  # of a list, or of a section that may be left out
    yield from sorted(model.model_fields)
