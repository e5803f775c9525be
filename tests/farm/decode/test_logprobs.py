"""Log-probabilities are the target's own, whatever was drafted and whoever decodes beside; nobody else pays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import farm.decode.runner as runner_module
from farm.decode.engine import Completion, Engine, Request, Route
from farm.decode.logprobs import TokenLogprob, committed_logprobs
from farm.decode.sampling import SamplingParams
from farm.decode.tree import TreeShape
from farm.target.forward import TargetForward
from tests.farm.decode.family import PROJECTIONS, family
from tests.farm.models import tiny_model, tiny_pair

NO_STOP: frozenset[int] = frozenset()
PENALISED: dict[str, Any] = {
    "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": ((5, 3.0),),
}  # fmt: skip


def reference(model: Any, request: Request, done: Completion) -> Tensor:
    """log_softmax [N, V] of a plain forward of `transformers` after each emitted token's prefix."""
    ids = torch.tensor([[*request.prompt_ids, *done.tokens]])
    with torch.no_grad():
        logits_NV = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits_NV.log_softmax(dim=-1)


def worst(model: Any, request: Request, done: Completion) -> float:
    """Largest difference to the reference, of the tokens and of their alternatives."""
    expected_NV = reference(model, request, done)
    assert [one.token for one in done.logprobs] == list(done.tokens)
    found = [(n, token, value) for n, one in enumerate(done.logprobs) for token, value in pairs(one)]
    return max(abs(float(expected_NV[n, token]) - value) for n, token, value in found)


def pairs(one: TokenLogprob) -> list[tuple[int, float]]:
    return [(one.token, one.logprob), *one.top]


def ask(name: str, num_top: int | None, target: str = "", **options: Any) -> Request:
    params = SamplingParams(max_new_tokens=options.pop("tokens", 14), logprobs=num_top, **options)
    return Request(name, (3, 9, 4), params, target)


def test_every_emitted_token_has_the_targets_log_probability_before_any_processing() -> None:
    """Chains, mixed with rows that did not ask; prefilled, accepted, refused and bonus tokens alike."""
    model = tiny_model()
    draft = tiny_pair()[1]
    requests = [
        ask("greedy", 5, seed=1),
        ask("silent", None, temperature=1.0),
        ask("penalised", 0, seed=3, **PENALISED),
        ask("sampled", 20, temperature=1.2, seed=4, tokens=40),
        ask("silent too", None),
        ask("plain", 2, max_drafted=0),
    ]
    engine = Engine([Route(TargetForward.of(model), frozenset({7}), draft)], num_slots=4, max_length=64, k=3)
    for request, done in zip(requests, engine.run(requests), strict=True):
        if request.params.logprobs is None:
            assert done.logprobs == ()
        else:
            assert worst(model, request, done) < 1e-4
            assert {len(one.top) for one in done.logprobs} == {request.params.logprobs}
    assert engine.stats.accepted[0] > 0


def test_alternatives_are_the_most_likely_tokens_best_first() -> None:
    model = tiny_model()
    request = ask("r", 4, temperature=1.0)
    (done,) = Engine([Route(TargetForward.of(model), NO_STOP)], num_slots=1, max_length=64, k=0).run(
        [request]
    )
    best_NM = reference(model, request, done).topk(4, dim=-1).indices
    assert [[token for token, _ in one.top] for one in done.logprobs] == best_NM.tolist()


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_trees_give_the_log_probabilities_of_their_path(kind: Any) -> None:
    model = tiny_model()
    draft = tiny_pair()[1]
    requests = [ask(str(seed), 3 if seed % 2 else None, seed=seed, temperature=1.0) for seed in range(4)]
    route = Route(TargetForward.of(model), NO_STOP, draft)
    engine = Engine([route], num_slots=4, max_length=64, k=24, tree=TreeShape(kind, 8, 2, 24))
    for request, done in zip(requests, engine.run(requests), strict=True):
        if request.params.logprobs is not None:
            assert worst(model, request, done) < 1e-4
    assert engine.stats.accepted[0] > 0


def test_loras_and_checkpoints_of_one_batch_give_their_own(tmp_path: Path) -> None:
    routes, _ = family(tmp_path)
    engine = Engine(routes, num_slots=8, max_length=64, k=3)
    requests = [ask(route.target, 2, route.target, temperature=1.0) for route in routes]
    done = {one.request_id: one for one in engine.run(requests)}

    def checkpoint() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float64)

    models = {"base": checkpoint(), "plain": checkpoint(), "full": tiny_model(seed=1).double()}
    for name in ("lora0", "lora1"):
        config = LoraConfig.from_pretrained(tmp_path / name)
        config.target_modules = {projection.rpartition(".")[2] for projection in PROJECTIONS}
        models[name] = PeftModel.from_pretrained(checkpoint(), tmp_path / name, config=config).double()
    for request in requests:
        assert worst(models[request.target], request, done[request.id]) < 1e-4, request.target


def test_steps_hand_out_what_the_completion_has_without_the_stop_token() -> None:
    target, draft = tiny_pair()
    plain = Engine([Route(target, NO_STOP)], num_slots=1, max_length=64, k=0).run([ask("r", None)])
    stop = plain[0].tokens[9]
    engine = Engine([Route(target, frozenset({stop}), draft)], num_slots=1, max_length=64, k=3)
    engine.add(ask("r", 1))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    handed = [one for output in outputs for one in output.logprobs]
    done = outputs[-1].completion
    assert done is not None
    assert done.tokens[-1] == stop
    assert handed == list(done.logprobs[:-1])
    assert [len(output.logprobs) for output in outputs] == [len(output.tokens) for output in outputs]


def test_the_comparison_rejects_logits_of_a_neighbouring_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(logits_BTV: Tensor, *rest: Any) -> dict[int, list[TokenLogprob]]:
        return committed_logprobs(logits_BTV.roll(1, dims=1), *rest)

    model, request = tiny_model(), ask("r", 3)
    engine = Engine(
        [Route(TargetForward.of(model), NO_STOP, tiny_pair()[1])], num_slots=1, max_length=64, k=3
    )
    monkeypatch.setattr(runner_module, "committed_logprobs", shifted)
    assert worst(model, request, engine.run([request])[0]) > 1e-2


def test_nothing_is_computed_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = tiny_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=2, max_length=64, k=3)
    monkeypatch.setattr(runner_module, "committed_logprobs", None)
    engine.run([ask("a", None), ask("b", None)])
    with pytest.raises(TypeError):
        engine.run([ask("c", 0)])
