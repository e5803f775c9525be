"""The ways to adapt a draft that `farm bench adapt` compares, as changes to the default."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from farm.sections import CACHED_TIERS, AdaptSettings, Strategy

Data = Literal["none", "regenerated", "dataset"]
QUICK: Final = ("base-draft", "default", "eda", "full-retrain")
MAIN: Final = QUICK  # measured on every target; the others on the first
ROW_EPOCHS: Final = 0.25  # of what is trained on whole rows, in epochs of a default on cached positions
FULL_EPOCHS: Final = 0.75  # of full retraining, unless it stops early before
EPOCHS: Final = 20  # that these are shares of where the default counts tokens instead
SELECTIONS: Final[tuple[Strategy, ...]] = ("random", "shift", "failure", "mahalanobis")
FULL_RATES: Final = (0.5, 1.0, 2.0)  # learning rates of full retraining, in those of the default


@dataclass(frozen=True)
class Variant:
    """One way to adapt: `changes` to the default settings, trained on `fraction` of the rows of `data`."""

    method: str
    label: str  # says which variant of the method it is
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: Data = "regenerated"
    selection: Strategy = "all"
    fraction: float = 1.0
    rates: tuple[float, ...] = (1.0,)  # of learning, in the default's; the best on held-out rows counts
    curve: bool = False  # rows along its way too
    random_trunk: bool = False
    width: float | None = None  # of the expert, in those of the base's

    def settings(self, default: AdaptSettings, seed: int, rate: float, base_width: int) -> AdaptSettings:
        """What is trained with; checked as a manifest's would be."""
        changes = {**default.model_dump(), **self.changes, "seed": seed}
        if self.width is not None:
            changes["width"] = max(1, round(self.width * base_width))
        return AdaptSettings(**{**changes, "lr": changes["lr"] * rate})


def variants(default: AdaptSettings) -> list[Variant]:
    """Every way of every method, in the order of the table."""
    # EDA trains fc and a random private expert on true hidden states, with smooth L1 and a tenth of cross-entropy.
    eda = {
        "loss": "eda", "hidden_weight": 1.0, "unroll": 1, "form": "unrolled", "tier": "eda", "init": "random",
        "width": None, "adaspec": None, "early_stop": None, "tokens": None, "epochs": _epochs(default, 1.0),
    }  # fmt: skip
    # A step over whole rows costs several cached ones; the share of epochs keeps the seconds near each other.
    rows: dict[str, Any] = {"form": "unrolled"}
    if default.tokens is None:
        rows["epochs"] = _epochs(default, 1.0 if default.form == "unrolled" else ROW_EPOCHS)
    cached: dict[str, Any] = {"form": "cached", "tokens": None, "epochs": _epochs(default, 1.0)}
    if default.tier not in CACHED_TIERS:
        cached["tier"] = "expert"
    full = {
        **rows, "tokens": None, "epochs": _epochs(default, FULL_EPOCHS), "tier": "full", "width": None, "init": "base",
        "unroll": 1 if default.form == "cached" else default.unroll,
        "early_stop": {"held_out": 0.05, "every": 20, "patience": 5},
    }  # fmt: skip
    adaspec = {"adaspec": {}}
    out = [
        Variant("base-draft", "base draft", data="none"),
        Variant("default", "default"),
        Variant("eda", "eda", eda, selection="shift", fraction=0.5),
        Variant("eda-original", "eda, dataset answers", eda, data="dataset"),
        Variant("full-retrain", "full retraining", full, rates=FULL_RATES, curve=True),
        Variant(
            "full-retrain-scratch", "full retraining from random", full,
            rates=FULL_RATES, curve=True, random_trunk=True,
        ),
    ]  # fmt: skip
    out += [
        Variant("losses", loss, {"loss": loss, **_weight(loss)})
        for loss in ("kl", "tv", "lk", "lk-log", "eda")
    ]
    out += [Variant("adaspec", f"{loss} + adaspec", {"loss": loss, **adaspec}) for loss in ("kl", "lk")]
    out += [Variant("unroll", f"{steps} steps", {**rows, "unroll": steps}) for steps in (1, 2, 3, 4)]
    both = {
        **cached,
        "form": "cached-unrolled",
        "cached_epochs": _epochs(default, 0.5),
        "epochs": _epochs(default, 0.1),
    }
    out += [
        Variant("forms", "expert, cached", cached, curve=True),
        Variant("forms", "expert, unrolled", {**rows, "tier": "expert"}, curve=True),
        Variant("forms", "expert, cached, then unrolled", both, curve=True),
        Variant("tiers", "half width, cached", cached, width=0.5),
        Variant("tiers", "double width, cached", cached, width=2.0),
        Variant("tiers", "expert + low-rank fc", {**rows, "tier": "expert-fc"}),
        *(
            Variant(
                "tiers", f"expert + low-rank trunk, {rank}", {**rows, "tier": "expert-lora", "rank": rank}
            )
            for rank in (8, 16, 64)
        ),
        Variant("tiers", "expert + fc", {**rows, "tier": "eda"}),
        Variant("tiers", "zero init", {"init": "zero"}),
        Variant("tiers", "random init", {"init": "random"}),
    ]
    low_rank = {**cached, "tier": "low-rank", "init": "base", "width": None}
    out += [Variant("lora", f"low-rank expert, {rank}", {**low_rank, "rank": rank}) for rank in (8, 32)]
    for selection in SELECTIONS:
        out += [
            Variant("selection", f"{selection}, {share:.0%}", selection=selection, fraction=share)
            for share in (0.25, 0.5)
        ]
    return out


@dataclass(frozen=True)
class Work:
    """One variant under one seed."""

    variant: Variant
    seed: int


def work(every: Sequence[Variant], methods: Collection[str], seeds: int, *, first: bool) -> list[Work]:
    """What is measured on a target: the chosen methods (none named: all) under every seed; but the main ones, only
    on the first target.
    """
    chosen = [one for one in every if not methods or one.method in methods]
    return [Work(one, seed) for one in chosen if first or one.method in MAIN for seed in range(seeds)]


def methods_of(every: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(variant.method for variant in every))


def _epochs(default: AdaptSettings, factor: float) -> int:
    return max(1, round((default.epochs if default.tokens is None else EPOCHS) * factor))


def _weight(loss: str) -> dict[str, Any]:
    return {"hidden_weight": 1.0} if loss == "eda" else {}
