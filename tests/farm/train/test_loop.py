"""DeepSpeed training for real, in a group of one or two: what is frozen stays frozen, a resumed run ends the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from farm.artifacts import Artifacts
from farm.config import AdaptSettings, TargetSpec, UserError
from farm.data.features import Answer, write_shard
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE, read_tensors, trunk_digest, trunk_files
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.layers.cache import Rows
from farm.store import open_store
from farm.target import zoo
from farm.target.forward import TargetForward
from farm.train.batches import Schedule
from farm.train.loop import FitTask, lr_at
from farm.train.process import fit_in_process
from tests.farm.models import tiny_model

SETTINGS = AdaptSettings(epochs=2, batch_rows=4, lr=1e-2, save_every=3, unroll=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FitTask:
    """A tiny target on disk, a shard of its features, a random trunk and expert."""
    root = tmp_path_factory.mktemp("train")
    model = tiny_model(hidden=16, layers=1, num_attention_heads=2, num_key_value_heads=1)
    (root / "target").mkdir()
    zoo.save(model, zoo.train_tokenizer(), root / "target")
    forward = TargetForward.of(model)
    answers = []
    for row in range(12):
        ids = torch.randint(0, 32, (14 + row,), generator=torch.Generator().manual_seed(row))
        hidden = forward.forward(ids[None, :-1], Rows([0]), forward.new_cache(1, 64))[0]
        prompt, answer = tuple(ids[:4].tolist()), tuple(ids[4:].tolist())
        answers.append(Answer(row, str(row), prompt, answer, "stop", 0, 0.0, hidden))
    write_shard(Artifacts(open_store(root.as_uri())), "answers", "key", 0, answers)
    draft = new_draft(DraftConfig.for_base(model.config), seed=3)
    for name, data in trunk_files(
        draft.config, draft.trunk.state_dict(), draft.expert.state_dict(), None
    ).items():
        (root / name).write_bytes(data)
    return FitTask(
        kind="expert",
        settings=SETTINGS,
        draft=draft.config,
        target=TargetSpec(name="t", model=str(root / "target"), prompts=""),
        shards=(str(root / "artifacts/answers/key/features-00000.safetensors"),),
        expert=str(root / EXPERT_FILE),
        vocabulary=None,
    )


def trunk_of(task: FitTask) -> dict[str, torch.Tensor]:
    assert task.expert is not None
    return read_tensors(Path(task.expert).with_name(TRUNK_FILE))


def test_adapting_moves_every_tensor_of_the_expert_and_no_byte_of_the_trunk(
    task: FitTask, tmp_path: Path
) -> None:
    task = replace(task, settings=task.settings.model_copy(update={"epochs": 20, "save_every": 1000}))
    trunk = trunk_of(task)
    before = trunk_digest(trunk)
    result = fit_in_process(task, trunk, tmp_path)
    assert trunk_digest(trunk) == before == result.trunk_digest_before == result.trunk_digest_after
    assert task.expert is not None
    start, end = load_file(task.expert), load_file(tmp_path / EXPERT_FILE)
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert result.curve[-1][1] < result.curve[0][1]


def test_only_the_selected_rows_are_trained_on(task: FitTask, tmp_path: Path) -> None:
    trunk, one_epoch = trunk_of(task), task.settings.model_copy(update={"epochs": 1})
    chosen = replace(task, settings=one_epoch, rows=frozenset(range(4, 8)))
    result = fit_in_process(chosen, trunk, tmp_path / "chosen")
    assert result.steps == 1  # one batch of four instead of three
    others = fit_in_process(replace(chosen, rows=frozenset(range(4))), trunk, tmp_path / "others")
    assert others.curve != result.curve
    with pytest.raises(UserError, match="long enough"):
        fit_in_process(replace(chosen, rows=frozenset()), trunk, tmp_path / "none")


def test_the_trunk_stage_trains_trunk_and_expert_and_writes_both(task: FitTask, tmp_path: Path) -> None:
    fit_in_process(replace(task, kind="trunk", expert=None), None, tmp_path)
    fresh = new_draft(task.draft, task.settings.seed)
    trained = load_file(tmp_path / TRUNK_FILE)
    assert all(not torch.equal(value, trained[name]) for name, value in fresh.trunk.state_dict().items())
    assert (tmp_path / "draft.json").exists()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_killed_at_a_checkpoint_ends_where_an_unbroken_one_ends(
    task: FitTask, stage: int, tmp_path: Path
) -> None:
    task = replace(task, settings=task.settings.model_copy(update={"zero_stage": stage}))
    trunk = trunk_of(task)
    whole = fit_in_process(task, trunk, tmp_path / "whole")
    with pytest.raises(Killed):
        _fit_until_killed(task, tmp_path / "killed")
    resumed = fit_in_process(task, trunk, tmp_path / "resumed", resume=tmp_path / "killed")
    torch.testing.assert_close(torch.tensor(resumed.curve), torch.tensor(whole.curve))
    left, right = load_file(tmp_path / "whole" / EXPERT_FILE), load_file(tmp_path / "resumed" / EXPERT_FILE)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-6, rtol=1e-5)


def test_bfloat16_products_train_float32_weights_towards_the_same_loss(task: FitTask, tmp_path: Path) -> None:
    curves = {}
    for dtype in ("float32", "bfloat16"):
        settings = task.settings.model_copy(update={"dtype": dtype, "epochs": 20, "save_every": 1000})
        curves[dtype] = fit_in_process(
            replace(task, settings=settings), trunk_of(task), tmp_path / dtype
        ).curve
    first, last = curves["float32"][0][1], curves["float32"][-1][1]
    assert abs(curves["bfloat16"][-1][1] - last) < 0.1 * (first - last)
    weights = load_file(tmp_path / "bfloat16" / EXPERT_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_steps_are_counted_to_the_end_of_the_schedule(task: FitTask, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "out"
    fit_in_process(task, trunk_of(task), folder, steps_done=lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {of for _, of in seen} == {6}


class Killed(Exception):
    """Stands for the end of the process, right after a checkpoint was written."""


def _fit_until_killed(task: FitTask, folder: Path) -> None:
    from farm.train.loop import Save, fit

    folder.mkdir()

    def report(_metrics: dict[str, float], save: Save | None) -> None:
        assert save is not None
        save(folder)
        raise Killed

    fit(task, trunk=trunk_of(task), resume=None, report=report)


def test_resuming_a_run_that_had_ended_returns_its_result(task: FitTask, tmp_path: Path) -> None:
    whole = fit_in_process(task, trunk_of(task), tmp_path / "whole")
    again = fit_in_process(task, trunk_of(task), tmp_path / "again", resume=tmp_path / "whole")
    assert again.curve == whole.curve
    assert (tmp_path / "again" / EXPERT_FILE).read_bytes() == (tmp_path / "whole" / EXPERT_FILE).read_bytes()


def _worker(rank: int, task: FitTask, folder: str) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    import os

    os.environ["LOCAL_RANK"] = str(rank)
    fit_in_process(task, trunk_of(task), Path(folder))
    distributed.destroy_process_group()


def test_two_workers_end_where_one_ends(task: FitTask, tmp_path: Path) -> None:
    """Rows of different lengths fall to the two ranks: only a global mask count gives the same gradients."""
    fit_in_process(task, trunk_of(task), tmp_path / "one")
    (tmp_path / "two").mkdir()
    multiprocessing.spawn(_worker, args=(task, str(tmp_path / "two")), nprocs=2)
    one, two = load_file(tmp_path / "one" / EXPERT_FILE), load_file(tmp_path / "two" / EXPERT_FILE)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-4, rtol=1e-3)


def test_answers_too_short_to_train_on_are_the_users_mistake(task: FitTask, tmp_path: Path) -> None:
    answer = Answer(0, "0", (1, 2, 3), (4,), "stop", 0, 0.0, torch.zeros(3, 16))
    write_shard(Artifacts(open_store(tmp_path.as_uri())), "answers", "short", 0, [answer])
    shard = str(tmp_path / "artifacts/answers/short/features-00000.safetensors")
    with pytest.raises(UserError, match="long enough"):
        fit_in_process(replace(task, shards=(shard,)), trunk_of(task), tmp_path / "out")


def test_the_learning_rate_warms_up_and_decays_to_zero_over_the_real_steps() -> None:
    rates = [lr_at(SETTINGS, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(SETTINGS.lr)
    assert rates[0] < SETTINGS.lr / 2
    assert rates[-1] < SETTINGS.lr / 100


def test_ranks_together_see_each_row_of_a_step_once_whatever_their_number() -> None:
    schedule = Schedule(num_samples=23, batch_rows=6, epochs=3, seed=5)
    for step in range(schedule.num_steps):
        alone = schedule.rows(step)
        parts = [schedule.rows(step, rank, 3) for rank in range(3)]
        assert sorted(row for part in parts for row in part) == sorted(alone)
        assert len(set(alone)) == 6
    assert schedule.rows(0) != schedule.rows(schedule.steps_per_epoch)
