"""The lean forward must compute what `transformers` computes; otherwise every promise of losslessness is empty."""

import pytest
import torch

from farm.layers.cache import Rows
from farm.target.forward import TargetForward, unsupported_reason
from tests.farm.models import tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8, "truncate": False}}),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 777.0}),
    (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    ("llama", {"attention_bias": True}),
    ("llama", {"head_dim": 32}),
    ("llama", {"rms_norm_eps": 0.5}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"rope_parameters": YARN}),
    ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_logits_equal_transformers_in_one_pass_and_token_by_token(
    kind: str, options: dict[str, object]
) -> None:
    model = tiny_model(kind, **options)
    forward = TargetForward.of(model)
    tokens_BT = torch.randint(0, 32, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens_BT).logits
    whole = forward.logits(forward.forward(tokens_BT, Rows([0, 0, 0]), forward.new_cache(3, 32)))
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)

    cache = forward.new_cache(3, 32)
    steps = [forward.forward(tokens_BT[:, t : t + 1], Rows([t] * 3), cache) for t in range(17)]
    torch.testing.assert_close(forward.logits(torch.cat(steps, dim=1)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [None, (5, 11, 8)], ids=["padding multiplied", "padding left out"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rows_of_different_lengths_in_one_batch_do_not_see_each_other(
    kind: str, counts: tuple[int, ...] | None
) -> None:
    model = tiny_model(kind)
    forward = TargetForward.of(model)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 32, (length,), generator=generator) for length in (5, 11, 8)]
    cache = forward.new_cache(4, 32)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    before = Rows([0, 0, 0], first=1, counts=counts)
    assert (before.real(11) is None) == (counts is None)
    prompts = forward.forward(padded, before, cache)
    following = torch.randint(0, 32, (3, 4), generator=generator)
    got = forward.forward(following, Rows([len(row) for row in rows], first=1), cache)
    for index, row in enumerate(rows):
        with torch.no_grad():
            expected = model.model(torch.cat((row, following[index]))[None]).last_hidden_state[0]
        whole = torch.cat((prompts[index, : len(row)], got[index]))
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("llama", {"mlp_bias": True}, "without bias"),
        ("llama", {"hidden_act": "gelu"}, "SwiGLU"),
        ("llama", {"is_causal": False}, "not causal"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding"),
        ("qwen3", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
    ],
)
def test_architectures_that_would_be_computed_wrongly_are_refused(
    kind: str, options: dict[str, object], reason: str
) -> None:
    model = tiny_model(kind, **options)
    with pytest.raises(ValueError, match=reason):
        TargetForward.of(model)


def test_a_head_of_which_a_scaled_rope_rotates_a_part_is_refused() -> None:
    """Kernels would read the tables past their ends; `transformers` does not run it either."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = tiny_model(rope_parameters=rope)
    assert unsupported_reason(model.config) is None
    with pytest.raises(ValueError, match="rotates 8 of 16"):
        TargetForward.of(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"num_attention_heads": 2}, "q_proj"),
        ({"head_dim": 8}, "q_proj"),
        ({"vocab_size": 16}, None),
        ({"intermediate_size": 48}, "gate_proj"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(options: dict[str, int], named: str | None) -> None:
    model = tiny_model()
    for name, value in options.items():
        setattr(model.config, name, value)
    with pytest.raises(RuntimeError, match=named):
        TargetForward.of(model)


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.q_norm", "self_attn.k_norm", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj",
        "input_layernorm", "post_attention_layernorm",
    ],
)  # fmt: skip
def test_a_weight_of_another_size_is_refused_by_its_name(name: str) -> None:
    """Kernels believe sizes: they would read past its end."""
    model = tiny_model("qwen3")
    weights = model.state_dict()
    full = f"model.layers.1.{name}.weight"
    weights[full] = weights[full][..., :-8].contiguous()
    with pytest.raises(RuntimeError, match=full):
        TargetForward(model.config, weights)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_an_end_of_another_size_is_refused(name: str) -> None:
    model = tiny_model()
    weights = model.state_dict()
    weights[name] = weights[name][..., :-8].contiguous()
    with pytest.raises(RuntimeError):
        TargetForward(model.config, weights)


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("qwen2", {}, ["k_proj.bias"]),
        ("qwen2", {}, ["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
        ("qwen3", {}, ["k_norm.weight"]),
        ("qwen3", {}, ["q_norm.weight", "k_norm.weight"]),
        ("llama", {"attention_bias": True}, ["o_proj.bias"]),
    ],
)
def test_a_bias_or_norm_that_the_architecture_has_is_missing_where_the_files_lack_it(
    kind: str, options: dict[str, object], names: list[str]
) -> None:
    """All of a kind may be missing, as one shard's: without them it would be another architecture."""
    model = tiny_model(kind, **options)
    weights = model.state_dict()
    for name in names:
        del weights[f"model.layers.0.self_attn.{name}"]
    with pytest.raises(KeyError, match=names[0]):
        TargetForward(model.config, weights)


def test_biases_that_the_config_does_not_name_are_left_out_as_transformers_leaves_them_out() -> None:
    model = tiny_model("llama")
    tokens_BT = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(1))
    weights = model.state_dict()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weights[f"model.layers.0.self_attn.{name}.bias"] = torch.ones(
            len(weights[f"model.layers.0.self_attn.{name}.weight"])
        )
    forward = TargetForward(model.config, weights)
    got = forward.logits(forward.forward(tokens_BT, Rows([0]), forward.new_cache(1, 9)))
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens_BT).logits, atol=1e-4, rtol=1e-4)
