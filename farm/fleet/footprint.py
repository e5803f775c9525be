"""What the features of a regeneration take: bytes in the store, in Ray's object store, and of what Ray spilled."""

from dataclasses import dataclass, field

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from farm.fleet.answers import AnswersJob

MIB = 2**20


@dataclass(frozen=True)
class Held:
    """Bytes of features in the store, and of Ray's object store and its spill beyond what they held at the start."""

    store: int = 0
    objects: int = 0
    spilled: int = 0

    @property
    def total(self) -> int:
        return self.store + self.objects + self.spilled


@dataclass
class Footprint:
    """The largest sum that was seen, looked at whenever a shard is done; features themselves never cross Ray."""

    budget: int  # of all targets together
    held: int = 0  # by the store, from an earlier run too
    peak: Held = field(default_factory=Held)

    def __post_init__(self) -> None:
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self._objects, self._spilled = self._of_ray()

    @classmethod
    def of(cls, jobs: list[AnswersJob], held: int) -> "Footprint":
        """`held` are the bytes of features that the store has already."""
        return cls(sum(job.feature_bytes * job.num_shards for job in jobs), held)

    def add(self, feature_bytes: int) -> None:
        """Features were written to the store."""
        self.held += feature_bytes
        objects, spilled = self._of_ray()
        now = Held(self.held, max(0, objects - self._objects), max(0, spilled - self._spilled))
        self.peak = max(self.peak, now, key=lambda held: held.total)

    def line(self) -> str:
        """For the log."""
        of_ray = (
            f"{self.peak.objects / MIB:.1f} MiB in Ray's object store, {self.peak.spilled / MIB:.1f} spilled"
        )
        return (
            f"features: at most {self.peak.total / MIB:.1f} MiB held, of {self.budget / MIB:,.1f} allowed "
            f"({self.peak.store / MIB:.1f} in the store, {of_ray})"
        )

    def _of_ray(self) -> tuple[int, int]:
        stats = get_memory_info_reply(self._state).store_stats
        return int(stats.object_store_bytes_used), int(stats.spilled_bytes_total)
