# T tokens, H hidden
"""Shards of answers: tokens as parquet, the hidden states that belong to them as one safetensors file beside it.

tokens  x_0 ... x_{P-1} | x_P ... x_{T-1}      prompt of P tokens, answer with its stop token
hidden  h_0 ............. h_{T-2}              the last token was never processed by the target
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from farm.artifacts import Artifacts
from farm.config import UserError

FEATURE_DTYPE = torch.bfloat16


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


def shard_names(number: int) -> tuple[str, str]:
    """File names of tokens and features of a shard."""
    return f"tokens-{number:05d}.parquet", f"features-{number:05d}.safetensors"


def write_shard(artifacts: Artifacts, stage: str, key: str, shard_no: int, answers: Sequence[Answer]) -> None:
    """Writes both files of a shard, each atomically; writing the same shard again does no harm."""
    tokens_name, features_name = shard_names(shard_no)
    columns = ("row", "id", "prompt_ids", "answer_ids", "finish_reason", "seed", "temperature", "error")
    table = pa.table({name: [_plain(getattr(answer, name)) for answer in answers] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    features = {
        f"{index}": answer.features.to(FEATURE_DTYPE).contiguous()
        for index, answer in enumerate(answers)
        if answer.features is not None
    }
    artifacts.put_file(stage, key, features_name, save(features))
    artifacts.put_file(stage, key, tokens_name, buffer.getvalue())


def read_shards(paths: Sequence[Path]) -> list[Sample]:
    """Samples of shards, given the paths of their features files, in order; rows without an answer are left out.

    Raises UserError when a shard is truncated or its two files do not belong together.
    """
    return [sample for path in paths for sample in _read_shard(Path(path))]


def answer_tokens(paths: Sequence[Path]) -> Iterator[list[int]]:
    """Answer token ids of every row of shards, given the paths of their tokens files."""
    for path in paths:
        yield from pq.read_table(path, columns=["answer_ids"]).column("answer_ids").to_pylist()


def _read_shard(features_path: Path) -> Iterator[Sample]:
    tokens_path = features_path.with_name(features_path.name.replace("features-", "tokens-")).with_suffix(
        ".parquet"
    )
    try:
        features = load_file(features_path)
        table = pq.read_table(tokens_path, columns=["prompt_ids", "answer_ids"])
    except (OSError, SafetensorError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{features_path}: the shard cannot be read ({error}); delete its artifact and run again"
        ) from error
    for index, row in enumerate(table.to_pylist()):
        features_TH = features.get(f"{index}")
        if features_TH is None:
            continue
        tokens_T = torch.tensor([*row["prompt_ids"], *row["answer_ids"]])
        if len(features_TH) != len(tokens_T) - 1:
            raise UserError(
                f"{features_path}: row {index} has {len(features_TH)} features for {len(tokens_T)} tokens; "
                "delete its artifact and run again"
            )
        yield Sample(tokens_T, features_TH, len(row["prompt_ids"]))


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
