"""Results of methods, kept without keeping their objects."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def remembered(size: int, method: Callable[..., Result]) -> functools._lru_cache_wrapper[Result]:
    """The last `size` results of a bound method, by its arguments.

    An object that keeps a cache over its own method is a cycle: its tensors would stay until the garbage collector
    comes, which counts objects and not bytes. Here the cache knows its object weakly.
    """
    own = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Result:
        bound = own()
        assert bound is not None
        return bound(*arguments)

    return functools.lru_cache(size)(call)
