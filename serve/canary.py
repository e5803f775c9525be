"""Which requests a canary gets, and whether it is worse than the live version: an anytime-valid test.

Unit: one finished request and its tau, emitted tokens / verification rounds, in [1, k + 1]. Rounds of one request are
correlated, so they are not counted one by one; nor are the choices of one that asks for several (`n`): the first alone
stands for it, and no request is in two blocks. Requests are assigned by a hash of their id: given the requests of a
block, in whatever order and from whomever they came, which of them went to the canary is chance. What is assumed: that
assignment does not change which requests come, nor which of them finish.

Requests are taken in blocks of fixed size, as they finish. Block i gives D_i = (1 - r) Y_i - X_i, where X_i and Y_i
are the means of tau over its canary's and its live version's requests; a block without one of them says nothing. Under
H0, the canary loses no more than the share r of the live tau, E[D_i | the past] <= 0, so

    W_n(l) = prod_i (1 + l D_i),   0 <= l < 1 / (k + r)     (D_i >= (1 - r) - (k + 1) = -(k + r))

is a nonnegative supermartingale that starts at 1, and so is its mean over a fixed set of bets l. By Ville's inequality
it ever reaches 1 / alpha with probability alpha at most: it may be looked at after every request.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024, arXiv
2010.09686): the capital process of bets, and the mean over several bets as a mixture.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

BETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.9)  # shares of the largest bet that cannot lose everything


@dataclass
class Arm:
    """What the requests of one version came to, over all blocks."""

    requests: int = 0
    rounds: int = 0
    emitted: int = 0

    @property
    def tau(self) -> float:
        """Emitted tokens a round, a ratio of sums; nan before the first round."""
        return self.emitted / self.rounds if self.rounds else math.nan


class WorseTest:
    """Evidence that a canary's tau is below (1 - margin) times the live version's.

    Args:
        share: of the requests that go to the canary; sets the size of a block.
        most_drafted: k, the most tokens that a round drafts.
        margin: r, the share of the live tau that a canary may lose.
        alpha: bound of the probability that a canary which does not lose more is ever called worse.
    """

    def __init__(self, share: float, most_drafted: int, margin: float, alpha: float) -> None:
        self._settings = (share, most_drafted, margin, alpha)
        self.live, self.canary = Arm(), Arm()
        self.block_size = max(2, math.ceil(1 / min(share, 1 - share)))
        self.threshold = 1 / alpha
        self.e_value = 1.0  # the largest so far: what was once enough stays enough
        self._margin = margin
        self._bets = [bet / (most_drafted + margin) for bet in BETS]
        self._capitals = [1.0] * len(BETS)
        self._block: list[tuple[bool, float]] = []

    def again(self) -> WorseTest:
        """The same test without what it has seen."""
        return WorseTest(*self._settings)

    @property
    def is_worse(self) -> bool:
        return self.e_value >= self.threshold

    def add(self, *, is_canary: bool, emitted: int, rounds: int) -> None:
        """Takes one finished request; without a round it says nothing."""
        if not rounds:
            return
        arm = self.canary if is_canary else self.live
        arm.requests, arm.rounds, arm.emitted = arm.requests + 1, arm.rounds + rounds, arm.emitted + emitted
        self._block.append((is_canary, emitted / rounds))
        if len(self._block) == self.block_size:
            self._close()

    def _close(self) -> None:
        canary = [tau for is_canary, tau in self._block if is_canary]
        live = [tau for is_canary, tau in self._block if not is_canary]
        self._block = []
        if not canary or not live:
            return
        lost = (1 - self._margin) * sum(live) / len(live) - sum(canary) / len(canary)
        self._capitals = [
            capital * (1 + bet * lost) for capital, bet in zip(self._capitals, self._bets, strict=True)
        ]
        self.e_value = max(self.e_value, sum(self._capitals) / len(self._capitals))


def takes(version: str, share: float, request_id: str) -> bool:
    """Whether the canary `version` (target@version) gets this request: the same answer for the same id.

    The version is hashed too, so that a second canary is not tried on the same requests as the first.
    """
    digest = hashlib.blake2b(f"{version}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64
