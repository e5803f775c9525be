"""Results say which family they are of."""

from pathlib import Path

import pytest

from farm.cli.results import family_name


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        (".farm/zoo/manifest.yaml", "zoo"),
        ("jobs/recipes/smollm2.yaml", "smollm2"),
        ("/data/legal/manifest.yml", "legal"),
    ],
)
def test_a_family_is_called_by_its_manifest_or_by_the_folder_of_it(manifest: str, name: str) -> None:
    assert family_name(Path(manifest)) == name


def test_a_manifest_in_the_working_directory_is_called_by_that_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    assert family_name(Path("manifest.yaml")) == "own"
