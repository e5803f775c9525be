"""A version's card: what an adapter was made of, and the check that it belongs where it is loaded. Pure, torch-free."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from farm.checksum import bytes_sha256
from farm.errors import UserError

FULL_VOCABULARY = "full"  # in place of the digest of a draft vocabulary


class Fit(BaseModel):
    """What an adapter and the place that loads it must have in common; None where one of them does not say."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    trunk_key: str | None = None
    trunk_digest: str | None = None  # sha256 of the trunk's tensors file
    hidden_size: int | None = None
    vocab_size: int | None = None
    vocabulary_digest: str | None = None  # of the draft vocabulary, the map from its rows to token ids
    tokenizer_digest: str | None = None


class Card(Fit):
    """`card.json` of a published version. Fields that an older farm did not write are None or empty."""

    target: str = ""
    version: str = ""
    adapt_key: str | None = None
    answers_key: str | None = None  # the data that it was adapted on
    select_key: str | None = None  # of the rows of it that were kept; None: all
    evaluate_key: str | None = None
    opponent: str | None = None  # the version it was compared with; None: the base draft
    base_digest: str | None = None
    target_digest: str | None = None
    config: dict[str, Any] = {}
    config_digest: str | None = None
    evaluation: dict[str, Any] = {}  # the measured fields of a report row
    git_sha: str | None = None
    library_versions: dict[str, str] = {}
    files: dict[str, str] = {}  # sha256 by name

    @property
    def tau_table(self) -> list[tuple[str, str, float]]:
        """(draft, temperature, tau) for what was measured."""
        settings = self.config.get("evaluate", {})
        first = f"{(settings.get('temperatures') or [0.0])[0]:g}"
        measured = ((first, self.evaluation), ("1", self.evaluation.get("temperature_1") or {}))
        names = (("base draft", "tau_base_draft"), ("adapted", "tau_adapted"), ("live before", "tau_live"))
        return [
            (draft, temperature, fields[name])
            for temperature, fields in measured
            for draft, name in names
            if fields.get(name) is not None
        ]


_MEANINGS = (
    ("trunk_key", "trunk"),
    ("trunk_digest", "a trunk of sha256"),
    ("hidden_size", "hidden size"),
    ("vocab_size", "a vocabulary of size"),
    ("vocabulary_digest", "a draft vocabulary of sha256"),
    ("tokenizer_digest", "a tokenizer of sha256"),
)


def parse_card(name: str, card: Mapping[str, Any]) -> Card:
    """The record of a card's JSON; UserError when a field that is there is not what it should be."""
    try:
        return Card.model_validate(card)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{name}: its card is damaged: {field}: {first['msg']}; publish it again") from None


def mismatch(card: Fit, here: Fit) -> tuple[str, Any, Any] | None:
    """The first thing that both name and that differs: what it is, the card's, the one here."""
    for field, meaning in _MEANINGS:
        theirs, ours = getattr(card, field), getattr(here, field)
        if theirs is not None and ours is not None and theirs != ours:
            return meaning, theirs, ours
    return None


def check_fit(name: str, card: Fit, here: Fit) -> None:
    """UserError, with both values, when the adapter `name` does not belong to the trunk or the target here."""
    found = mismatch(card, here)
    if found is not None:
        meaning, theirs, ours = found
        raise UserError(
            f"{name} was adapted on {meaning} {theirs}, here is {ours}; onboard the target again, or load it beside "
            "the trunk and the model that it was made for"
        )


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, whatever the order of its fields."""
    return bytes_sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


def tokenizer_digest(vocabulary: Mapping[str, int]) -> str:
    """sha256 of a tokenizer's map from tokens to ids: what two models of one family have in common."""
    return bytes_sha256(json.dumps(sorted(vocabulary.items()), separators=(",", ":")).encode())


def vocabulary_digest(token_ids: Sequence[int] | None) -> str:
    """sha256 of a draft vocabulary's token ids in their order; FULL_VOCABULARY for None."""
    if token_ids is None:
        return FULL_VOCABULARY
    return bytes_sha256(json.dumps([int(token) for token in token_ids], separators=(",", ":")).encode())
