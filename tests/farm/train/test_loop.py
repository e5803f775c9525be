"""DeepSpeed training for real, in a group of one or two: what is frozen stays frozen, a resumed run ends the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from farm.artifacts import Artifacts
from farm.config import UserError
from farm.data.features import Answer, read_shards, write_shard
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE, read_tensors, trunk_digest, trunk_files
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.layers.cache import Rows
from farm.layers.kernels import available
from farm.sections import AdaptSettings, TargetSpec
from farm.store import open_store
from farm.target import zoo
from farm.target.forward import TargetForward
from farm.train.batches import Schedule
from farm.train.loop import FitTask
from farm.train.optimizer import lr_at
from farm.train.process import fit_in_process
from tests.farm.models import tiny_model

SETTINGS = AdaptSettings(
    tier="expert",
    epochs=2,
    batch_rows=4,
    lr=1e-2,
    save_every=3,
    unroll=2,
    form="unrolled",
    loss="kl",
    hidden_weight=0.5,
)


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


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_a_run_ends_the_same_whatever_share_of_its_features_the_budget_kept(
    task: FitTask, share: float, tmp_path: Path
) -> None:
    whole = read_shards([Path(task.shards[0])])
    answers = [
        Answer(
            one.row, one.id, tuple(one.tokens_T[:4].tolist()), tuple(one.tokens_T[4:].tolist()), "stop", 0, 0.0,
            one.features_TH,
        )
        for one in whole
    ]  # fmt: skip
    budget = int(share * sum(one.features_TH.numel() * 2 for one in whole))
    kept = write_shard(Artifacts(open_store(tmp_path.as_uri())), "answers", "key", 0, answers, budget)
    assert kept <= budget
    shard = tmp_path / "artifacts/answers/key/features-00000.safetensors"
    assert len(load_file(shard)) == (1 if share else 0)
    with pytest.raises(UserError, match="regenerate.byte_budget"):
        read_shards([shard])
    trunk = trunk_of(task)
    fit_in_process(task, trunk, tmp_path / "all")
    fit_in_process(replace(task, shards=(str(shard),)), trunk, tmp_path / "few")
    expected, found = (load_file(tmp_path / name / EXPERT_FILE) for name in ("all", "few"))
    # A prefill of several rows gives a row the same bits as decoding did; torch's products do not promise that.
    tolerance = 2e-3 if available() is None else 0.0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=tolerance)


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
    for dtype in ("float32", "bfloat16", "auto"):
        settings = task.settings.model_copy(update={"dtype": dtype, "epochs": 20, "save_every": 1000})
        curves[dtype] = fit_in_process(
            replace(task, settings=settings), trunk_of(task), tmp_path / dtype
        ).curve
    first, last = curves["float32"][0][1], curves["float32"][-1][1]
    assert abs(curves["bfloat16"][-1][1] - last) < 0.1 * (first - last)
    # by the device, not by what its instructions are fast in: figures of CPUs repeat on CPUs
    assert curves["auto"] == curves["bfloat16" if torch.cuda.is_available() else "float32"]
    weights = load_file(tmp_path / "bfloat16" / EXPERT_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_steps_are_counted_to_the_end_of_the_schedule(task: FitTask, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "out"
    fit_in_process(task, trunk_of(task), folder, steps_done=lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {of for _, of in seen} == {6}


def changed(task: FitTask, **settings: object) -> FitTask:
    """The task under other settings, with the checks of a manifest."""
    return replace(task, settings=AdaptSettings(**{**task.settings.model_dump(), **settings}))


@pytest.mark.parametrize(
    ("tier", "loss"),
    [
        ("low-rank", "kl"),
        ("expert", "lk"),
        ("expert-fc", "tv"),
        ("expert-lora", "lk"),
        ("eda", "eda"),
        ("full", "lk-log"),
    ],
)
def test_every_tier_learns_beside_an_untouched_trunk(
    task: FitTask, tier: str, loss: str, tmp_path: Path
) -> None:
    task = changed(task, tier=tier, loss=loss, epochs=20, save_every=1000, rank=4)
    result = fit_in_process(task, trunk_of(task), tmp_path)
    assert result.trunk_digest_before == result.trunk_digest_after
    first, last = (sum(loss for _, loss in part) for part in (result.curve[:3], result.curve[-3:]))
    assert last < first  # an epoch each
    assert (tmp_path / TRUNK_FILE).exists() == (tier in ("eda", "full"))
    names = load_file(tmp_path / EXPERT_FILE)
    parts = {name.split(".")[1] for name in names if name.startswith("trunk_delta.")}
    assert parts == {"expert-fc": {"fc"}, "expert-lora": {"fc", "qkv", "out"}}.get(tier, set())
    assert result.trained_bytes > 0
    assert result.flops > 0


@pytest.mark.parametrize(("tokens", "epochs"), [(1, 1), (470, 3), (660, 4)])
def test_tokens_are_met_by_the_nearest_number_of_whole_epochs(
    task: FitTask, tokens: int, epochs: int, tmp_path: Path
) -> None:
    """The answers have 10 to 21 tokens, 186 together."""
    one = fit_in_process(changed(task, epochs=1, save_every=1000), trunk_of(task), tmp_path / "one")
    found = fit_in_process(changed(task, tokens=tokens, save_every=1000), trunk_of(task), tmp_path / "found")
    assert found.positions == epochs * one.positions


@pytest.mark.parametrize("form", ["cached", "cached-unrolled"])
def test_cached_forms_learn_what_unrolling_learns_first(task: FitTask, form: str, tmp_path: Path) -> None:
    task = changed(task, form=form, epochs=10, cached_epochs=10, cached_tokens=64, save_every=1000)
    result = fit_in_process(task, trunk_of(task), tmp_path)
    first = result.curve[0][1]
    cached = [loss for step, loss in result.curve if step < 20]
    assert cached[-1] < first
    assert result.seconds.caching > 0
    assert {name for name in load_file(tmp_path / EXPERT_FILE)} == {
        f"{p}_proj.weight" for p in ("gate", "up", "down")
    }


def test_a_cache_that_would_not_fit_is_refused_with_the_remedy(task: FitTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t: form cached would cache .* form unrolled"):
        fit_in_process(changed(task, form="cached", cached_bytes=1000), trunk_of(task), tmp_path)


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(task: FitTask, tmp_path: Path) -> None:
    for name, micro_rows in (("whole", None), ("parts", 1)):
        fit_in_process(changed(task, micro_rows=micro_rows), trunk_of(task), tmp_path / name)
    whole, parts = load_file(tmp_path / "whole" / EXPERT_FILE), load_file(tmp_path / "parts" / EXPERT_FILE)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], atol=1e-4, rtol=1e-3)


def test_a_filtered_run_resumes_with_its_references_losses_and_differs_from_an_unfiltered_one(
    task: FitTask, tmp_path: Path
) -> None:
    plain = fit_in_process(task, trunk_of(task), tmp_path / "plain")
    task = changed(task, adaspec={"keep": 0.4, "warm": 0.0})
    whole = fit_in_process(task, trunk_of(task), tmp_path / "whole")
    assert whole.seconds.reference > 0
    assert whole.curve != plain.curve
    with pytest.raises(Killed):
        _fit_until_killed(task, tmp_path / "killed")
    resumed = fit_in_process(task, trunk_of(task), tmp_path / "resumed", resume=tmp_path / "killed")
    torch.testing.assert_close(torch.tensor(resumed.curve), torch.tensor(whole.curve))


@pytest.mark.parametrize("form", ["unrolled", "cached"])
def test_a_filter_selects_the_same_positions_whatever_micro_rows_is(
    task: FitTask, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farm.train import training

    selected: dict[int, list[int]] = {}  # by unrolled step, of the first step of each run
    sums = training.mean_loss

    def seen(steps: Any, learned: Any, *args: Any) -> torch.Tensor:
        for number, (step, of) in enumerate(zip(steps, learned, strict=True)):
            if of.kept_M is not None:  # the reference is trained on all
                selected.setdefault(number, []).extend(step.at.uid_M[of.kept_M].tolist())
        return sums(steps, learned, *args)

    monkeypatch.setattr(training, "mean_loss", seen)
    found = []
    for micro_rows in (None, 2, 1):
        selected.clear()
        one_step = {"adaspec": {"keep": 0.4, "warm": 0.0}, "micro_rows": micro_rows, "batch_rows": 12}
        cut = changed(task, form=form, epochs=1, cached_tokens=1000, **one_step)
        fit_in_process(cut, trunk_of(task), tmp_path / str(micro_rows))
        found.append({number: sorted(uids) for number, uids in selected.items()})
    assert found[0][0]
    assert found[0] == found[1] == found[2]
    for name in ("2", "1"):
        assert_same_expert(tmp_path / "None", tmp_path / name)


def test_two_workers_filter_the_same_positions_as_one(task: FitTask, tmp_path: Path) -> None:
    task = changed(task, adaspec={"keep": 0.4, "warm": 0.0}, zero_stage=1)
    one = fit_in_process(task, trunk_of(task), tmp_path / "one")
    fit_by(2, task, tmp_path / "two")
    assert_same_expert(tmp_path / "one", tmp_path / "two")
    assert len(one.curve) == 6


def test_a_run_that_no_longer_gains_stops_early_on_rows_it_does_not_see(
    task: FitTask, tmp_path: Path
) -> None:
    stop = {"held_out": 0.25, "every": 1, "patience": 2, "min_gain": 1.0}  # a gain that nothing reaches
    result = fit_in_process(changed(task, epochs=50, early_stop=stop), trunk_of(task), tmp_path)
    assert result.steps == 3
    assert [step for step, _ in result.held_out] == [1, 2, 3]
    assert all(1.0 <= tau <= 3.0 for _, tau in result.held_out)


def test_only_the_chosen_rows_are_trained_on(task: FitTask, tmp_path: Path) -> None:
    chosen = replace(task, rows=frozenset((0, 3, 5, 7)))
    result = fit_in_process(chosen, trunk_of(task), tmp_path)
    lengths = [14 + row for row in (0, 3, 5, 7)]
    assert result.positions == 2 * sum(length - 2 - 3 for length in lengths)  # epochs; masked, prompt of 4


def test_a_loss_that_is_not_finite_ends_the_run_with_its_name(task: FitTask, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="t: the loss is not finite"):
        fit_in_process(changed(task, lr=1e30, epochs=20, clip=1e30), trunk_of(task), tmp_path)


def test_a_last_step_that_breaks_the_weights_ends_the_run_too(task: FitTask, tmp_path: Path) -> None:
    """Its loss was taken before it, and was fine: without another look such an expert would be published."""
    with pytest.raises(FloatingPointError, match="t: a weight is not finite after step 1"):
        fit_in_process(changed(task, lr=1e38, epochs=1, batch_rows=12), trunk_of(task), tmp_path)


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


def _worker(rank: int, world: int, task: FitTask, folder: str, resume: str | None) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=world)
    import os

    os.environ["LOCAL_RANK"] = str(rank)
    fit_in_process(task, trunk_of(task), Path(folder), resume=None if resume is None else Path(resume))
    distributed.destroy_process_group()


def fit_by(world: int, task: FitTask, folder: Path, resume: Path | None = None) -> None:
    folder.mkdir()
    told = None if resume is None else str(resume)
    multiprocessing.spawn(_worker, args=(world, task, str(folder), told), nprocs=world)


def assert_same_expert(one: Path, other: Path) -> None:
    left, right = load_file(one / EXPERT_FILE), load_file(other / EXPERT_FILE)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("world", "settings"), [(2, {}), (3, {"zero_stage": 2, "tier": "expert-lora", "rank": 2})]
)
def test_workers_end_where_one_ends(
    task: FitTask, world: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of different lengths fall to the ranks: only a global mask count gives the same gradients."""
    task = changed(task, batch_rows=6, **settings)
    fit_in_process(task, trunk_of(task), tmp_path / "one")
    fit_by(world, task, tmp_path / "more")
    assert_same_expert(tmp_path / "one", tmp_path / "more")


def test_a_run_killed_alone_is_finished_by_two_workers(task: FitTask, tmp_path: Path) -> None:
    """A checkpoint says nothing of how many wrote it: nodes come and go."""
    task = changed(task, zero_stage=1)
    fit_in_process(task, trunk_of(task), tmp_path / "whole")
    with pytest.raises(Killed):
        _fit_until_killed(task, tmp_path / "killed")
    fit_by(2, task, tmp_path / "resumed", tmp_path / "killed")
    assert_same_expert(tmp_path / "whole", tmp_path / "resumed")


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
