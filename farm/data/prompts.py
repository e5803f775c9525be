"""Prompts of a target: JSONL, Parquet, a folder or a hub id. A broken row is counted, not fatal."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from farm.config import UserError
from farm.sections import Rows
from farm.store import S3_SCHEME, local_copy


@dataclass(frozen=True)
class Prompt:
    row: int  # index in the source, broken rows counted
    id: str
    messages: tuple[dict[str, str], ...]  # {"role", "content"}
    answer: str | None


@dataclass(frozen=True)
class RowError:
    row: int
    reason: str


@dataclass(frozen=True)
class PromptSet:
    source: str
    digest: str  # sha256 of what was read, whatever the file is called
    prompts: tuple[Prompt, ...]
    errors: tuple[RowError, ...]  # among the rows asked for
    num_rows: int  # of the whole source
    origins: Mapping[int, str]  # by row: its "source", or its file in a folder


def load_prompts(source: str, rows: Rows | None = None) -> PromptSet:
    """Read the rows `rows` (a python slice; None: all) of a source.

    A row is {"prompt": str} or {"messages": [{"role", "content"}, ...]}, with optional "id" and "answer". What the
    assistant says at the end of messages is the answer, unless another is given.
    A row that cannot be read becomes a RowError. UserError if the source cannot be opened or no row of the
    range is usable. Blank lines of a .jsonl file are no rows.
    """
    if not source:
        raise UserError(
            "prompts: the target has none; give it a file, for instance the one that it made up itself"
        )
    path = local_copy(source)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.suffix == ".jsonl" else []
    if files and files[0].is_file():
        lines = [(file.name, record) for file in files for record in _read_lines(file)]
        records, names = [record for _, record in lines], [name for name, _ in lines]
    else:
        records = [
            (row, "") for row in _read_dataset(str(path) if source.startswith(S3_SCHEME) else source, path)
        ]
        names = [path.name] * len(records)
    kept = range(len(records))[slice(*rows)] if rows else range(len(records))
    prompts, errors, digest = [], [], hashlib.sha256()
    origins: dict[int, str] = {}
    for index in kept:
        parsed = _parse(index, *records[index])
        if isinstance(parsed, Prompt):
            prompts.append(parsed)
            origins[index] = _origin(records[index][0], names[index])
            fields = [index, parsed.id, parsed.messages, parsed.answer]
        else:
            errors.append(parsed)
            fields = [index, parsed.reason]
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    if not prompts:
        raise UserError(_nothing_usable(source, rows, len(records), errors))
    return PromptSet(source, digest.hexdigest(), tuple(prompts), tuple(errors), len(records), origins)


@dataclass(frozen=True)
class Split:
    """A target's prompts to adapt on, those held out, and what is wrong with rows of the former."""

    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    errors: tuple[RowError, ...]


def split_prompts(
    found: PromptSet, regenerate: Rows | None, evaluate: Rows | None, evaluate_prompts: int
) -> Split:
    """The prompts by `split_rows`, at most `evaluate_prompts` held out.

    One that asks what a held-out one asks is left out and counted: a draft would be measured on its training.
    """
    used, rest = split_rows(found.num_rows, regenerate, evaluate, evaluate_prompts)
    held_out = tuple(prompt for prompt in found.prompts if prompt.row in rest)[:evaluate_prompts]
    prompts = [prompt for prompt in found.prompts if prompt.row in used]
    kept = not_held_out(prompts, held_out)
    rows = {prompt.row for prompt in kept}
    broken = [error for error in found.errors if error.row in used]
    twice = [RowError(prompt.row, "is held out too") for prompt in prompts if prompt.row not in rows]
    return Split(kept, held_out, (*broken, *twice))


def not_held_out(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """Those that ask nothing that a held-out one asks."""
    asked = set(map(_asks, held_out))
    return tuple(prompt for prompt in prompts if _asks(prompt) not in asked)


def first_of_equals(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """Those that ask nothing that one before them asks."""
    first: dict[tuple[tuple[str, str], ...], Prompt] = {}
    for prompt in prompts:
        first.setdefault(_asks(prompt), prompt)
    return tuple(first.values())


def _asks(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in prompt.messages)


def split_rows(
    num_rows: int, regenerate: Rows | None, evaluate: Rows | None, evaluate_prompts: int
) -> tuple[range, range]:
    """The rows to adapt on and the rows to evaluate on: disjoint, neither empty.

    By default the last `evaluate_prompts` rows are held out and everything before them is adapted on.
    """
    everything = range(num_rows)
    held_out = everything[slice(*evaluate)] if evaluate else everything[max(0, num_rows - evaluate_prompts) :]
    if not evaluate and regenerate is None and num_rows <= evaluate_prompts:
        raise UserError(
            f"prompts: {num_rows} rows cannot give {evaluate_prompts} held-out rows and any to adapt on; "
            "add rows or lower evaluate.prompts"
        )
    used = everything[slice(*regenerate)] if regenerate else _largest_rest(everything, held_out)
    for field, chosen in (("regenerate.rows", used), ("evaluate.rows", held_out)):
        if not chosen:
            raise UserError(f"{field}: selects none of the {num_rows} rows; correct the range or add prompts")
    if max(used.start, held_out.start) < min(used.stop, held_out.stop):
        raise UserError(
            f"regenerate.rows {used.start}..{used.stop} and evaluate.rows {held_out.start}..{held_out.stop} "
            "overlap; choose disjoint ranges, held-out rows may not be trained on"
        )
    return used, held_out


def _largest_rest(everything: range, held_out: range) -> range:
    """What the held-out range leaves; where it cuts the file in two, the longer side."""
    before, after = everything[: held_out.start], everything[held_out.stop :]
    return before if len(before) >= len(after) else after


def _read_lines(path: Path) -> list[tuple[Any, str]]:
    """(record, "") or (None, reason) for every line that is not blank."""
    return [_decode(line) for line in path.read_bytes().splitlines() if line.strip()]


def _decode(line: bytes) -> tuple[Any, str]:
    try:
        return json.loads(line), ""
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, f"is not JSON ({error})"


def _read_dataset(source: str, path: Path) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        if path.is_file() and path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path / "train"))
        elif path.is_file():
            raise UserError(
                f"{source}: prompts must be .jsonl or .parquet, a folder or a hub id; convert the file"
            )
        elif not path.exists() and _is_path(source):
            raise UserError(f"{source}: there are no prompts at this path, seen from {Path.cwd()}")
        else:
            loaded = datasets.load_dataset(source, split="train")
    except UserError:
        raise
    except Exception as error:  # the readers behind `datasets` share no base class
        raise UserError(
            f"{source}: prompts cannot be read ({type(error).__name__}: {str(error)[:200]}); "
            "give a .jsonl or .parquet file, a folder of them, or a hub id with a train split"
        ) from error
    rows: Iterator[Mapping[str, Any]] = iter(loaded)
    return rows


def _is_path(source: str) -> bool:
    """Whether it can only be a path: a hub id is `name` or `owner/name`."""
    path = Path(source)
    return path.suffix in (".jsonl", ".parquet") or source.startswith((".", "/", "~")) or len(path.parts) > 2


def _parse(row: int, record: Any, reason: str) -> Prompt | RowError:
    if reason:
        return RowError(row, reason)
    if not isinstance(record, Mapping):
        return RowError(row, "is not an object with prompt or messages")
    prompt, messages, answer = record.get("prompt"), record.get("messages"), record.get("answer")
    if isinstance(prompt, str) and prompt.strip():
        messages = [{"role": "user", "content": prompt}]
    elif not _is_conversation(messages):
        return RowError(row, "has no usable prompt or messages")
    asked, said = _asked([{"role": turn["role"], "content": turn["content"]} for turn in messages])
    if not asked:
        return RowError(row, "has no message but the assistant's")
    name = str(row if (given := record.get("id")) is None else given)
    answer = answer if isinstance(answer, str) else said
    if not all(map(_is_text, (name, answer or "", *(text for turn in asked for text in turn.values())))):
        return RowError(row, "has a lone surrogate, which is no text")
    return Prompt(row=row, id=name, messages=tuple(asked), answer=answer)


def _asked(turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], str | None]:
    """A conversation up to where the assistant is to answer, and its answer if it has one already."""
    end = len(turns)
    while end and turns[end - 1]["role"] == "assistant":
        end -= 1
    return turns[:end], turns[end]["content"] if end < len(turns) else None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _origin(record: Mapping[str, Any], name: str) -> str:
    said = record.get("source")
    return said if isinstance(said, str) else name


def _is_conversation(messages: Any) -> TypeGuard[Iterable[Mapping[str, str]]]:
    if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
        return False
    turns = list(messages)
    return bool(turns) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        and turn["content"].strip()
        for turn in turns
    )


def _nothing_usable(source: str, rows: Rows | None, num_rows: int, errors: list[RowError]) -> str:
    if not num_rows:
        return f'{source}: has no prompts; add rows such as {{"prompt": "..."}}'
    if not errors:
        return f"{source}: rows {rows} select none of its {num_rows} prompts; correct the range"
    return (
        f"{source}: none of {len(errors)} rows is usable; row {errors[0].row} {errors[0].reason}; "
        'write rows such as {"prompt": "..."}'
    )
