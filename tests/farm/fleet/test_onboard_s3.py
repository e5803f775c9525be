"""The whole farm on an S3 store: only the manifest's `store:` differs, and `model:`, `prompts:` may be there too."""

from pathlib import Path
from typing import Any

import pytest

from farm.fleet.onboard import exit_code, onboard
from farm.registry import Registry
from farm.store import open_store
from tests.farm.fleet.family import Family
from tests.farm.fleet.test_onboard import count_remote_work
from tests.s3_server import SECRET_KEY

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]


def test_a_target_is_onboarded_found_again_and_served_from_s3(
    ray_cluster: object, family: Family, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.family import Family as Served

    store = open_store(s3_uri)
    manifest = family.manifest("alpha", store=tmp_path / "unused", trunk=False)
    (spec,) = manifest.targets
    for file in (*Path(spec.model).iterdir(), Path(spec.prompts)):
        store.put_file(f"models/{file.parent.name}/{file.name}", file)
    models = f"{s3_uri}/models"
    there = spec.model_copy(
        update={
            "model": f"{models}/alpha",
            "prompts": f"{models}/{Path(spec.prompts).parent.name}/alpha.jsonl",
        }
    )
    manifest = manifest.model_copy(update={"store": s3_uri, "targets": (there,)})
    lines: list[str] = []

    report, folder = onboard(manifest, lines.append)
    (row,) = report.targets
    assert row.decision == "promoted", row
    assert folder.startswith(f"{s3_uri}/runs/")
    assert not (tmp_path / "unused").exists()
    assert not [key for key in store.list("train/") if "checkpoint" in key]  # optimizer states serve nobody
    live = Registry(store).live("alpha")
    assert live is not None
    for key in ("trunk_digest", "tokenizer_digest", "vocabulary_digest", "config_digest", "answers_key"):
        assert live.card[key]

    started = count_remote_work(monkeypatch)
    again, _ = onboard(manifest, lines.append)
    assert started == []
    assert exit_code(again) == 0

    served = Served(s3_uri)
    (target,) = served.targets()
    assert served.draft(target, served.live("alpha")).version == "v1"
    texts: list[Any] = [
        *lines,
        *(store.get(key) for key in store.list("") if key.endswith((".json", ".html"))),
    ]
    assert not [text for text in texts if SECRET_KEY in str(text)]
