"""A tiny family on disk that the whole fleet can run on: random checkpoints, prompts, a given trunk."""

import json
from pathlib import Path
from typing import Any

import torch

from farm.config import Manifest
from farm.draft.checkpoint import trunk_files
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.sections import TargetSpec
from farm.target import zoo

NUM_ROWS = 20
STAGES: dict[str, Any] = {
    "train_trunk": {"epochs": 1, "batch_rows": 8, "max_new_tokens": 8},
    "probe": {"prompts": 2, "max_new_tokens": 4},
    # What random weights say is as good as any.
    "regenerate": {"max_new_tokens": 8, "batch_rows": 8, "shard_rows": 4, "reject": ()},
    "adapt": {"epochs": 1, "batch_rows": 8, "save_every": 1},
    "evaluate": {
        "prompts": 4,
        "k": 2,
        "max_new_tokens": 8,
        "speed_prompts": 1,
        "speed_rounds": 5,
        "threads": 1,
        "min_gain": -9.0,
    },
}


class Family:
    """Checkpoints below one folder; `manifest(...)` is a manifest of some of its targets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = zoo.train_tokenizer()
        self.base = root / "base"
        config = self._checkpoint(self.base)
        draft = new_draft(DraftConfig.for_base(config), seed=7)
        self.trunk = root / "given-trunk"
        self.trunk.mkdir()
        files = trunk_files(draft.config, draft.trunk.state_dict(), draft.expert.state_dict(), None)
        for name, data in files.items():
            (self.trunk / name).write_bytes(data)

    def _checkpoint(self, folder: Path, hidden_size: int = 64) -> Any:
        model = zoo.new_model(self.tokenizer, num_layers=2, hidden_size=hidden_size)
        generator = torch.Generator().manual_seed(sum(folder.name.encode()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        folder.mkdir()
        zoo.save(model, self.tokenizer, folder)
        return model.config

    def target(self, name: str, hidden_size: int = 64) -> TargetSpec:
        """A target with its own weights and prompts, made when it is first asked for."""
        folder, prompts = self.root / name, self.root / f"{name}.jsonl"
        if not folder.exists():
            self._checkpoint(folder, hidden_size)
            lines = [json.dumps({"id": f"{name}-{i}", "prompt": f"say {name} {i}"}) for i in range(NUM_ROWS)]
            prompts.write_text("\n".join(lines) + "\n")
        return TargetSpec(name=name, model=str(folder), prompts=str(prompts))

    def manifest(self, *names: str, store: Path, trunk: bool = True, **stages: Any) -> Manifest:
        """A manifest of the targets `names`; `stages` override single settings of a stage."""
        tree = {name: {**settings, **stages.get(name, {})} for name, settings in STAGES.items()}
        tree |= {name: value for name, value in stages.items() if name not in STAGES}
        return Manifest(
            base=str(self.base),
            trunk=str(self.trunk) if trunk else None,
            store=store.as_uri(),
            targets=tuple(self.target(name) for name in names),
            **tree,
        )
