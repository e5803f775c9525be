# T tokens, H hidden, V vocabulary
"""EAGLE-1 in one file, from the description of the format alone: what another engine makes of config.json and tensors.

One Llama layer without an input norm behind `fc([e(x_{t+1}) ; h_t])`, without a norm behind it, as a whole causal
sequence. It shares no code with farm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.groups, self.size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.theta = c["rope_theta"]
        h = c["hidden_size"]
        self.q_proj = nn.Linear(h, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(h, self.groups * self.size, bias=False)
        self.v_proj = nn.Linear(h, self.groups * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, h, bias=False)

    def turn(self, x: Tensor) -> Tensor:
        """RoPE of [heads, T, D] at positions 0..T-1, halves rotated."""
        t, half = x.shape[1], self.size // 2
        angle = torch.arange(t)[:, None] * self.theta ** (-torch.arange(half) / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, x_TH: Tensor) -> Tensor:
        t = len(x_TH)
        q = self.turn(self.q_proj(x_TH).view(t, self.heads, self.size).transpose(0, 1))
        k = self.turn(self.k_proj(x_TH).view(t, self.groups, self.size).transpose(0, 1))
        v = self.v_proj(x_TH).view(t, self.groups, self.size).transpose(0, 1)
        each = self.heads // self.groups
        k, v = k.repeat_interleave(each, dim=0), v.repeat_interleave(each, dim=0)
        scores = q @ k.transpose(1, 2) / self.size**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        return self.o_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(t, -1))


class Mlp(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        h, f = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])

    def forward(self, x: Tensor) -> Tensor:
        a = x + self.self_attn(x)
        return a + self.mlp(self.post_attention_layernorm(a))


class Eagle1(nn.Module):
    """The draft as SGLang declares it; vLLM's has no `fc.bias`."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        h = c["hidden_size"]
        self.fc = nn.Linear(2 * h, h, bias=True)
        self.layers = nn.ModuleList([Layer(c)])

    def forward(self, embedded_TH: Tensor, hidden_TH: Tensor) -> Tensor:
        """Predicted hidden states [T, H]."""
        predicted: Tensor = self.layers[0](self.fc(torch.cat((embedded_TH, hidden_TH), dim=-1)))
        return predicted

    @classmethod
    def load(cls, folder: Path) -> Eagle1:
        """Every tensor of the file has its place, and every parameter its tensor."""
        tensors = load_file(folder / "model.safetensors")
        draft = cls(json.loads((folder / "config.json").read_text())).to(next(iter(tensors.values())).dtype)
        draft.load_state_dict(tensors, strict=True)
        return draft.eval().requires_grad_(False)
