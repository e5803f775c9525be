"""Chat templates for members of a family that come without one."""

from farm.config import Manifest
from farm.data.chat import TEXT_TEMPLATE, read_template
from farm.sections import TargetSpec
from farm.store import local_copy


def with_templates(manifest: Manifest) -> Manifest:
    """The manifest with a template for every target that has neither prompts nor one: its prompts are plain texts."""
    return manifest.model_copy(update={"targets": tuple(map(_with_template, manifest.targets))})


def base_spec(manifest: Manifest, name: str) -> TargetSpec:
    """The base as a target of that name, which need be none that a target can have.

    It answers by the template that the targets have where its tokenizer has none, else by that of plain texts.
    """
    spec = TargetSpec.model_construct(name=name, model=manifest.base, prompts="")
    if _own_template(spec.model) != "":
        return spec
    theirs = {template for template in map(_template_of, manifest.targets) if template}
    shared = theirs.pop() if len(theirs) == 1 else TEXT_TEMPLATE
    return spec.model_copy(update={"chat_template": shared})


def _with_template(spec: TargetSpec) -> TargetSpec:
    if spec.prompts or spec.chat_template is not None or _own_template(spec.model) != "":
        return spec
    return spec.model_copy(update={"chat_template": TEXT_TEMPLATE})


def _template_of(spec: TargetSpec) -> str | None:
    if spec.chat_template is None:
        return _own_template(spec.model)
    try:
        return read_template(spec.chat_template)
    except ValueError:
        return None  # the plan refuses the target with its reason


def _own_template(model: str) -> str | None:
    """That of a model's tokenizer, empty if it has none; None where there is no tokenizer to be read."""
    from farm.target.load import load_tokenizer

    try:
        # What is no file here would be asked for elsewhere.
        return str(load_tokenizer(model).chat_template or "") if local_copy(model).exists() else None
    except (OSError, ValueError):
        return None  # whoever loads the model says why
