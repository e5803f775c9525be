"""What the documentation names exists: files, functions, manifest fields with their defaults, commands."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from farm.config import Manifest
from farm.sections import AdaptSettings, Dtype

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("farm", "jobs", "serve", "tests", "docs")
NAMED = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_spans(page: Path) -> Iterator[str]:
    """Inline code and the lines of code blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def resolves(name: str) -> bool:
    """Whether a module or object stands behind a dotted name; a module that fails to import raises."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_a_name_that_is_nowhere_does_not_resolve() -> None:
    """Else the check of dotted names below would pass whatever the pages say."""
    assert resolves("farm.config.Manifest.model_fields")
    assert not resolves("farm.config.Nothing")
    assert not resolves("farm.nowhere")


@NAMED
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@NAMED
def test_every_path_in_code_exists(page: Path) -> None:
    pattern = rf"(?<![\w./<-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w(?:\.\w+)?"
    paths = {path for span in code_spans(page) for path in re.findall(pattern, span)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@NAMED
def test_every_dotted_name_exists(page: Path) -> None:
    pattern = r"(?<![\w./@-])(?:farm|jobs)\.[a-z]\w*(?:\.[A-Za-z_]\w*)*(?![\w/])|serve\.app:build"
    names = {name for span in code_spans(page) for name in re.findall(pattern, span)}
    assert [name for name in sorted(names) if not resolves(name.replace(":", "."))] == []


@NAMED
def test_every_manifest_field_exists(page: Path) -> None:
    sections = "|".join(name for name, field in Manifest.model_fields.items() if is_section(field.annotation))
    pattern = rf"(?<![\w./])(?:{sections})(?:\.[a-z_]+)+(?![\w(:./])"
    names = {name for span in code_spans(page) for name in re.findall(pattern, span)}
    for name in sorted(names):
        is_file = name.endswith(".py") or (ROOT / f"{name.replace('.', '/')}.py").exists()
        if is_file:
            continue
        section: type[BaseModel] | None = Manifest
        for part in name.split("."):
            assert section is not None, f"{page.name}: {name}"
            assert part in section.model_fields, f"{page.name}: {name}"
            section = section_of(section.model_fields[part].annotation)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: alone, or null, or a list of them."""
    return next((one for one in (annotation, *get_args(annotation)) if is_section(one)), None)


def fields_with_defaults(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Every field below a section, by its path, with its default as YAML. A section that is always there is none."""
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        if not is_section(field.annotation):
            yield f"{path}{name}", written(field)
        if below is not None:
            yield from fields_with_defaults(below, f"{path}{name}.")


def written(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def documented_fields() -> list[tuple[str, str]]:
    """The rows of docs/manifest.md, once for each section that the heading above them names."""
    found, sections = [], [""]
    for line in (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            sections = [f"{name}." for name in re.findall(r"`([a-z_.]+)`", line)] or [""]
        elif row := re.match(r"\| `([a-z_]+)` \| ([^|]+) \| [^|]*\w[^|]*\|$", line):
            found += [(f"{section}{row[1]}", row[2].strip("`")) for section in sections]
    return found


def test_the_page_of_the_manifest_has_every_field_and_its_default() -> None:
    assert sorted(documented_fields()) == sorted(fields_with_defaults(Manifest))


def test_a_new_field_and_another_default_are_not_on_the_page_of_the_manifest() -> None:
    """Else the test above would pass whatever the page says."""

    class Adapt(AdaptSettings):
        rank: int = 17

    class Changed(Manifest):
        dtype: Dtype = "float32"
        more: tuple[float, ...] = (0.5,)
        adapt: Adapt = Adapt()

    new = set(fields_with_defaults(Changed)) - set(documented_fields())
    assert new == {("dtype", "float32"), ("more", "[0.5]"), ("adapt.rank", "17")}


def test_the_manifest_of_the_quickstart_is_valid() -> None:
    """As it stands, and with what a machine with GPUs adds to it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    small, on_gpus = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    assert "resources" not in small
    manifest = Manifest.model_validate(small | on_gpus)
    assert [(target.name, target.lora is None) for target in manifest.targets] == [
        ("legal", True),
        ("support", False),
    ]
    resources = manifest.resources
    each = (resources.regenerate.num_gpus, resources.adapt.gpus_per_worker, resources.serve.num_gpus)
    assert all(each)


@NAMED
def test_every_command_of_the_command_line_exists(page: Path) -> None:
    from typer.main import get_command

    from farm.cli.main import app

    group: Any = get_command(app)
    for span in code_spans(page):
        for words in re.findall(r"(?:^|(?<=[\s/]))farm ((?:[a-z][a-z-]*\s?)+)", span):
            first, *rest = words.split()
            assert first in group.commands, f"{page.name}: farm {words}"
            nested = getattr(group.commands[first], "commands", None)
            if nested is not None and rest:
                assert rest[0] in nested, f"{page.name}: farm {words}"


def layout() -> list[str]:
    """The paths of the tree in docs/layout.md, folders without their slash."""
    section = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    block = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert block is not None
    above: list[str] = []
    paths = []
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        above = [*above[: len(indent) // 2], name.rstrip("/")]
        paths.append(str(PurePosixPath(*above)))
    return paths


def test_the_tree_of_the_readme_is_the_tree() -> None:
    named = set(layout())
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    modules = (path for folder in ("farm", "jobs", "serve") for path in (ROOT / folder).rglob("*.py"))
    present = {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}
    assert sorted(present - named) == [], "give each of these a line in docs/layout.md"
