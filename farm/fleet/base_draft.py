"""The base's draft in a regeneration actor: the trunk from the object store, the base's private expert from a file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from farm.artifacts import Artifact, Artifacts
from farm.fleet.stage_keys import EXPERT_FILE, TRUNK_FILE
from farm.store import local_copy

if TYPE_CHECKING:
    from farm.draft.config import DraftConfig
    from farm.draft.model import Draft
    from farm.target.model import TargetModel


@dataclass(frozen=True)
class BaseDraft:
    """Where any node finds it; trunk and expert are locations of a store."""

    revision: str  # of the trunk, see farm.fleet.trunk
    trunk: str
    expert: str
    config: "DraftConfig"

    @classmethod
    def of(cls, artifacts: Artifacts, trunk: Artifact) -> "BaseDraft":
        """That of a finished trunk."""
        from farm.draft.checkpoint import CONFIG_FILE, read_config

        folder = artifacts.path(trunk, CONFIG_FILE).parent
        weights, expert = (artifacts.location(trunk, name) for name in (TRUNK_FILE, EXPERT_FILE))
        return cls(trunk.key, weights, expert, read_config(folder))

    def open(self, like: "TargetModel") -> "Draft":
        """The draft on the device of a target and in its dtype; where that is the trunk's own, its pages stay shared.

        Raises UserError when a file does not fit the trunk's config.
        """
        from farm.draft.checkpoint import build_trunk, load_adapter
        from farm.draft.model import Draft
        from farm.fleet.trunk import open_trunk

        state, _ = open_trunk(self.revision, self.trunk)
        draft = Draft(build_trunk(self.config, state), *load_adapter(self.config, local_copy(self.expert)))
        return draft.to(like.device, like.dtype).requires_grad_(False)
