# T tokens, H hidden
"""Shards of answers: tokens as parquet, the hidden states that belong to them as one safetensors file beside it.

tokens  x_0 ... x_{P-1} | x_P ... x_{T-1}      prompt of P tokens, answer with its stop token
hidden  h_0 ............. h_{T-2}              the last token was never processed by the target

Tokens are the artifact. Features are kept as far as a budget goes; the others are captured again, by a prefill of the
same tokens, whenever they are read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sample:
    """One sequence to train on."""

    tokens_T: Tensor  # int64
    features_TH: Tensor  # [T - 1, H] of tokens 0..T-2
    num_prompt_tokens: int
    row: int = 0
    id: str = ""


def trainable(num_answer_tokens: int) -> bool:
    """Whether an answer has a token that is drafted, and the true hidden state after it."""
    return num_answer_tokens > 2


def shard_names(number: int) -> tuple[str, str]:
    """File names of tokens and features of a shard."""
    return f"tokens-{number:05d}.parquet", f"features-{number:05d}.safetensors"


def write_shard(
    artifacts: Artifacts,
    stage: str,
    key: str,
    shard_no: int,
    answers: Sequence[Answer],
    feature_bytes: int | None = None,
) -> int:
    """Writes both files of a shard, each atomically; writing the same shard again does no harm.

    The features of the first rows are kept, as many as fit into `feature_bytes` (None: all); returns their bytes.
    """
    tokens_name, features_name = shard_names(shard_no)
    columns = ("row", "id", "prompt_ids", "answer_ids", "finish_reason", "seed", "temperature", "error")
    table = pa.table({name: [_plain(getattr(answer, name)) for answer in answers] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    features, kept = dict[str, Tensor](), 0
    for index, answer in enumerate(answers):
        if answer.features is None:
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
    """Samples of shards, given the paths of their features files, in order; rows without an answer are left out.

    `rows` are the numbers of those that are wanted; None: all. Features that were not kept come from `capture`. Raises
    UserError when a shard is truncated, its two files do not belong together, or there is no `capture`.
    """
    return [sample for path in paths for sample in _read_shard(Path(path), rows, capture)]


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
    """Answer token ids of every row of shards, given the paths of their tokens files."""
    for path in paths:
        yield from pq.read_table(path, columns=["answer_ids"]).column("answer_ids").to_pylist()


def trainable_rows(paths: Sequence[Path]) -> dict[int, str]:
    """Row numbers and ids of the answers that can be trained on, given the paths of shards' features files."""
    found: dict[int, str] = {}
    for path in paths:
        rows = _read_tokens(Path(path), ["row", "id", "answer_ids"])
        found |= {row["row"]: row["id"] for row in rows if trainable(len(row["answer_ids"]))}
    return found


def _read_tokens(features_path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of the tokens file beside a features file."""
    name = features_path.name.replace("features-", "tokens-")
    try:
        table = pq.read_table(features_path.with_name(name).with_suffix(".parquet"), columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(features_path, error) from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


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
    features_path: Path, rows: Collection[int] | None, capture: Capture | None
) -> Iterator[Sample]:
    table = _read_tokens(features_path, ["row", "id", "prompt_ids", "answer_ids"])
    wanted = [
        index for index, row in enumerate(table) if row["answer_ids"] and (rows is None or row["row"] in rows)
    ]
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
        row = table[index]
        tokens_T = torch.tensor(tokens[index])
        yield Sample(tokens_T, features[index], len(row["prompt_ids"]), row["row"], row["id"])


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
