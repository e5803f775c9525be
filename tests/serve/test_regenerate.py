"""Regeneration from the real endpoint: the rows that the target gives here, and its key is written nowhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farm.artifacts import Artifacts
from farm.config import Refused
from farm.data.features import read_shards
from farm.data.prompts import Prompt
from farm.decode.endpoint import Endpoint
from farm.decode.regenerate import regenerate_rows
from farm.fleet.answers import AnswersJob, feature_shards, finish_answers
from farm.fleet.datasets import regenerate
from farm.resources import RegenerateResources
from farm.sections import RegenerateSettings, TargetSpec
from farm.store import open_store
from farm.target.load import load_target

pytestmark = pytest.mark.ray
PROMPTS = tuple(
    Prompt(row, f"id{row}", ({"role": "user", "content": f"fox {row}"},), None) for row in range(14)
)
SECRET = "s3cret-of-the-endpoint"


@pytest.fixture(scope="module")
def target(served):
    return load_target(TargetSpec(name="adapted", model=str(served.root / "adapted"), prompts=""))


def settings(served, **fields) -> RegenerateSettings:
    # more at once than the endpoint lets wait: some are told to come back
    at = {"engine": "openai", "url": f"{served.url}/v1", "concurrency": 14}
    sizes = {"max_new_tokens": 10, "greedy_share": 1.0, "shard_rows": 7}
    return RegenerateSettings(**{**at, **sizes, **fields})


def test_rows_of_the_endpoint_are_those_of_the_engine_and_the_key_is_nowhere(
    served, target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", SECRET)
    asked = settings(served, api_key_env="ENDPOINT_KEY")
    spec = TargetSpec(name="adapted", model=str(served.root / "adapted"), prompts="")
    job, store = AnswersJob(spec, asked, "0" * 16, PROMPTS), open_store(str(tmp_path / "store"))

    assert regenerate([job], store.uri, RegenerateResources()) == {}

    artifacts = Artifacts(store)
    found = finish_answers(artifacts, job)
    assert found.manifest["finish_reasons"] == {"length": 14, "stop": 0, "error": 0}
    samples = read_shards([Path(path) for path in feature_shards(found, artifacts)])
    expected = regenerate_rows(target, PROMPTS, asked)
    assert [sample.row for sample in samples] == [answer.row for answer in expected]
    for sample, answer in zip(samples, expected, strict=True):
        assert sample.tokens_T.tolist() == [*answer.prompt_ids, *answer.answer_ids]
        assert answer.features is not None
        torch.testing.assert_close(sample.features_TH, answer.features, atol=0.02, rtol=0.02)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) == 2 * 3 + 1
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_sampled_rows_have_their_seed_and_repeat(served, target) -> None:
    asked = settings(served, greedy_share=0.0)
    endpoint = Endpoint.of(TargetSpec(name="adapted", model="", prompts=""), asked, None)
    first, second = (regenerate_rows(target, PROMPTS[:4], asked, endpoint) for _ in range(2))
    assert [answer.answer_ids for answer in first] == [answer.answer_ids for answer in second]
    assert all(answer.temperature == 0.7 and answer.seed for answer in first)


def test_an_endpoint_that_serves_another_model_by_that_name_is_refused(served, target) -> None:
    endpoint = Endpoint.of(
        TargetSpec(name="adapted", model="", prompts="", served_as="bare"), settings(served), None
    )
    with pytest.raises(Refused, match="of its greedy tokens are those of the target's checkpoint"):
        regenerate_rows(target, PROMPTS[:4], settings(served), endpoint)
    with pytest.raises(Refused, match="it does not serve 'nobody'"):
        regenerate_rows(target, PROMPTS[:4], settings(served), replace(endpoint, model="nobody"))
