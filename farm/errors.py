"""Mistakes of the user, told apart from mistakes of the program."""


class UserError(ValueError):
    """A mistake of the user; the message names the file, the field and the remedy."""


class Refused(UserError):
    """A mistake that concerns one target only: the other targets go on."""
