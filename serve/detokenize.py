"""Text out of token ids as they arrive: whole characters only, cut at the first stop string."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no character (yet)
MAX_HELD_TOKENS = 16  # a longer run of such bytes is taken for what it is


class TextStream:
    """Turns one answer's tokens into text, a token at a time, so that rounds of any size give the same text.

    A window of the last tokens is decoded with and without the new ones: the difference is the new text,
    right also where a decoder joins tokens (bytes of one character, a space before a word). Text that may be
    the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Iterable[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._window: list[int] = []  # the last tokens
        self._num_read = 0  # of the window; these have given their text, and the others are read behind them
        self._held = ""  # text that may begin a stop string
        self._num_settled = self._num_given = 0  # characters
        self._finished = False
        self.offsets: list[int] = []  # characters of the text before each token's own, a token each
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far, those of a stop string among them, none after it."""
        return len(self.offsets)

    @property
    def num_given(self) -> int:
        """Tokens whose text was given out, in part at least; at the end all but those of a stop string."""
        if self._finished and not self.stopped:
            return self.num_tokens
        return bisect_left(self.offsets, self._num_given)

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens and return the text that they make certain; nothing once `stopped`."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self._window.append(token)
            self.offsets.append(self._num_settled)
            text += self._until_stop(self._settled())
        return text

    def finish(self) -> str:
        """The text that was held back; call once, after the last token."""
        if self.stopped:
            return ""
        text = self._until_stop(self._fresh())
        if not self.stopped:
            text, self._held = text + self._held, ""
            self._finished = True
        return text

    def _fresh(self) -> str:
        """Text of the tokens that were not read yet."""
        before = self._decode(self._window[: self._num_read])
        return self._decode(self._window)[len(before) :]

    def _settled(self) -> str:
        fresh = self._fresh()
        num_held = len(self._window) - self._num_read
        if fresh and not (fresh.endswith(REPLACEMENT) and num_held < MAX_HELD_TOKENS):
            self._window = self._window[self._num_read :]
            self._num_read = len(self._window)
            return fresh
        if num_held > MAX_HELD_TOKENS:  # special tokens have no text: the window may not grow with them
            del self._window[self._num_read]
        return ""

    def _until_stop(self, fresh: str) -> str:
        self._num_settled += len(fresh)
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            self._num_given += min(found)
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        self._num_given += len(text) - keep
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
