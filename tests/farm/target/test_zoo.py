"""The embedded family: the same text from the same seed, ordinary folders, kept once made."""

import json
from pathlib import Path

import pytest

from farm.config import load_manifest
from farm.target import grammar, zoo
from farm.target.load import load_target

DOMAINS = {"base": grammar.general, **grammar.FULL, "lora": grammar.dialect(3)}


@pytest.mark.parametrize("name", DOMAINS)
def test_text_repeats_from_its_seed_and_prompts_are_distinct(name: str) -> None:
    pairs = grammar.pairs(DOMAINS[name], 300, seed=1)
    assert pairs == grammar.pairs(DOMAINS[name], 300, seed=1)
    assert pairs != grammar.pairs(DOMAINS[name], 300, seed=2)
    assert len({prompt for prompt, _ in pairs}) == len(pairs) >= 250


def test_dialects_of_different_seeds_speak_of_different_things() -> None:
    def products(seed: int) -> set[str]:
        return {
            prompt.split(" my ")[1].split()[0] for prompt, _ in grammar.pairs(grammar.dialect(seed), 80, 0)
        }

    assert len(products(1)) == len(products(2)) == 8
    assert len(products(1) & products(2)) <= 2


def test_every_answer_survives_the_tokenizer() -> None:
    tokenizer = zoo.train_tokenizer()
    for domain in DOMAINS.values():
        for _, answer in grammar.pairs(domain, 20, seed=5):
            assert tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False)) == answer


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "BASE", zoo.Recipe(1, 1e-3, 2))
    monkeypatch.setattr(zoo, "FULL", dict.fromkeys(grammar.FULL, zoo.Recipe(1, 1e-3, 2)))
    monkeypatch.setattr(zoo, "LORA", zoo.Recipe(1, 1e-3, 2))


@pytest.mark.usefixtures("one_step")
def test_the_zoo_is_an_ordinary_family_and_a_second_call_trains_only_what_is_missing(tmp_path: Path) -> None:
    manifest = load_manifest(zoo.build_zoo(tmp_path, num_lora=2))
    assert [target.name for target in manifest.targets] == ["math", "code", "clinical", "lora0", "lora1"]
    for spec in manifest.targets:
        assert load_target(spec).forward.hidden_size == 128
        rows = [json.loads(line) for line in Path(spec.prompts).read_text().splitlines()]
        assert len({row["prompt"] for row in rows}) == len(rows) > manifest.evaluate.prompts
    weights = tmp_path / "math" / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "code" / "config.json").unlink()  # as after a kill while it was being saved
    trained: list[str] = []
    zoo.build_zoo(tmp_path, num_lora=2, progress=lambda what, _step, _of: trained.append(what))
    assert trained == ["code"]
    assert weights.read_bytes() == before
