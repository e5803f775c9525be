"""What the lean forward does not compute runs as `transformers` computes it, over our cache, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from farm.bench.family import generate
from farm.config import Refused
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.layers.cache import Branches, Rows
from farm.sections import TargetSpec
from farm.target import zoo
from farm.target.forward import TargetForward
from farm.target.load import load_embedding_and_head, load_model, load_target
from farm.target.lora import open_beside
from farm.target.reference import ReferenceForward
from tests.farm.layers.test_cache import chain, prefilled, trees
from tests.farm.models import sharpened, tiny_model

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# norm and rotary of their own, a soft-capped head, a scaled head, a head with a bias, learned positions, experts
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
}
EACH = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str, **options: Any) -> Any:
    """A random causal LM, fp32, far from uniform, with biases that matter."""
    config = AutoConfig.for_model(kind, **(SIZES | KINDS.get(kind, {}) | options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    return sharpened(model, 6.0)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 32, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_logits(model: Any, *parts: torch.Tensor) -> torch.Tensor:
    """The model's own logits of one sequence, in one pass without a cache."""
    found: torch.Tensor = model(torch.cat(parts)[None], use_cache=False).logits[0]
    return found


@EACH
def test_logits_equal_the_models_in_one_pass_and_token_by_token(kind: str) -> None:
    model = tiny(kind)
    forward = ReferenceForward(model)
    tokens_BT = tokens(3, 17)
    expected = torch.stack([expected_logits(model, row) for row in tokens_BT])
    whole = forward.logits(forward.forward(tokens_BT, Rows([0, 0, 0]), forward.new_cache(3, 32)))
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    cache = forward.new_cache(3, 32)
    steps = [forward.forward(tokens_BT[:, t : t + 1], Rows([t] * 3), cache) for t in range(17)]
    torch.testing.assert_close(forward.logits(torch.cat(steps, dim=1)), expected, atol=1e-4, rtol=1e-4)


@EACH
def test_ragged_rows_that_roll_back_do_not_see_each_other_or_what_was_dropped(kind: str) -> None:
    model = tiny(kind)
    forward = ReferenceForward(model)
    cache = forward.new_cache(4, 40)
    rows = [tokens(length, seed=length) for length in (5, 11, 8)]
    padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    forward.forward(padded_BT, Rows([0, 0, 0], first=1), cache)
    rejected_BT, kept_BT = tokens(3, 6, seed=20), tokens(3, 4, seed=21)
    forward.forward(rejected_BT, Rows([5, 11, 8], first=1), cache)
    kept = [5, 12, 10]  # of the rejected tokens, row 1 keeps one and row 2 two
    got_BTV = forward.logits(forward.forward(kept_BT, Rows(kept, first=1), cache))
    for index, row in enumerate(rows):
        accepted = rejected_BT[index, : kept[index] - len(row)]
        expected_TV = expected_logits(model, row, accepted, kept_BT[index])[-4:]
        torch.testing.assert_close(got_BTV[index], expected_TV, atol=1e-4, rtol=1e-4)


@EACH
def test_greedy_speculative_decoding_gives_the_tokens_of_generate(kind: str) -> None:
    """A random draft is refused all the time, so every round rolls back."""
    model = tiny(kind)
    forward = ReferenceForward(model)
    draft = new_draft(DraftConfig.for_base(model.config), seed=1, std=0.3).requires_grad_(False)
    prompts = [tuple(tokens(length, seed=length).tolist()) for length in (3, 9, 6, 4)]
    requests = [Request(str(i), ids, SamplingParams(max_new_tokens=24)) for i, ids in enumerate(prompts)]
    engine = Engine([Route(forward, frozenset(), draft)], num_slots=3, max_length=40, k=3)
    done = engine.run(requests)
    for ids, one in zip(prompts, done, strict=True):
        found_1T = generate(model, torch.tensor([ids]), 24)
        assert one.tokens == tuple(found_1T[0, len(ids) :].tolist())
    assert engine.stats.rounds < 4 * 24


@EACH
def test_every_path_of_a_tree_has_the_hidden_states_of_its_chain(kind: str) -> None:
    """A causal mask over a tree would show nodes their siblings, and what is verified would not be the target's."""
    forward, tree = ReferenceForward(tiny(kind)), trees()
    cache, rows = prefilled(forward, 4, first=1)
    branches = Branches(tree.depths_BM, tree.ancestors())
    hidden_BMH = forward.forward(tree.tokens_BM, Rows(rows.starts, 1, branches), cache)
    for row in range(3):
        for node in (3, 5, 6):
            expected, _ = chain(forward, tree, row, node)
            torch.testing.assert_close(hidden_BMH[row, node], expected[-1], atol=1e-3, rtol=1e-3)


def test_positions_end_where_a_window_or_a_length_would_change_the_result() -> None:
    """Just before the window's end the model still agrees; behind it, a mask without the window would not."""
    model = tiny("mistral", sliding_window=16)
    forward = ReferenceForward(model)
    assert forward.max_positions == 16
    row = tokens(20)
    got_TV = forward.logits(forward.forward(row[None], Rows([0]), forward.new_cache(1, 20)))[0]
    expected_TV = expected_logits(model, row)
    torch.testing.assert_close(got_TV[:16], expected_TV[:16], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got_TV[16:], expected_TV[16:], atol=1e-2)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 48}
    assert ReferenceForward(tiny_model(rope_parameters=rope)).max_positions == 48


def test_positions_end_where_a_local_layer_would_look_from_another_rows_end() -> None:
    """GPT-Neo masks by itself: beside a longer row, a shorter one would see fewer keys than its window has."""
    options = {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    }
    model = tiny("gpt_neo", **options)
    forward = ReferenceForward(model)
    assert forward.max_positions == 16
    rows, then_BT = [tokens(length, seed=length) for length in (3, 12)], tokens(2, 4)
    cache = forward.new_cache(2, 16)
    forward.forward(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), Rows([0, 0]), cache)
    got_BTV = forward.logits(forward.forward(then_BT, Rows([3, 12]), cache))
    for index, row in enumerate(rows):
        expected_TV = expected_logits(model, row, then_BT[index])[-4:]
        torch.testing.assert_close(got_BTV[index], expected_TV, atol=1e-4, rtol=1e-4)


def test_a_draft_past_the_last_position_changes_nothing_that_is_kept() -> None:
    """Learned positions have no row beyond the last one."""
    model = tiny("gpt2", max_position_embeddings=24)
    forward = ReferenceForward(model)
    assert model.transformer.wpe.weight.shape[0] == forward.max_positions == 24
    draft = new_draft(DraftConfig.for_base(model.config), seed=1, std=0.3).requires_grad_(False)
    ids = tuple(tokens(6).tolist())
    request = Request("0", ids, SamplingParams(max_new_tokens=18))
    route = Route(forward, frozenset(), draft)
    (done,) = Engine([route], num_slots=1, max_length=24, k=4).run([request])
    assert done.tokens == tuple(generate(model, torch.tensor([ids]), 18)[0, 6:].tolist())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mamba", {"state_size": 4}),
        ("lfm2", {"layer_types": ["full_attention", "conv"]}),
        ("deepseek_v3", {}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_an_architecture_that_cannot_be_rolled_back_or_masked_is_refused_by_name(
    kind: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"model_type '{kind}'"):
        ReferenceForward(tiny(kind, **options))


def test_a_model_that_ignores_positions_is_found_out_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for every architecture that takes the arguments and computes something else."""
    model = tiny("olmo2")
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, position_ids=None, **k: plain(*a, **k))
    with pytest.raises(ValueError, match="'olmo2' computes other logits"):
        ReferenceForward(model)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.train_tokenizer()


def saved(folder: Path, model: Any, tokenizer: Any) -> TargetSpec:
    zoo.save(model, tokenizer, folder)
    return TargetSpec(name="other", model=str(folder), prompts="")


def test_a_target_is_loaded_lean_where_that_is_exact_and_by_transformers_elsewhere(
    tmp_path: Path, tokenizer: Any
) -> None:
    spec = saved(tmp_path / "gemma2", tiny("gemma2", vocab_size=1024), tokenizer)
    loaded, model = load_target(spec), load_model(spec)
    assert isinstance(loaded.forward, ReferenceForward)
    assert loaded.max_positions == 128
    assert loaded.num_bytes >= sum(parameter.nbytes for parameter in model.parameters())
    row = tokens(9)
    got = loaded.forward.logits(loaded.forward.forward(row[None], Rows([0]), loaded.forward.new_cache(1, 9)))
    torch.testing.assert_close(got[0], expected_logits(model, row), atol=1e-4, rtol=1e-4)
    lean = load_target(saved(tmp_path / "llama", tiny_model(vocab=1024), tokenizer))
    assert isinstance(lean.forward, TargetForward)


def test_a_target_that_nothing_here_runs_is_refused_with_its_name(tmp_path: Path, tokenizer: Any) -> None:
    spec = saved(tmp_path / "mamba", tiny("mamba", vocab_size=1024, state_size=4), tokenizer)
    with pytest.raises(Refused, match="other: .*model_type 'mamba'.*rolled back"):
        load_target(spec)


def test_embedding_and_head_are_found_under_other_names(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny("gpt_neox", vocab_size=1024)
    embedding_VH, head_VH = load_embedding_and_head(saved(tmp_path / "neox", model, tokenizer))
    assert torch.equal(embedding_VH, model.gpt_neox.embed_in.weight)
    assert torch.equal(head_VH, model.get_output_embeddings().weight)
    assert not torch.equal(embedding_VH, head_VH)


def test_a_lora_of_such_a_base_is_merged_not_kept_beside(tmp_path: Path, tokenizer: Any) -> None:
    base = load_target(saved(tmp_path / "base", tiny("gemma", vocab_size=1024), tokenizer))
    adapted = get_peft_model(
        tiny("gemma", vocab_size=1024), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "lora")
    spec = TargetSpec(name="l", model=str(tmp_path / "base"), lora=str(tmp_path / "lora"), prompts="")
    assert open_beside(spec, base) is None
    forward, row = load_target(spec).forward, tokens(9)
    got_TV = forward.logits(forward.forward(row[None], Rows([0]), forward.new_cache(1, 9)))[0]
    torch.testing.assert_close(got_TV, expected_logits(adapted, row), atol=1e-3, rtol=1e-3)
