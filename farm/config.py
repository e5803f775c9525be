"""Every knob of the farm: a strict, frozen manifest read from YAML. Loads without torch and without Ray."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from farm.errors import Refused as Refused
from farm.errors import UserError as UserError
from farm.manifest import PathResolver, fill_placeholders, read_tree, set_fields, split_overrides

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit` in its entrypoint
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
CONTROL_PATTERN = r"^(off|fixed(-[1-9]\d?)?|adaedl(-published)?|cost)$"  # of the draft length

Rows = tuple[int, int | None]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
Strategy = Literal["all", "shift", "mahalanobis", "failure", "flatness", "random"]
Loss = Literal["eda", "kl", "tv", "lk", "lk-log"]
Tier = Literal["low-rank", "expert", "expert-fc", "eda", "full"]
Init = Literal["base", "zero", "random"]
Form = Literal["unrolled", "cached", "cached-unrolled"]
SERVED_TIERS = ("low-rank", "expert")  # they leave the trunk as it is, so that targets can share it
CACHED_TIERS = SERVED_TIERS  # what the trunk puts out stays the same while they are trained


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetSpec(Strict):
    name: str = Field(pattern=NAME_PATTERN)
    model: str
    lora: str | None = None
    revision: str | None = None
    prompts: str
    chat_template: str | None = None  # path of a jinja file, or the template's text

    @field_validator("name")
    @classmethod
    def _stays_in_its_folder(cls, name: str) -> str:
        if ".." in name:
            raise ValueError("a name may not contain '..'; use letters, digits, '.', '_' and '-'")
        return name


class DraftSettings(Strict):
    shared_width: Positive | None = None  # None: the base's intermediate_size
    private_width: Positive | None = None  # None: the same as the shared expert
    vocabulary: Positive | None = None  # number of most frequent tokens kept; None: all


class AdaSpec(Strict):
    """Train on the positions where the draft is furthest behind a reference of its own size (AdaSPEC)."""

    keep: float = Field(default=0.4, gt=0, le=1)  # share of the positions
    reference_epochs: Positive = 1
    warm: Share = 0.1  # share of all steps that keeps everything; after as many again, `keep` is reached


class EarlyStop(Strict):
    """Stop when held-out rows are no longer predicted better."""

    held_out: float = Field(default=0.05, gt=0, lt=1)  # share of the rows
    every: Positive = 50  # steps
    patience: Positive = 3  # measurements without a gain
    min_gain: float = Field(default=0.002, ge=0)  # of the expected tau, relative


class TrainSettings(Strict):
    epochs: Positive
    lr: float = Field(gt=0)
    batch_rows: Positive = 16
    micro_rows: Positive | None = None  # rows at once on a worker; gradients of a batch add up. None: all
    loss: Loss = "kl"
    hidden_weight: float = Field(default=0.5, ge=0)  # of the smooth L1 of hidden states; EDA's is 1
    adaspec: AdaSpec | None = None
    early_stop: EarlyStop | None = None
    warmup: Share = 0.05  # share of all steps
    clip: float = Field(default=1.0, gt=0)
    unroll: Positive = 2
    zero_stage: int = Field(default=0, ge=0, le=2)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products; weights and optimizer are float32
    save_every: Positive = 200  # steps
    prompt_tokens: bool = False  # learn from the tokens of the prompts too, not from the answers alone
    seed: int = 0


class TrainTrunkSettings(TrainSettings):
    epochs: Positive = 8
    lr: float = Field(default=2e-3, gt=0)
    prompts: str | None = None  # None: the targets' prompts together
    rows: Rows | None = None
    max_new_tokens: Positive = 96
    answers: Literal["regenerate", "dataset"] = "regenerate"  # "dataset": prefill the rows' own answers
    temperature: float = Field(default=0.7, ge=0)
    greedy_share: Share = 0.5


class ProbeSettings(Strict):
    prompts: Positive = 16
    max_new_tokens: Positive = 48
    skip_above: float | None = None  # retention above which a target is skipped; None: never


class RegenerateSettings(Strict):
    rows: Rows | None = None  # None: all but the held-out rows
    max_new_tokens: Positive = 96
    batch_rows: Positive = 16
    shard_rows: Positive = 64
    greedy_share: Share = 0.5
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    seed: int = 0
    memory_bytes: Positive = 8 * 2**30  # of live targets in one actor


class SelectSettings(Strict):
    """Which of its answers a target is adapted on; see farm.data.select for the scores."""

    strategy: Strategy = "all"
    fraction: float = Field(default=0.5, gt=0, le=1)
    pilot_rows: int = Field(default=256, ge=256)  # that set the threshold
    exact: bool = False  # the threshold is set by every row instead: the fraction is met to the row
    seed: int = 0  # of strategy random


class AdaptSettings(TrainSettings):
    epochs: Positive = 10
    lr: float = Field(default=2e-3, gt=0)
    loss: Loss = "lk"
    hidden_weight: float = Field(default=5.0, ge=0)  # later drafted tokens read what is predicted
    tier: Tier = "expert"
    rank: Positive = 16  # of low-rank maps
    width: Positive | None = None  # of the private expert; None: the base's
    init: Init = "base"
    form: Form = "cached"
    cached_epochs: Positive = 4  # of form cached-unrolled, before `epochs` unrolled ones
    cached_tokens: Positive = 512  # positions of a batch in the cached form
    cached_bytes: Positive = 8 * 2**30  # that the cached form may take

    @model_validator(mode="after")
    def _cacheable(self) -> Self:
        if self.form != "unrolled" and self.tier not in CACHED_TIERS:
            raise ValueError(
                f"form {self.form} needs a trunk that stays the same, tier {self.tier} trains a part of it; "
                f"use tier {' or '.join(CACHED_TIERS)}, or form unrolled"
            )
        return self


class EvaluateSettings(Strict):
    rows: Rows | None = None  # None: the last `prompts` rows
    prompts: Positive = 64
    k: Positive = 4
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: Positive = 64
    speed_prompts: Positive = 4
    speed_rounds: int = Field(default=5, ge=5)
    threads: Positive | None = None  # None: one for each core
    seed: int = 0
    min_gain: float = 0.0  # lower bound of tau_adapted - tau_live that promotes


class ServeSettings(Strict):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    num_slots: Positive = 8
    max_length: Positive = 1024
    k: Positive = 8  # most tokens that a round drafts
    control: str = Field(default="cost", pattern=CONTROL_PATTERN)
    max_ongoing_requests: Positive = 32
    max_queued_requests: Positive = 64

    @model_validator(mode="after")
    def _length_within_k(self) -> Self:
        _, _, length = self.control.partition("-")
        if length.isdigit() and int(length) > self.k:
            raise ValueError(f"control {self.control} drafts more than k = {self.k} tokens; raise k")
        return self


class RegenerateResources(Strict):
    num_gpus: float = Field(default=0, ge=0)
    num_cpus: float = Field(default=1, ge=0)
    min_actors: Positive = 1
    max_actors: Positive = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError("min_actors is above max_actors; raise max_actors")
        return self


class AdaptResources(Strict):
    workers: Positive = 1
    gpus_per_worker: float = Field(default=0, ge=0)
    parallel: Positive = 2  # runs at the same time


class ServeResources(Strict):
    replicas: Positive = 1
    num_gpus: float = Field(default=0, ge=0)


class Resources(Strict):
    regenerate: RegenerateResources = RegenerateResources()
    adapt: AdaptResources = AdaptResources()
    serve: ServeResources = ServeResources()


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
    regenerate: RegenerateSettings = RegenerateSettings()
    select: SelectSettings = SelectSettings()
    adapt: AdaptSettings = AdaptSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    serve: ServeSettings = ServeSettings()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.adapt.tier not in SERVED_TIERS:
            raise ValueError(
                f"adapt.tier: {self.adapt.tier} changes the trunk, which targets share when they are served; "
                f"use {' or '.join(SERVED_TIERS)} (`farm bench adapt` measures the others)"
            )
        names = [target.name for target in self.targets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"targets: the name {twice[0]!r} is used twice; give each target its own name")
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


def check_placeable(manifest: Manifest, cluster_resources: Mapping[str, float], num_nodes: int) -> None:
    """Raise UserError for a request that this cluster can never place: Ray would wait for it for ever."""
    asked = manifest.resources
    regenerate, adapt, serve = asked.regenerate, asked.adapt, asked.serve
    requests = (
        ("regenerate", "GPU", regenerate.min_actors * regenerate.num_gpus, ("num_gpus", "min_actors")),
        ("regenerate", "CPU", regenerate.min_actors * regenerate.num_cpus, ("num_cpus", "min_actors")),
        ("adapt", "GPU", adapt.workers * adapt.gpus_per_worker, ("gpus_per_worker", "workers")),
        ("adapt", "CPU", float(adapt.workers), ("workers",)),
        ("serve", "GPU", serve.replicas * serve.num_gpus, ("num_gpus", "replicas")),
    )
    for section, resource, amount, fields in requests:
        have = cluster_resources.get(resource, 0.0)
        remedy = " or ".join(f"resources.{section}.{field}" for field in fields)
        if amount > have:
            raise UserError(
                f"manifest: resources.{section} needs {amount:g} {resource}, the cluster has {have:g}: "
                f"it could never be placed; lower {remedy}"
            )
    if num_nodes > 1 and manifest.store.startswith("file:") and not manifest.shared_filesystem:
        raise UserError(
            f"manifest: store {manifest.store} is a folder, but the cluster has {num_nodes} nodes; "
            "put it on a file system that all nodes mount and set shared_filesystem: true"
        )


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
        model = TargetSpec if part == "targets" else annotation
    yield from sorted(model.model_fields)
