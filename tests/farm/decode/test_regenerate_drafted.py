"""Drafted greedy answers are those of plain decoding, token for token, and sampled ones are not touched at all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farm.data.features import Answer
from farm.data.prompts import Prompt
from farm.decode.control import Fixed, RoundResult
from farm.decode.regenerate import MOST_DRAFTED, Speculation, regenerate_rows
from farm.decode.renewal import Cost
from farm.draft.config import DraftConfig
from farm.draft.model import Draft, new_draft
from farm.sections import RegenerateSettings, TargetSpec
from farm.target import zoo
from farm.target.load import LoadedTarget, load_target
from farm.target.lora import open_beside
from tests.farm.decode.family import write_lora
from tests.farm.models import tiny_model

SETTINGS = RegenerateSettings(max_new_tokens=40, batch_rows=4, greedy_share=0.6)


class Watched(Fixed):
    """Drafts as many tokens as it can, and keeps what every round came to."""

    observes = True

    def __init__(self) -> None:
        super().__init__(MOST_DRAFTED)
        self.rounds: list[RoundResult] = []

    def observe(self, result: RoundResult) -> None:
        self.rounds.append(result)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    folder: Path = tmp_path_factory.mktemp("target")
    zoo.save(tiny_model(vocab=1024), zoo.train_tokenizer(), folder)
    return load_target(TargetSpec(name="t", model=str(folder)))


def repeating(target: LoadedTarget) -> Draft:
    """Guesses that the target will say once more what it said last: right where it loops, as random weights do."""
    draft = new_draft(DraftConfig.for_base(target.config), seed=1).requires_grad_(False)
    size = draft.config.hidden_size
    draft.trunk.fc.weight.copy_(torch.cat((torch.zeros(size, size), torch.eye(size)), dim=1))
    for part in (draft.trunk.o_proj, draft.trunk.shared_expert.down_proj, draft.expert.down_proj):
        part.weight.zero_()
    return draft


def stranger(target: LoadedTarget) -> Draft:
    return new_draft(DraftConfig.for_base(target.config), seed=1, std=0.3).requires_grad_(False)


def prompts() -> list[Prompt]:
    """Some of them conversations, so that a turn is answered behind one that was drafted."""
    rows = []
    for i in range(14):
        turns = [{"role": "user", "content": f"tell {i} stories"}]
        if i % 3 == 0:
            turns += [{"role": "assistant", "content": "no"}, {"role": "user", "content": f"and {i} more"}]
        rows.append(Prompt(i, f"id{i}", tuple(turns), None))
    return rows


def told(answers: Sequence[Answer]) -> list[Answer]:
    """All but the features."""
    return [replace(answer, features=None) for answer in answers]


@pytest.mark.parametrize("make", [repeating, stranger])
def test_answers_seeds_and_ends_are_those_of_plain_decoding(
    target: LoadedTarget, make: Callable[[LoadedTarget], Draft]
) -> None:
    control = Watched()
    plain = regenerate_rows(target, prompts(), SETTINGS)
    drafted = regenerate_rows(target, prompts(), SETTINGS, speculation=Speculation(make(target), control))
    assert {answer.temperature for answer in plain} == {0.0, SETTINGS.temperature}
    assert told(drafted) == told(plain)
    for one, other in zip(drafted, plain, strict=True):
        assert one.features is not None
        assert other.features is not None
        torch.testing.assert_close(one.features.float(), other.features.float(), atol=0.05, rtol=0.02)
    drafting = [result for result in control.rounds if any(result.drafted)]
    assert drafting
    accepted = sum(sum(result.accepted) for result in drafting)
    assert accepted > 20 if make is repeating else accepted < 20


def test_rows_that_are_sampled_draft_nothing(target: LoadedTarget) -> None:
    control = Watched()
    sampled = SETTINGS.model_copy(update={"greedy_share": 0.0})
    plain = regenerate_rows(target, prompts(), sampled)
    drafted = regenerate_rows(target, prompts(), sampled, speculation=Speculation(repeating(target), control))
    assert told(drafted) == told(plain)
    assert control.rounds
    assert not any(any(result.drafted) for result in control.rounds)


def test_the_cost_control_may_do_what_it_likes_from_shard_to_shard(target: LoadedTarget) -> None:
    speculation = Speculation(repeating(target))
    assert isinstance(speculation.control, Cost)
    for start in range(0, 14, 7):
        shard = prompts()[start : start + 7]
        plain = regenerate_rows(target, shard, SETTINGS)
        assert told(regenerate_rows(target, shard, SETTINGS, speculation=speculation)) == told(plain)


def test_a_lora_beside_its_checkpoint_is_drafted_for_as_itself(tmp_path: Path) -> None:
    model = tiny_model(vocab=1024)
    zoo.save(model, zoo.train_tokenizer(), tmp_path / "base")
    write_lora(tmp_path / "lora", model, rank=3, seed=0)
    spec = TargetSpec(name="a", model=str(tmp_path / "base"), lora=str(tmp_path / "lora"))
    beside = open_beside(spec, load_target(spec.model_copy(update={"lora": None})))
    assert beside is not None
    plain = regenerate_rows(beside, prompts(), SETTINGS)
    control = Watched()
    drafted = regenerate_rows(
        beside, prompts(), SETTINGS, speculation=Speculation(repeating(beside), control)
    )
    assert told(drafted) == told(plain)
    assert any(any(result.drafted) for result in control.rounds)
