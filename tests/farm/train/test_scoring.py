"""Selection from real shards: what each strategy reads of which model, and that the file's cut decides nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farm.artifacts import Artifacts
from farm.config import UserError
from farm.data.features import Answer, read_shards, write_shard
from farm.data.prompts import Prompt
from farm.data.select import Moments, Whitening, mahalanobis, random, shift
from farm.decode.conversation import sampling_of
from farm.draft.checkpoint import trunk_files
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.layers.cache import Rows
from farm.sections import RegenerateSettings, SelectSettings, TargetSpec
from farm.store import open_store
from farm.target import zoo
from farm.target.forward import TargetForward
from farm.train.scoring import Selection, SelectTask, pooled, select_rows
from tests.farm.models import tiny_model

NUM_ROWS, CHANGED = 48, range(0, 48, 4)
EXACT = SelectSettings(strategy="shift", fraction=0.25, exact=True)


class Written:
    """A base, and the answers of a target whose hidden states differ from the base's in some of them."""

    def __init__(self, root: Path) -> None:
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1}
        base = tiny_model(hidden=16, layers=1, **sizes)
        self.root, self.forward = root, TargetForward.of(base)
        (root / "base").mkdir()
        zoo.save(base, zoo.train_tokenizer(), root / "base")
        draft = self.draft = new_draft(DraftConfig.for_base(base.config), seed=3)
        trunk, expert = draft.trunk.state_dict(), draft.expert.state_dict()
        for name, data in trunk_files(draft.config, trunk, expert, None).items():
            (root / name).write_bytes(data)
        self.answers = [self._answer(row) for row in range(NUM_ROWS)]

    def _answer(self, row: int) -> Answer:
        generator = torch.Generator().manual_seed(row)
        ids = torch.randint(0, 32, (14 + row % 9,), generator=generator)
        hidden_TH = self.hidden(ids[:-1])
        if row in CHANGED:
            hidden_TH = hidden_TH + 0.2 * torch.randn(hidden_TH.shape[1], generator=generator)
        return Answer(
            row, f"id-{row}", tuple(ids[:4].tolist()), tuple(ids[4:].tolist()), "stop", 0, 0.0, hidden_TH
        )

    def hidden(self, ids_T: Tensor) -> Tensor:
        return self.forward.forward(ids_T[None], Rows([0]), self.forward.new_cache(1, 64))[0]

    def task(
        self,
        settings: SelectSettings,
        *,
        shard_rows: int = 16,
        key: str = "k",
        answers: list[Answer] | None = None,
        feature_bytes: int | None = None,
    ) -> SelectTask:
        artifacts, written = Artifacts(open_store(self.root.as_uri())), answers or self.answers
        cuts = range(0, NUM_ROWS, shard_rows)
        for number, start in enumerate(cuts):
            rows = written[start : start + shard_rows]
            write_shard(artifacts, "answers", key, number, rows, feature_bytes)
        base = TargetSpec(name="base", model=str(self.root / "base"), prompts="")
        shards = sorted((self.root / "artifacts/answers" / key).glob("features-*"))
        return SelectTask(
            settings=settings, base=base, target=base, dtype="float32",
            trunk_folder=str(self.root), shards=tuple(map(str, shards)), origins={},
        )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("scoring"))


def scores(selection: Selection) -> dict[int, float]:
    return {row.row: row.score for row in selection.scored}


def test_shift_keeps_the_rows_that_fine_tuning_changed(written: Written) -> None:
    selection = select_rows(written.task(EXACT))
    assert selection.rows == set(CHANGED)
    assert selection.realised_fraction == 0.25
    assert selection.num_pilot == NUM_ROWS
    unchanged = [score for row, score in scores(selection).items() if row not in CHANGED]
    assert max(unchanged) < 1e-3 < min(scores(selection)[row] for row in CHANGED)
    unpaired = select_rows(written.task(EXACT.model_copy(update={"strategy": "mahalanobis"})))
    assert unpaired.rows != set(CHANGED)


@pytest.mark.parametrize("strategy", ["shift", "mahalanobis"])
def test_scores_are_those_of_the_definition(written: Written, strategy: str) -> None:
    task = written.task(EXACT.model_copy(update={"strategy": strategy}))
    samples = read_shards([Path(path) for path in task.shards])
    base_NH = torch.stack(
        [written.hidden(s.tokens_T[:-1])[s.num_prompt_tokens :].bfloat16().float().mean(0) for s in samples]
    )
    target_NH = torch.stack([pooled(sample) for sample in samples])
    whitening = Whitening.of(Moments.of(base_NH))
    both = shift(target_NH, base_NH, whitening), mahalanobis(target_NH, whitening)
    selection = select_rows(task)
    found = torch.tensor([scores(selection)[sample.row] for sample in samples], dtype=torch.float64)
    torch.testing.assert_close(found, both[strategy == "mahalanobis"], rtol=1e-3, atol=1e-4)
    assert -1 <= selection.agreement <= 1


@pytest.mark.parametrize("strategy", ["shift", "failure", "flatness", "random"])
def test_how_the_answers_were_cut_into_shards_decides_nothing(written: Written, strategy: str) -> None:
    settings = SelectSettings(strategy=strategy, fraction=0.5)
    one, many = (
        select_rows(written.task(settings, shard_rows=rows, key=f"{strategy}-{rows}"))
        for rows in (NUM_ROWS, 5)
    )
    assert one.rows == many.rows
    assert len(one.rows) == NUM_ROWS // 2
    assert scores(one) == pytest.approx(scores(many), rel=1e-4)


def test_a_random_choice_does_not_follow_which_answers_are_greedy() -> None:
    prompts = [Prompt(row, f"row-{row}", (), None) for row in range(2000)]
    settings = RegenerateSettings(greedy_share=0.5)
    greedy = [sampling_of(prompt, settings).temperature == 0 for prompt in prompts]
    scores = random([prompt.id for prompt in prompts], seed=settings.seed)
    high = [is_greedy for is_greedy, score in zip(greedy, scores, strict=True) if score > 0.5]
    assert sum(high) / len(high) == pytest.approx(0.5, abs=0.06)


def test_failure_follows_the_features_and_not_the_base(written: Written) -> None:
    selection = select_rows(written.task(SelectSettings(strategy="failure", fraction=0.5)))
    found = scores(selection)
    assert all(0 <= score <= 1 for score in found.values())
    row = written.answers[1]
    ids_T = torch.tensor([*row.prompt_ids, *row.answer_ids])
    hidden_TH = written.hidden(ids_T[:-1]).bfloat16().float()
    draft = written.draft
    accepted = []
    for t in range(len(row.prompt_ids) - 1, len(ids_T) - 2):  # one position after the other, causal by itself
        embedded = written.forward.embedding[ids_T[1 : t + 2]][None]
        positions = torch.arange(t + 1)[None]

        def remember(kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            k, v = kv.transpose(1, 2).chunk(2, dim=1)
            length = k.shape[2]
            causal = torch.ones(length, length).tril().bool()
            return k, v, causal.repeat(2, 1)[None, None]

        predicted = draft(embedded, hidden_TH[None, : t + 1], positions, remember)[0, -1]
        p, q = (written.forward.logits(h[None])[0].softmax(-1) for h in (hidden_TH[t + 1], predicted))
        accepted.append(torch.minimum(p, q).sum().item())
    assert found[1] == pytest.approx(1 - sum(accepted) / len(accepted), abs=1e-4)


def test_answers_that_are_too_short_are_never_chosen(written: Written, tmp_path: Path) -> None:
    short = replace(written.answers[0], answer_ids=(1, 2), features=torch.zeros(5, 16))
    artifacts = Artifacts(open_store(tmp_path.as_uri()))
    write_shard(artifacts, "answers", "short", 0, [short])
    shards = (str(tmp_path / "artifacts/answers/short/features-00000.safetensors"),)
    with pytest.raises(UserError, match="long enough"):
        select_rows(replace(written.task(EXACT), shards=shards))


@pytest.mark.parametrize("strategy", ["shift", "failure"])
def test_scores_do_not_need_features_in_the_store(written: Written, strategy: str) -> None:
    settings = EXACT.model_copy(update={"strategy": strategy})
    answers = [
        replace(one, features=written.hidden(torch.tensor([*one.prompt_ids, *one.answer_ids])[:-1]))
        for one in written.answers
    ]
    stored, streamed = (
        scores(
            select_rows(written.task(settings, key=f"{strategy}{kept}", answers=answers, feature_bytes=kept))
        )
        for kept in (None, 0)
    )
    assert streamed == pytest.approx(stored, abs=1e-3)
