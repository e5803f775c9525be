"""The draft vocabulary of a trunk: the most frequent tokens of the base's answers and their prompts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from farm.store import local_copy


def token_files(feature_shards: Sequence[str]) -> list[Path]:
    """The tokens file beside each features file; only tokens are fetched where the store is remote."""
    found = []
    for location in feature_shards:
        folder, slash, name = location.rpartition("/")
        tokens = name.replace("features-", "tokens-").replace(".safetensors", ".parquet")
        found.append(local_copy(f"{folder}{slash}{tokens}"))
    return found


def choose_vocabulary(paths: Sequence[Path], size: int | None) -> tuple[int, ...] | None:
    """The `size` most frequent token ids, ascending, or all that occur; None keeps the full vocabulary.

    Stop tokens need no care: every finished answer ends with one.
    """
    if size is None:
        return None
    counts: Counter[int] = Counter()
    for path in paths:
        for column in ("prompt_ids", "answer_ids"):
            for ids in pq.read_table(path, columns=[column]).column(column).to_pylist():
                counts.update(ids or ())
    by_frequency = sorted(counts, key=lambda token: (-counts[token], token))
    return tuple(sorted(by_frequency[:size]))


def coverage(paths: Sequence[Path], vocabulary: Sequence[int] | None) -> float:
    """Share of a target's answer tokens that a draft with this vocabulary can propose; 1 for the full one."""
    if vocabulary is None:
        return 1.0
    known = set(vocabulary)
    inside = total = 0
    for path in paths:
        for ids in pq.read_table(path, columns=["answer_ids"]).column("answer_ids").to_pylist():
            total += len(ids or ())
            inside += sum(token in known for token in ids or ())
    return inside / total if total else 1.0
