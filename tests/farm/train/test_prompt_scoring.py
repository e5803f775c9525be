"""Prompts are chosen by what both models make of them, before any answer: scores, who is left out, the fraction."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farm.config import UserError
from farm.data.prompts import Prompt
from farm.data.select import Moments, Whitening, mahalanobis, shift
from farm.layers.cache import Rows
from farm.sections import RegenerateSettings, SelectSettings, Strategy, TargetSpec
from farm.target import zoo
from farm.target.load import LoadedTarget, load_target
from farm.train import prompt_scoring
from farm.train.prompt_scoring import select_prompt_rows
from farm.train.scoring import PromptTask, Selection
from tests.farm.models import tiny_model

NUM_ROWS = 24
CHANGED = frozenset(range(0, NUM_ROWS, 4))
SAID = ["tell me a story of the hen", "count to ten", "how is the weather", "say it again and again"]
TOO_LONG = "fox " * 400


def prompt(row: int, text: str) -> Prompt:
    return Prompt(row, f"id-{row}", ({"role": "user", "content": text},), None)


def prompts() -> tuple[Prompt, ...]:
    """Those of CHANGED have a word that the target reads in another way than the base."""
    texts = [f"{SAID[row % 3]} {row}{' fox' if row in CHANGED else ''}" for row in range(NUM_ROWS)]
    return tuple(prompt(row, text) for row, text in enumerate(texts))


class Pair:
    """A base, and a target in which a single embedding differs."""

    def __init__(self, root: Path) -> None:
        model, tokenizer = tiny_model(vocab=1024), zoo.train_tokenizer()
        zoo.save(model, tokenizer, root / "base")
        without, with_it = (set(tokenizer(text)["input_ids"]) for text in ("9", "9 fox"))
        model.get_input_embeddings().weight[sorted(with_it - without)] *= -1.0
        zoo.save(model, tokenizer, root / "target")
        self.base, self.target = (
            TargetSpec(name=name, model=str(root / name)) for name in ("base", "target")
        )

    def task(
        self, strategy: Strategy, given: Sequence[Prompt] | None = None, **settings: object
    ) -> PromptTask:
        asked = SelectSettings.model_validate(
            {"strategy": strategy, "before": True, "fraction": 0.25, "exact": True, **settings}
        )
        return PromptTask(
            settings=asked, regenerate=RegenerateSettings(), base=self.base, target=self.target,
            dtype="float32", prompts=tuple(given or prompts()), origins={},
        )  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    for name in ("base", "target"):
        (root / name).mkdir()
    return Pair(root)


def scores(selection: Selection) -> dict[int, float]:
    return {row.row: row.score for row in selection.scored}


def phi(loaded: LoadedTarget, text: str, skipped: int) -> Tensor:
    """Mean state behind the first `skipped` tokens, one prompt at a time; every token is read."""
    messages = [{"role": "user", "content": text}]
    ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    states_TH = loaded.forward.forward(torch.tensor([ids]), Rows([0]), loaded.forward.new_cache(1, len(ids)))[
        0
    ]
    return states_TH.bfloat16().float()[skipped:].mean(dim=0)


def test_shift_chooses_the_prompts_that_the_target_reads_in_another_way(pair: Pair) -> None:
    done: list[tuple[int, int]] = []
    selection = select_prompt_rows(pair.task("shift"), lambda *rows: done.append(rows))
    assert selection.rows == CHANGED
    assert selection.realised_fraction == 0.25
    unchanged = [score for row, score in scores(selection).items() if row not in CHANGED]
    assert max(unchanged) < 1e-3 < min(scores(selection)[row] for row in CHANGED)
    assert done[-1] == (NUM_ROWS, NUM_ROWS)


@pytest.mark.parametrize("strategy", ["shift", "mahalanobis"])
def test_scores_are_those_of_the_definition_however_rows_are_batched(
    pair: Pair, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_scoring, "BLOCK_ROWS", 5)
    found = scores(select_prompt_rows(pair.task(strategy)))
    base, target = load_target(pair.base), load_target(pair.target)
    texts = [one.messages[0]["content"] for one in prompts()]
    opening = base.tokenizer("<|user|>")["input_ids"]
    rendered = base.tokenizer.apply_chat_template([{"role": "user", "content": "9"}], tokenize=False)
    assert rendered.startswith("<|user|>"), "what all prompts begin with"
    base_NH, target_NH = (
        torch.stack([phi(one, text, len(opening)) for text in texts]) for one in (base, target)
    )
    whitening = Whitening.of(Moments.of(base_NH))
    both = shift(target_NH, base_NH, whitening), mahalanobis(target_NH, whitening)
    expected = both[strategy == "mahalanobis"].tolist()
    assert [found[row] for row in range(NUM_ROWS)] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_what_all_prompts_begin_with_weighs_nothing(pair: Pair) -> None:
    """The changed word in a system prompt changes every prompt's mean alike, the shorter the prompt the more."""
    system = {"role": "system", "content": "fox"}
    begun = tuple(replace(one, messages=(system, *one.messages)) for one in prompts())
    openings, found = prompt_scoring._read_by_target(pair.task("shift", begun), None)
    shared = prompt_scoring._shared_tokens(openings)
    assert shared > 1
    assert min(len(ids) for ids in openings.values()) > shared
    capture = prompt_scoring.Recapture.of(pair.target, "float32")
    (states_TH,) = capture([[*openings[1], 0]])
    torch.testing.assert_close(found[1], states_TH[shared:].float().mean(dim=0))


def test_one_prompt_alone_keeps_a_token_of_its_own() -> None:
    assert prompt_scoring._shared_tokens({0: (1, 2, 3)}) == 2
    assert prompt_scoring._shared_tokens({0: (1, 2, 3), 1: (1, 2)}) == 1


@pytest.mark.parametrize("strategy", ["random", "mahalanobis", "shift"])
def test_a_prompt_that_cannot_be_answered_is_never_chosen(pair: Pair, strategy: Strategy) -> None:
    given = (prompt(0, TOO_LONG), *prompts()[1:])
    selection = select_prompt_rows(pair.task(strategy, given, fraction=1.0))
    assert selection.rows == frozenset(range(1, NUM_ROWS))
    assert len(selection.scored) == NUM_ROWS


def test_none_that_can_be_answered_is_an_error_with_the_reason(pair: Pair) -> None:
    with pytest.raises(UserError, match="target: none of its 2 prompts can be answered: .* leave no room"):
        select_prompt_rows(pair.task("shift", [prompt(0, TOO_LONG), prompt(1, TOO_LONG)]))


def test_a_random_choice_reads_no_prompt_and_follows_from_ids_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a prefill")

    monkeypatch.setattr(prompt_scoring, "_phi", forbidden)
    first, again, other = (
        select_prompt_rows(pair.task("random", given, seed=seed)).rows
        for given, seed in ((prompts(), 0), (prompts()[::-1], 0), (prompts(), 1))
    )
    assert first == again != other
    assert len(first) == NUM_ROWS // 4
