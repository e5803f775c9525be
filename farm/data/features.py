# T tokens, H hidden
"""Shards of answers: tokens as parquet, the hidden states that belong to them as one safetensors file beside it.

tokens  x_0 ... x_{P-1} | x_P ... x_{T-1}      prompt of P tokens, answer with its stop token
hidden  h_0 ............. h_{T-2}              the last token was never processed by the target

An answer to a conversation holds what its user said in between, too; `turns` are the stretches of it that the target
said. Tokens are the artifact. Features are kept as far as a budget goes; the others are captured again, by a prefill
of the same tokens, whenever they are read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from farm.artifacts import Artifacts
from farm.config import UserError
from farm.data.rejects import digest_of, fault_of, repeated, trainable
from farm.data.shards import shard_names
from farm.sections import Fault
from farm.store import local_copy

FEATURE_DTYPE = torch.bfloat16
# Features [T - 1, H] of rows of T tokens, in order.
Capture = Callable[[Sequence[Sequence[int]]], Sequence[Tensor]]


@dataclass(frozen=True)
class Answer:
    """A target's answer to one prompt, with the hidden states [T - 1, H] seen while it was decoded."""

    row: int
    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "error"]
    seed: int
    temperature: float
    features: Tensor | None
    error: str | None = None
    turns: tuple[tuple[int, int], ...] = ()  # of `answer_ids`, what the target said; (): all
    fault: Fault | None = None
    rejected: bool = False  # not to be trained on
    digest: str | None = None  # of answers with the same one the first is trained on

    def judged(self, reject: Collection[Fault]) -> Answer:
        """With the first of its faults, and whether that rejects it."""
        if self.finish_reason == "error":
            return self
        fault = fault_of(self.answer_ids, self.finish_reason)
        digest = digest_of(self.prompt_ids, self.answer_ids) if "duplicate" in reject else None
        return replace(self, fault=fault, rejected=fault in reject, digest=digest)


@dataclass(frozen=True)
class Sample:
    """One sequence to train on."""

    tokens_T: Tensor  # int64
    features_TH: Tensor  # [T - 1, H] of tokens 0..T-2
    num_prompt_tokens: int
    row: int = 0
    id: str = ""
    turns: tuple[tuple[int, int], ...] = ()  # of `tokens_T`, what the target said; (): all behind the prompt

    @property
    def said(self) -> tuple[tuple[int, int], ...]:
        """The stretches of `tokens_T` that the target said."""
        return self.turns or ((self.num_prompt_tokens, len(self.tokens_T)),)

    @property
    def num_said(self) -> int:
        return sum(end - start for start, end in self.said)

    @property
    def trainable(self) -> bool:
        return any(trainable(end - start) for start, end in self.said)


def write_shard(
    artifacts: Artifacts,
    stage: str,
    key: str,
    shard_no: int,
    answers: Sequence[Answer],
    feature_bytes: int | None = None,
    writer: str = "",
) -> int:
    """Writes both files of a shard, each atomically; who may not be alone with it names itself as a `writer`.

    The features of the first rows are kept, as many as fit into `feature_bytes` (None: all), but none of rejected
    ones; returns their bytes.
    """
    tokens_name, features_name = shard_names(shard_no, writer)
    columns = (
        "row", "id", "prompt_ids", "answer_ids", "turns", "finish_reason", "seed", "temperature", "error",
        "fault", "rejected", "digest",
    )  # fmt: skip
    table = pa.table({name: [_plain(getattr(answer, name)) for answer in answers] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    features, kept = dict[str, Tensor](), 0
    for index, answer in enumerate(answers):
        if answer.features is None or answer.rejected:
            continue
        size = answer.features.numel() * FEATURE_DTYPE.itemsize
        if feature_bytes is not None and kept + size > feature_bytes:
            break
        features[f"{index}"], kept = answer.features.to(FEATURE_DTYPE).contiguous(), kept + size
    artifacts.put_file(stage, key, features_name, save(features))
    artifacts.put_file(stage, key, tokens_name, buffer.getvalue())
    return kept


def read_shards(
    paths: Sequence[Path], rows: Collection[int] | None = None, capture: Capture | None = None
) -> list[Sample]:
    """Samples of shards, given the paths of their features files, in order.

    `rows` are the numbers of those that are wanted; None: all but those that are rejected, or equal an earlier one.
    Rows without an answer are left out. Features that were not kept come from `capture`. Raises UserError when a shard
    is truncated, its two files do not belong together, or there is no `capture`.
    """
    seen: set[str] = set()
    return [sample for path in paths for sample in _read_shard(Path(path), rows, capture, seen)]


def local_shards(locations: Sequence[str]) -> list[Path]:
    """Local paths of shards' features files, their tokens files beside them; locations are those of a store."""
    paths = []
    for location in locations:
        features = location.rpartition("/")[2]
        tokens = features.replace("features-", "tokens-").replace(".safetensors", ".parquet")
        local_copy(location.removesuffix(features) + tokens)
        paths.append(local_copy(location))
    return paths


def answer_tokens(paths: Sequence[Path]) -> Iterator[list[int]]:
    """Answer token ids of every row of shards that is not rejected, given the paths of their tokens files."""
    for path in paths:
        rows = _read_columns(path, ["answer_ids", "rejected"])
        yield from (row["answer_ids"] for row in rows if not row["rejected"])


def trainable_rows(paths: Sequence[Path]) -> dict[int, str]:
    """Row numbers and ids of the answers that can be trained on, given the paths of shards' features files."""
    found: dict[int, str] = {}
    seen: set[str] = set()
    for path in paths:
        rows = _read_tokens(Path(path), ["row", "id", "answer_ids", "turns", "rejected", "digest"])
        for row in (rows[index] for index in _wanted(rows, seen)):
            turns = row["turns"] or ((0, len(row["answer_ids"])),)
            if any(trainable(end - start) for start, end in turns):
                found[row["row"]] = row["id"]
    return found


def _wanted(table: Sequence[dict[str, Any]], seen: set[str]) -> list[int]:
    """Indices of the rows that have an answer which is neither rejected nor equal to one that was seen."""
    kept = [index for index, row in enumerate(table) if row["answer_ids"] and not row["rejected"]]
    again = set(repeated([table[index]["digest"] for index in kept], seen))
    return [index for place, index in enumerate(kept) if place not in again]


def _read_tokens(features_path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of the tokens file beside a features file."""
    name = features_path.name.replace("features-", "tokens-")
    try:
        return _read_columns(features_path.with_name(name).with_suffix(".parquet"), columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(features_path, error) from error


def _read_columns(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of a tokens file; None in columns that it was written without."""
    present = [name for name in columns if name in pq.read_schema(path).names]
    rows = pq.read_table(path, columns=present).to_pylist()
    return [dict.fromkeys(columns) | row for row in rows]


def _read_features(path: Path, wanted: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Index and features of the wanted rows that have an answer; the others' are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            return [(index, file.get_tensor(f"{index}")) for index in wanted if f"{index}" in names]
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(features_path: Path, error: Exception) -> UserError:
    return UserError(
        f"{features_path}: the shard cannot be read ({error}); delete its artifact and run again"
    )


def _read_shard(
    features_path: Path, rows: Collection[int] | None, capture: Capture | None, seen: set[str]
) -> Iterator[Sample]:
    columns = ["row", "id", "prompt_ids", "answer_ids", "turns", "rejected", "digest"]
    table = _read_tokens(features_path, columns)
    if rows is None:
        wanted = _wanted(table, seen)
    else:
        wanted = [index for index, row in enumerate(table) if row["answer_ids"] and row["row"] in rows]
    tokens = {index: [*table[index]["prompt_ids"], *table[index]["answer_ids"]] for index in wanted}
    features = dict(_read_features(features_path, wanted))
    for index, features_TH in features.items():
        if len(features_TH) != len(tokens[index]) - 1:
            raise UserError(
                f"{features_path}: row {index} has {len(features_TH)} features for {len(tokens[index])} tokens; "
                "delete its artifact and run again"
            )
    absent = [index for index in wanted if index not in features]
    if absent:
        if capture is None:
            raise UserError(
                f"{features_path}: the features of {len(absent)} rows were not kept; raise regenerate.byte_budget"
            )
        features |= zip(absent, capture([tokens[index] for index in absent]), strict=True)
    for index in wanted:
        row, num_prompt = table[index], len(table[index]["prompt_ids"])
        turns = tuple((num_prompt + start, num_prompt + end) for start, end in row["turns"] or ())
        tokens_T = torch.tensor(tokens[index])
        yield Sample(tokens_T, features[index], num_prompt, row["row"], row["id"], turns)


def _plain(value: object) -> object:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
