"""A target's answers: one a prompt, in order, reproducible; a prompt that cannot be answered is an error row."""

from pathlib import Path

import pytest
import torch

from farm.data.prompts import Prompt
from farm.decode.conversation import sampling_of
from farm.decode.regenerate import _prefill, prefill_rows, regenerate_rows
from farm.layers.cache import Rows
from farm.layers.kernels import available
from farm.sections import RegenerateSettings, TargetSpec
from farm.target import zoo
from farm.target.load import LoadedTarget, load_target
from farm.target.lora import open_beside
from tests.farm.decode.family import write_lora
from tests.farm.models import tiny_model

SETTINGS = RegenerateSettings(max_new_tokens=12, batch_rows=4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    folder: Path = tmp_path_factory.mktemp("target")
    zoo.save(tiny_model(vocab=1024), zoo.train_tokenizer(), folder)
    return load_target(TargetSpec(name="t", model=str(folder), prompts=""))


def prompts(num: int) -> list[Prompt]:
    return [
        Prompt(i, f"id{i}", ({"role": "user", "content": f"tell {i} stories"},), "a fox") for i in range(num)
    ]


def test_answers_come_in_order_and_again_the_same(target: LoadedTarget) -> None:
    first, second = (
        regenerate_rows(target, prompts(7), SETTINGS),
        regenerate_rows(target, prompts(7), SETTINGS),
    )
    assert [answer.row for answer in first] == list(range(7))
    assert [answer.answer_ids for answer in first] == [answer.answer_ids for answer in second]
    assert {answer.finish_reason for answer in first} <= {"stop", "length"}


def test_an_answer_does_not_depend_on_which_rows_share_its_batch(target: LoadedTarget) -> None:
    together = regenerate_rows(target, prompts(7), SETTINGS)
    assert regenerate_rows(target, prompts(7)[5:6], SETTINGS)[0].answer_ids == together[5].answer_ids


def test_features_belong_to_the_tokens_they_are_stored_with(target: LoadedTarget) -> None:
    for answer in regenerate_rows(target, prompts(3), SETTINGS):
        ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids][:-1]])
        expected = target.forward.forward(ids, Rows([0]), target.forward.new_cache(1, 128))[0]
        assert answer.features is not None
        torch.testing.assert_close(answer.features.float(), expected, atol=0.05, rtol=0.02)  # bf16


def test_a_prompt_longer_than_the_target_is_an_error_row_and_the_others_are_answered(
    target: LoadedTarget,
) -> None:
    rows = prompts(3)
    rows[1] = Prompt(1, "long", ({"role": "user", "content": "fox " * 400},), None)
    answers = regenerate_rows(target, rows, SETTINGS)
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, False]
    assert "prompt tokens leave no room" in (answers[1].error or "")


def test_the_greedy_share_follows_from_the_rows_id_alone() -> None:
    greedy = [sampling_of(prompt, SETTINGS).temperature == 0 for prompt in prompts(400)]
    assert 150 < sum(greedy) < 250
    assert sampling_of(prompts(5)[4], SETTINGS) == sampling_of(prompts(400)[4], SETTINGS)


def test_prefilled_answers_are_the_datasets_own_with_their_end_token(target: LoadedTarget) -> None:
    (answer,) = prefill_rows(target, prompts(1), SETTINGS)
    assert target.tokenizer.decode(list(answer.answer_ids)) == "a fox<|end|>"
    assert answer.finish_reason == "stop"
    assert answer.features is not None
    assert len(answer.features) == len(answer.prompt_ids) + len(answer.answer_ids) - 1


def test_prefilled_features_do_not_depend_on_which_rows_share_their_batch(target: LoadedTarget) -> None:
    rows = [
        Prompt(i, f"id{i}", ({"role": "user", "content": f"tell {i} stories"},), "fox " * (1 + 5 * (i % 3)))
        for i in range(7)
    ]
    for together, prompt in zip(prefill_rows(target, rows, SETTINGS), rows, strict=True):
        (alone,) = prefill_rows(target, [prompt], SETTINGS)
        assert (together.row, together.answer_ids) == (alone.row, alone.answer_ids)
        assert together.features is not None
        assert alone.features is not None
        tolerance = 0.02 if available() is None else 0.0  # kernels: a row's bits are its own
        torch.testing.assert_close(together.features, alone.features, atol=tolerance, rtol=tolerance)


def test_bfloat16_targets_answer_and_keep_their_features(tmp_path: Path) -> None:
    zoo.save(tiny_model(vocab=1024), zoo.train_tokenizer(), tmp_path)
    target = load_target(TargetSpec(name="t", model=str(tmp_path), prompts=""), dtype="bfloat16")
    assert target.forward.dtype == torch.bfloat16
    for answer in regenerate_rows(target, prompts(3), SETTINGS):
        assert answer.features is not None
        assert len(answer.features) == len(answer.prompt_ids) + len(answer.answer_ids) - 1


def test_a_lora_beside_its_checkpoint_answers_as_the_one_merged_into_it(tmp_path: Path) -> None:
    """So that regeneration may hold one checkpoint for all of its LoRAs."""
    model, tokenizer = tiny_model(vocab=1024), zoo.train_tokenizer()
    zoo.save(model, tokenizer, tmp_path / "base")
    write_lora(tmp_path / "lora", model, rank=3, seed=0)
    spec = TargetSpec(name="a", model=str(tmp_path / "base"), lora=str(tmp_path / "lora"), prompts="p")
    merged = load_target(spec, dtype="float32", device="cpu")
    checkpoint = load_target(spec.model_copy(update={"lora": None}), dtype="float32", device="cpu")
    beside = open_beside(spec, checkpoint)
    assert beside is not None
    assert beside.forward is checkpoint.forward
    settings = RegenerateSettings(max_new_tokens=6, greedy_share=1.0)
    told = [regenerate_rows(one, prompts(5), settings) for one in (beside, merged, checkpoint)]
    own, expected, plain = ([answer.answer_ids for answer in answers] for answers in told)
    assert own == expected != plain
    for answer, whole in zip(*told[:2], strict=True):
        assert answer.features is not None
        assert whole.features is not None
        torch.testing.assert_close(answer.features, whole.features, atol=2e-2, rtol=2e-2)
        again = dict(_prefill(beside, [[*answer.prompt_ids, *answer.answer_ids]], 4))[0]
        torch.testing.assert_close(again.to(answer.features.dtype), answer.features, atol=2e-2, rtol=2e-2)
