"""How long a sequence may become in a replica."""

from farm.decode.drafting import longest_drafted
from farm.decode.tree import TreeShape
from farm.sections import ServeSettings


def num_drafted(settings: ServeSettings) -> int:
    """Positions behind a committed token that a round may write."""
    return settings.k if settings.tree is None else TreeShape.of(settings.tree).num_entries


def longest(settings: ServeSettings, positions: int, *, drafts: bool) -> int:
    """Of a target that knows so many positions, in tokens; `drafts`: it has one, or may get one."""
    most = min(settings.max_length, positions)
    return min(most, longest_drafted(num_drafted(settings))) if drafts else most


def shortened(settings: ServeSettings) -> str | None:
    """What is to be said where drafts know fewer positions than `max_length`; None: they know enough."""
    most = longest_drafted(num_drafted(settings))
    if settings.max_length <= most:
        return None
    return f"max_length: {settings.max_length} is more than drafts can follow; sequences end at {most} tokens"
