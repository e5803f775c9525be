"""One frozen trunk per node in shared memory, owned by a detached actor and mapped by every worker.

An object dies with its owner, so the owner is a named actor that outlives tasks, drivers and jobs; readers
resolve it by name each time, because a restarted actor owns a new object. Tensors travel as uint8 numpy
views: Ray maps those without a copy, while it would give each reader its own copy of a torch tensor.
"""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ObjectLostError
from safetensors.torch import load_file
from torch import Tensor

from farm.draft.checkpoint import trunk_digest
from farm.fleet.session import NAMESPACE
from farm.store import local_copy

OPEN_ATTEMPTS = 10


class TrunkChanged(RuntimeError):
    """The bytes of the shared trunk are not those that were put: some worker wrote to the shared pages."""


class Packed(NamedTuple):
    """One tensor as Ray can share it: its bytes, the torch dtype's name, its shape."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: str
    shape: tuple[int, ...]


def pack(tensor: Tensor) -> Packed:
    """View `tensor` (any dtype and device) as flat uint8 bytes; copies only what it must."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Packed(
        flat.view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    )


def unpack(packed: Packed) -> Tensor:
    """Inverse of `pack`. The tensor shares the bytes it was given: treat it as read-only."""
    with warnings.catch_warnings():
        # torch warns that the array is not writable; `borrow_trunk` checks that nobody wrote it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(packed.data).view(getattr(torch, packed.dtype)).reshape(packed.shape)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class TrunkStore:
    """Owner of one trunk's object. It reads the file again when Ray restarts it."""

    def __init__(self, path: str) -> None:
        state = load_file(local_copy(path))
        self._digest = trunk_digest(state)
        self._ref = ray.put({name: pack(tensor) for name, tensor in state.items()})

    def ref(self) -> tuple[list[Any], str]:
        """The object's reference, in a list so that it stays a reference, and the sha256 of the trunk."""
        return [self._ref], self._digest


def _actor_name(revision: str) -> str:
    return f"trunk@{revision}"


def ensure_trunk(revision: str, path: Path | str) -> str:
    """Make the trunk of `path` (a safetensors file) openable as `revision`; returns its sha256.

    `revision` must name the content (an artifact key): a second call with it finds the first actor.
    """
    for attempt in range(OPEN_ATTEMPTS):
        actor = TrunkStore.options(  # type: ignore[attr-defined]
            name=_actor_name(revision), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(str(path))
        try:
            return str(ray.get(actor.ref.remote())[1])
        except ActorDiedError:  # found under its name while `close_trunk` was ending it
            if attempt == OPEN_ATTEMPTS - 1:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


def open_trunk(revision: str, path: Path | str | None = None) -> tuple[dict[str, Tensor], str]:
    """Map the trunk `revision` into this process without a copy; its tensors, and their sha256 when put.

    With `path`, a revision that no actor holds is put first, so that whoever closes it early stops nobody. Raises
    ValueError without, when no actor holds it (`ensure_trunk` was not called on this cluster).
    """
    if path is None:
        return _mapped(revision)
    for attempt in range(OPEN_ATTEMPTS):
        ensure_trunk(revision, path)
        try:
            return _mapped(revision)
        except (ValueError, ActorDiedError, ObjectLostError):  # another run closed it in between
            if attempt == OPEN_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _mapped(revision: str) -> tuple[dict[str, Tensor], str]:
    actor = ray.get_actor(_actor_name(revision), namespace=NAMESPACE)
    refs, digest = ray.get(actor.ref.remote())
    return {name: unpack(packed) for name, packed in ray.get(refs[0]).items()}, digest


@contextmanager
def borrow_trunk(revision: str, path: Path | str | None = None) -> Iterator[dict[str, Tensor]]:
    """`open_trunk` with the pages hashed on entry and exit; TrunkChanged when they are not what was put.

    The exit check is skipped when the body raises, so that the body's own error is the one seen.
    """
    state, digest = open_trunk(revision, path)
    _check(revision, state, digest, "before")
    yield state
    _check(revision, state, digest, "after")


def _check(revision: str, state: Mapping[str, Tensor], digest: str, when: str) -> None:
    found = trunk_digest(state)
    if found != digest:
        raise TrunkChanged(f"trunk {revision} {when} the work: sha256 {found[:16]}, was put as {digest[:16]}")


def close_trunk(revision: str) -> bool:
    """End the actor of `revision`, which frees the object once nobody reads it; False if there is none."""
    try:
        actor = ray.get_actor(_actor_name(revision), namespace=NAMESPACE)
    except ValueError:
        return False
    ray.kill(actor)
    return True
