"""The controls of the draft length by name, and what an engine drafts by the settings of a deployment."""

from __future__ import annotations

import re
from typing import Any

from farm.decode.adaedl import AdaEDL
from farm.decode.control import Control, Fixed
from farm.decode.renewal import Cost
from farm.decode.tree import TreeShape
from farm.sections import CONTROL_PATTERN, ServeSettings

DEFAULT_LENGTH = 4


def make_control(name: str, max_length: int = 8) -> Control:
    """`off`, `fixed` (4 tokens), `fixed-K`, `adaedl`, `adaedl-published` or `cost`.

    Raises ValueError for others, and for a K above `max_length`.
    """
    if re.fullmatch(CONTROL_PATTERN, name) is None:
        raise ValueError(f"control {name!r} is none of off, fixed, fixed-K, adaedl, adaedl-published, cost")
    kind, _, variant = name.partition("-")
    if kind == "fixed":
        length = int(variant or min(DEFAULT_LENGTH, max_length))
        if length > max_length:
            raise ValueError(f"control {name!r}: at most {max_length} tokens can be drafted here (k)")
        return Fixed(length)
    if kind == "adaedl":
        return AdaEDL(max_length, published=variant == "published")
    return Cost(max_length) if kind == "cost" else Fixed(0)


def drafting_options(settings: ServeSettings) -> dict[str, Any]:
    """What an engine drafts, as a manifest says it: the arguments `k`, `control` and `tree`."""
    tree = None if settings.tree is None else TreeShape.of(settings.tree)
    return {"k": settings.k, "control": make_control(settings.control, settings.k), "tree": tree}
