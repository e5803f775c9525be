"""The sections of a manifest: what can be set for each stage, strict and frozen. Needs neither torch nor Ray."""

import json
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
CONTROL_PATTERN = r"^(off|fixed(-[1-9]\d?)?|adaedl(-published)?|cost)$"  # of the draft length
LONGEST_CHAIN = 63  # drafted tokens of a round: so far a verification may run past a target's last position

Rows = tuple[int, int | None]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
ChainLength = Annotated[int, Field(ge=1, le=LONGEST_CHAIN)]
Dtype = Literal["auto", "float32", "bfloat16"]
Strategy = Literal["all", "shift", "mahalanobis", "failure", "flatness", "random"]
PROMPT_STRATEGIES: tuple[Strategy, ...] = ("random", "mahalanobis", "shift")  # defined without an answer
Loss = Literal["eda", "kl", "tv", "lk", "lk-log"]
Tier = Literal["low-rank", "expert", "expert-fc", "expert-lora", "eda", "full"]
Init = Literal["base", "zero", "random"]
Form = Literal["unrolled", "cached", "cached-unrolled"]
Fault = Literal["empty", "loop", "truncated", "duplicate"]  # of an answer
FAULTS: tuple[Fault, ...] = get_args(Fault)
# They leave the trunk as it is, so that targets can share it.
SERVED_TIERS = ("low-rank", "expert", "expert-fc", "expert-lora")
CACHED_TIERS = ("low-rank", "expert")  # what the trunk puts out stays the same while they are trained


def _listed(value: object) -> object:
    """A list as a command line gives it, with commas."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


def _from_json(value: object) -> object:
    """A section as a command line gives it."""
    return json.loads(value) if isinstance(value, str) else value


def _off(value: object) -> object:
    """YAML 1.1 reads an unquoted off as false."""
    return "off" if value is False else value


def _endpoint(url: str | None) -> str | None:
    """An endpoint's URL is written to the store: it may hold no secret."""
    if url is not None and (urlsplit(url).scheme not in ("http", "https") or "@" in urlsplit(url).netloc):
        raise ValueError("give an endpoint such as http://host:8000/v1, its key by regenerate.api_key_env")
    return url


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetSpec(Strict):
    name: str = Field(pattern=NAME_PATTERN)
    model: str
    lora: str | None = None
    revision: str | None = None
    prompts: str = ""  # empty: it makes them up itself, see ElicitSettings
    chat_template: str | None = None  # path of a jinja file, or the template's text
    # Of an endpoint that serves it, for regenerate.engine openai; None: regenerate.url.
    url: str | None = None
    served_as: str | None = None  # its name there; None: `name`

    @field_validator("url")
    @classmethod
    def _is_an_endpoint(cls, url: str | None) -> str | None:
        return _endpoint(url)

    @field_validator("revision")
    @classmethod
    def _is_a_folder(cls, revision: str | None) -> str | None:
        if revision is not None:
            raise ValueError(
                "models are read from folders: download that revision, and name its folder as model"
            )
        return revision

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
    # Of products; weights and optimizer are float32. "auto": bfloat16 on a GPU, else float32. A CPU with instructions
    # for bfloat16 (avx512_bf16, amx_bf16) may take half as long in it, one without takes longer.
    dtype: Dtype = "auto"
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
    # Of a conversation that are answered; "last": the answers before it are taken as given.
    turns: Literal["all", "last"] = "all"
    # Answers with these faults are not trained on; all faults are counted.
    reject: Annotated[tuple[Fault, ...], BeforeValidator(_listed)] = ("empty", "loop", "duplicate")
    memory_bytes: Positive = 8 * 2**30  # of live targets in one actor
    features: Literal["store", "stream"] = "store"  # "stream": kept nowhere, captured again by who needs them
    # Of one target's features in the store; those beyond it are captured again.
    byte_budget: Positive = 2 * 2**30
    engine: Literal["farm", "openai"] = "farm"  # that decodes; "openai": an endpoint that serves the targets
    # "base": the base's draft drafts greedy answers where that is faster, which changes none of them. Sampled ones are
    # decoded plainly: their tokens would follow how long chains were, and so the machine's pace, not their seed alone.
    draft: Annotated[Literal["off", "base"], BeforeValidator(_off)] = "off"
    url: str | None = None  # of that endpoint, its /v1; a target may have its own
    # The environment variable, of who starts the run, that holds the endpoint's key.
    api_key_env: str | None = None
    concurrency: Positive = 16  # requests at once, of one actor
    retries: int = Field(default=8, ge=0)  # of a request, after pauses of 0.5 s to 8 s
    timeout_s: float = Field(default=600.0, gt=0)  # of a request

    @field_validator("url")
    @classmethod
    def _is_an_endpoint(cls, url: str | None) -> str | None:
        return _endpoint(url)

    @model_validator(mode="after")
    def _drafts_here(self) -> Self:
        if self.draft != "off" and self.engine != "farm":
            raise ValueError(
                f"draft {self.draft} is for engine farm; an endpoint drafts as it was started: set draft to off"
            )
        return self


class ElicitSettings(Strict):
    """Prompts that a target without any makes up itself (Magpie), the held-out ones among them."""

    prompts: Positive = 512
    max_new_tokens: Positive = 128
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    attempts: Positive = 4  # draws at most, in multiples of `prompts`: some are rejected
    seed: int = 0


class SelectSettings(Strict):
    """Which of its answers a target is adapted on; see farm.data.select for the scores."""

    strategy: Strategy = "all"
    before: bool = False  # prompts are chosen, by what both models make of them, and only those are answered
    fraction: float = Field(default=0.5, gt=0, le=1)
    pilot_rows: int = Field(default=256, ge=256)  # that set the threshold
    exact: bool = False  # the threshold is set by every row instead: the fraction is met to the row
    seed: int = 0  # of strategy random

    @model_validator(mode="after")
    def _needs_no_answers(self) -> Self:
        if self.before and self.strategy not in PROMPT_STRATEGIES:
            why = "chooses nothing" if self.strategy == "all" else "scores answers, and prompts have none yet"
            raise ValueError(
                f"strategy {self.strategy} {why}; beside before: true set strategy to "
                f"{', '.join(PROMPT_STRATEGIES[:-1])} or {PROMPT_STRATEGIES[-1]}, or leave before out"
            )
        return self


class AdaptSettings(TrainSettings):
    epochs: Positive = 3
    unroll: Positive = 1
    lr: float = Field(default=2e-3, gt=0)
    loss: Loss = "lk"
    hidden_weight: float = Field(default=5.0, ge=0)  # later drafted tokens read what is predicted
    tokens: Positive | None = None  # of answers to train on in all, repeats included; None: `epochs` says it
    tier: Tier = "expert-lora"
    rank: Positive = 32  # of low-rank maps
    width: Positive | None = None  # of the private expert; None: the base's
    init: Init = "base"
    form: Form = "unrolled"
    cached_epochs: Positive = 4  # of form cached-unrolled, before `epochs` unrolled ones
    cached_tokens: Positive = 512  # positions of a batch in the cached form
    cached_bytes: Positive = 8 * 2**30  # that the cached form may take

    @model_validator(mode="before")
    @classmethod
    def _tier_of_form(cls, fields: Any) -> Any:
        """What is cached comes from a trunk that stays the same: there the tier is an expert where none is named."""
        if isinstance(fields, dict) and fields.get("form", "unrolled") != "unrolled":
            return {"tier": "expert", **fields}
        return fields

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
    k: ChainLength = 4
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(0.0, 1.0), min_length=1)
    max_new_tokens: Positive = 64
    speed_prompts: Positive = 4
    speed_rounds: int = Field(default=5, ge=5)
    threads: Positive | None = None  # None: one for each core
    seed: int = 0
    min_gain: float = 0.0  # lower bound of tau_adapted - tau_live that promotes


class TreeSettings(Strict):
    """A tree that a round drafts in place of a chain (docs/method.md, Trees)."""

    kind: Literal["top-k", "sampled"] = "top-k"
    width: Positive = 4  # children of a node; of a top-k tree also the nodes of a level that go on
    depth: int = Field(default=5, ge=1, le=32)
    nodes: Positive = 12  # drafted tokens that are verified, at most


class ServeSettings(Strict):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    num_slots: Positive = 8
    max_length: Positive = 1024
    k: ChainLength = 8  # most tokens that a round drafts
    control: Annotated[str, BeforeValidator(_off)] = Field(default="cost", pattern=CONTROL_PATTERN)
    # Drafted in place of chains; None: chains.
    tree: Annotated[TreeSettings | None, BeforeValidator(_from_json)] = None
    # In a slot or in the engine's own queue. What waits in Serve's router instead is looked at every half second, and
    # slots would stay empty meanwhile.
    max_ongoing_requests: Positive = 96
    max_queued_requests: Positive = 32
    max_body_bytes: Positive = 4 * 2**20
    max_prompt_tokens: Positive | None = None  # None: what fits into max_length
    max_new_tokens: Positive | None = None  # of one answer; None: what fits into max_length
    # File of bearer keys (`farm key new`); None: whoever reaches the endpoint may ask.
    keys: str | None = None
    cors: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()  # origins of pages that may ask; "*": any
    drain_s: float = Field(default=30.0, ge=0)  # how long open answers may go on once it is told to end
    canary_margin: float = Field(default=0.05, ge=0, lt=1)  # share of the live tau that a canary may lose
    canary_alpha: float = Field(default=0.01, gt=0, lt=1)  # bound of rolling one back that does not lose more

    @model_validator(mode="after")
    def _length_within_k(self) -> Self:
        _, _, length = self.control.partition("-")
        if length.isdigit() and int(length) > self.k:
            raise ValueError(
                f"control {self.control} drafts more than k = {self.k} tokens; raise k, at most to {LONGEST_CHAIN}"
            )
        return self

    @model_validator(mode="after")
    def _tree_or_chain(self) -> Self:
        if self.tree is not None and self.control not in ("fixed", "off"):
            raise ValueError(
                f"control {self.control} sets the length of chains; beside a tree set control to fixed or off"
            )
        return self
