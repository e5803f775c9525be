"""Who answers by which chat template where a checkpoint brings none: a base often does not."""

from pathlib import Path

import pytest

from farm.config import Manifest
from farm.data.chat import TEXT_TEMPLATE
from farm.evaluate.published import spec_of
from farm.evaluate.templates import base_spec, with_templates
from farm.sections import TargetSpec
from farm.target import zoo
from farm.target.zoo import CHAT_TEMPLATE

OTHER = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers with a template, `chat`, and without, `text`."""
    root, tokenizer = tmp_path_factory.mktemp("tokenizers"), zoo.train_tokenizer()
    tokenizer.save_pretrained(root / "chat")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "text")
    return root


def family(folder: Path, base: str, **targets: tuple[str, str | None]) -> Manifest:
    """`targets` are tokenizers and the templates that the manifest gives; none but `bare` brings no prompts."""
    specs = tuple(
        TargetSpec(
            name=name,
            model=str(folder / model),
            chat_template=given,
            prompts="" if name == "bare" else "p.jsonl",
        )
        for name, (model, given) in targets.items()
    )
    return Manifest(base=str(folder / base), store=(folder / "store").as_uri(), targets=specs)


@pytest.mark.parametrize(
    ("base", "targets", "template"),
    [
        ("chat", {"a": ("text", OTHER)}, None),  # its own
        ("text", {"a": ("text", OTHER), "b": ("text", None)}, OTHER),
        ("text", {"a": ("chat", None), "b": ("text", CHAT_TEMPLATE)}, CHAT_TEMPLATE),
        ("text", {"a": ("chat", None), "b": ("text", OTHER)}, TEXT_TEMPLATE),
        ("text", {"a": ("text", None), "b": ("gone", None), "c": ("text", "gone.jinja")}, TEXT_TEMPLATE),
        ("gone", {"a": ("chat", None)}, None),
    ],
)
def test_a_base_without_a_template_has_that_of_its_targets(
    folder: Path, base: str, targets: dict[str, tuple[str, str | None]], template: str | None
) -> None:
    manifest = family(folder, base, **targets)
    assert base_spec(manifest, "(base)").chat_template == template
    assert spec_of(manifest, "base").chat_template == template


def test_only_a_target_without_prompts_and_template_has_that_of_plain_texts(folder: Path) -> None:
    manifest = family(
        folder, "chat", bare=("text", None), a=("text", None), b=("text", OTHER), c=("gone", None)
    )
    templates = [spec.chat_template for spec in with_templates(manifest).targets]
    assert templates == [TEXT_TEMPLATE, None, OTHER, None]
