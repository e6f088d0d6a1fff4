"""A small pre-norm causal Transformer with learned positions; the context is one window, nothing is carried."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lstm import State, draw_mask


def head_count(width: int) -> int:
    """The most heads that divide `width` into at least 32 columns each."""
    return max(n for n in range(1, width + 1) if width % n == 0 and (n == 1 or width // n >= 32))


class Block(nn.Module):
    """x + drop(attention(norm(x))), then x + drop(mlp(norm(x))); x is (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.norm_a, self.norm_m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        x = x + drop(self._attention(self.norm_a(x)))
        return x + drop(self.down(F.gelu(self.up(self.norm_m(x)))))


class Transformer(nn.Module):
    """(T, B, D) -> (T, B, D) for windows of at most `window` steps; dropout on the input and each residual branch."""

    def __init__(self, width: int, layers: int, dropout: float, window: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.positions = nn.Parameter(torch.zeros(window, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def start(self, n_seq: int) -> State:
        """No state is carried."""
        return []

    def forward(self, x: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        def drop(x: Tensor) -> Tensor:
            if not self.training or not self.dropout:
                return x
            return x * draw_mask(tuple(x.shape), self.dropout, x, generator)

        x = drop(x.transpose(0, 1) + self.positions[: x.shape[0]])
        for block in self.blocks:
            x = block(x, drop)
        return self.norm(x).transpose(0, 1), state
