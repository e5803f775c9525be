"""Mistakes of the user, told apart from mistakes of the program."""


class UserError(ValueError):
    """A mistake of the user; the message names the file, the field and the remedy."""


class Refused(UserError):
    """A mistake that concerns one target only: the other targets go on."""


class StoreUnusable(UserError):
    """The store itself failed or refused, and may work again: it says nothing of the object that was asked for."""


class Denied(StoreUnusable):
    """No right to an object: what another target needs may still be readable."""


def is_unusable(error: BaseException) -> bool:
    """Whether the store is what failed, also where the error is of one who could not read from it."""
    return isinstance(error, StoreUnusable) or isinstance(error.__cause__, StoreUnusable)


def is_denied(error: BaseException) -> bool:
    """As `is_unusable`, of a right that is missing."""
    return isinstance(error, Denied) or isinstance(error.__cause__, Denied)
