"""The raw tree of a manifest before it is checked: overrides, `${name}` placeholders, paths made absolute."""

import importlib.util
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

from farm.errors import UserError

_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PACKAGE = "package:"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_DATASET = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def read_tree(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError if it cannot be read or is none."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); give the path of a manifest.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML ({error}); correct that line") from error
    if not isinstance(tree, dict):
        raise UserError("must be a mapping with base, store and targets")
    return tree


def split_overrides(texts: Sequence[str], fields: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`a.b=value` and `field=value` on one side, values of placeholders on the other; a later one wins."""
    settings: dict[str, str] = {}
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"override {text!r} is not name=value; write for instance evaluate.k=3")
        if "." in name or name in fields:
            settings[name] = value
        else:
            values[name] = _from_here(value)
    return settings, values


def _from_here(value: str) -> str:
    """A path typed on a command line counts from the working directory, unlike one in the manifest."""
    looks_like_path = "/" in value or value.startswith((".", "~"))
    path = Path(value).expanduser()
    return str(path.resolve()) if looks_like_path and path.exists() else value


def set_fields(tree: dict[str, Any], settings: Mapping[str, str]) -> None:
    """Set `a.b=value` overrides in place; the values are YAML, list positions are numbers."""
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        node: Any = tree
        for part in parents:
            node = _child(node, part, name)
        if isinstance(node, list):
            node[_index(node, leaf, name)] = _typed(value, name)
        else:
            node[leaf] = _typed(value, name)


def _child(node: Any, part: str, name: str) -> Any:
    child = node[_index(node, part, name)] if isinstance(node, list) else node.setdefault(part, {})
    if child is None and isinstance(node, dict):  # an empty section
        child = node[part] = {}
    if not isinstance(child, dict | list):
        raise UserError(f"override {name}: {part} is a value, not a section; name one of its parents")
    return child


def _index(node: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(
            f"override {name}: {part!r} is no position in a list of {len(node)}; use 0..{len(node) - 1}"
        )
    return int(part)


def _typed(value: str, name: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {name}: {value!r} is not a YAML value; quote it") from error


def fill_placeholders(tree: dict[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """Put `values` in place of every `${name}`; UserError where one or the other is missing."""
    used: set[str] = set()
    filled = {key: _fill_node(node, values, used, str(key)) for key, node in tree.items()}
    if unused := sorted(values.keys() - used):
        raise UserError(
            f"override {unused[0]!r} is neither a field nor a ${{{unused[0]}}} of this manifest; check it"
        )
    return filled


def _fill_node(node: Any, values: Mapping[str, str], used: set[str], field: str) -> Any:
    if isinstance(node, dict):
        return {key: _fill_node(value, values, used, f"{field}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_fill_node(value, values, used, f"{field}.{index}") for index, value in enumerate(node)]
    if not isinstance(node, str):
        return node
    names = set(_PLACEHOLDER.findall(node))
    if missing := sorted(names - values.keys()):
        raise UserError(f"{field}: ${{{missing[0]}}} has no value; add --set {missing[0]}=VALUE")
    used |= names
    whole = _PLACEHOLDER.fullmatch(node)
    return (
        _typed(values[whole[1]], field) if whole else _PLACEHOLDER.sub(lambda match: values[match[1]], node)
    )


def package_file(value: str, field: str) -> Path:
    """The file that `package:NAME/FILE` means: one that an installed Python package ships."""
    name, _, file = value.removeprefix(_PACKAGE).partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{field}: {value!r}: no package {name!r} is installed; install it with pip")
    path = Path(found.submodule_search_locations[0]) / file
    if ".." in Path(file).parts or not path.is_file():
        raise UserError(f"{field}: {value!r}: {path} does not exist; give a file that the package ships")
    return path


def model_path(value: str, folder: Path | None = None) -> str:
    """A model named on the command line, resolved as a manifest in `folder` (the working directory) would."""
    return PathResolver(folder or Path.cwd(), in_job=False).model(value, "--base", must_exist=True)


class PathResolver:
    """Turns the paths of a dumped manifest into absolute ones; `folder` is the manifest's."""

    def __init__(self, folder: Path, in_job: bool) -> None:
        self.folder, self.in_job = folder, in_job

    def resolve(self, tree: dict[str, Any]) -> dict[str, Any]:
        tree["store"] = self._store(tree["store"])
        tree["base"] = self.model(tree["base"], "base", must_exist=True)
        if tree["trunk"] is not None:
            tree["trunk"] = self.model(tree["trunk"], "trunk", must_exist=True)
        if tree["train_trunk"]["prompts"] is not None:
            tree["train_trunk"]["prompts"] = self._prompts(
                tree["train_trunk"]["prompts"], "train_trunk.prompts"
            )
        if tree["serve"]["keys"] is not None:
            tree["serve"]["keys"] = str(self._absolute(tree["serve"]["keys"], "serve.keys"))
        for index, target in enumerate(tree["targets"]):
            field = f"targets.{index} ({target['name']})"
            target["model"] = self.model(target["model"], f"{field}.model", must_exist=False)
            if target["lora"] is not None:
                target["lora"] = self.model(target["lora"], f"{field}.lora", must_exist=False)
            if target["prompts"]:
                target["prompts"] = self._prompts(target["prompts"], f"{field}.prompts")
            target["chat_template"] = self._template(target["chat_template"], f"{field}.chat_template")
        return tree

    def _store(self, value: str) -> str:
        if "://" in value and not value.startswith("file://"):
            return value
        return self._absolute(value, "store").as_uri()

    def model(self, value: str, field: str, *, must_exist: bool) -> str:
        if value.startswith(_PACKAGE):
            return str(package_file(value, field))
        if "://" in value and not value.startswith("file://"):
            return value
        if _HUB_ID.match(value) and not (self.folder / value).parent.exists():
            return value  # organisation/name on the hub
        path = self._absolute(value, field)
        if must_exist and not path.exists():
            raise UserError(f"{field}: {path} does not exist; give the path of a checkpoint{_or_here(value)}")
        return str(path)

    def _absolute(self, value: str, field: str) -> Path:
        path = Path(unquote(urlparse(value).path) if value.startswith("file://") else value).expanduser()
        if path.is_absolute():
            return path.resolve()
        if self.in_job:
            raise UserError(
                f"{field}: {value!r} is relative, but a job's working directory is a temporary copy; "
                "give an absolute path or URI"
            )
        return (self.folder / path).resolve()

    def _prompts(self, value: str, field: str) -> str:
        if "://" in value and not value.startswith("file://"):
            return value
        # prompts travel with a job's working directory: a relative path is fine there
        path = (self.folder / Path(value.removeprefix("file://")).expanduser()).resolve()
        if path.exists():
            return str(path)
        if path.suffix in {".json", ".jsonl", ".parquet"} or not _HUB_DATASET.match(value):
            wanted = "give a .jsonl or .parquet file, a folder or a hub id"
            raise UserError(f"{field}: {path} does not exist; {wanted}{_or_here(value)}")
        return value

    def _template(self, value: str | None, field: str) -> str | None:
        if value is None or "{" in value:
            return value
        path = (self.folder / Path(value).expanduser()).resolve()
        if not path.is_file():
            raise UserError(f"{field}: {path} does not exist; give a jinja file or the template's text")
        return str(path)


def _or_here(value: str) -> str:
    """What else a path may have meant that counts from the manifest's folder, and is not there."""
    here = Path(value).absolute()
    return (
        f"; if {here} is meant, write that: paths count from the manifest's folder" if here.exists() else ""
    )
