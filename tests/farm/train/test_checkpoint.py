"""A resumed optimizer goes on in its own tensors: a fused one keeps them, the step too, beside the parameters."""

from pathlib import Path

import torch
from torch import Tensor, nn

from farm.train.checkpoint import Progress, load_state, save_state, set_weights
from farm.train.held_out import Best


class Engine:
    """What a checkpoint asks of DeepSpeed's engine, around a plain optimizer."""

    def __init__(self) -> None:
        self.module = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)
        self.steps: dict[Tensor, Tensor] = {}  # those of the optimizer, as it made them

    def gradient_accumulation_steps(self) -> int:
        return 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps = {weight: state["step"] for weight, state in self.optimizer.state.items()}

    def train(self, seed: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        self.backward(self.module(x).square().sum())
        self.step()


def test_the_step_is_set_where_the_optimizer_keeps_it_and_the_next_one_is_as_if_unbroken(
    tmp_path: Path,
) -> None:
    whole, resumed = Engine(), Engine()
    for seed in range(3):
        whole.train(seed)
    save_state(whole, tmp_path, Progress(3, ((0, 1.5),)), writes=True)
    assert load_state(resumed, tmp_path) == Progress(3, ((0, 1.5),))
    for weight, step in resumed.steps.items():
        assert resumed.optimizer.state[weight]["step"] is step, "a tensor of its own may be on another device"
        assert step.item() == 3.0
    for one in (whole, resumed):
        one.train(7)
    for left, right in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_the_best_so_far_is_in_the_state_and_can_be_put_back(tmp_path: Path) -> None:
    engine, resumed = Engine(), Engine()
    engine.train(0)
    best = Best.of(1, 1.1 + 2**-40, engine.module)
    engine.train(1)
    progress = Progress(2, ((0, 1.5),), ((1, best.tau), (2, 1.0)), best)
    save_state(engine, tmp_path, progress, writes=True)
    found = load_state(resumed, tmp_path)
    assert found == progress
    assert found.best is not None
    torch.testing.assert_close(
        dict(resumed.module.named_parameters()), dict(engine.module.named_parameters())
    )
    set_weights(resumed.module, found.best.weights)
    for name, weight in resumed.module.named_parameters():
        assert torch.equal(weight, best.weights[name])
        assert not torch.equal(weight, engine.module.get_parameter(name))
