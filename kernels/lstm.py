"""The element-wise part of an LSTM's step, for the models that `tiedkl compare` trains: a kernel each way.

Gates lie in the order o, i, f, g; everything is float32 and contiguous. tiedkl/compare/lstm.py has the loop and the
products around them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .exponential import exp
from .launch import cdiv
from .launch import current as current
from .tile import at_least, tanh

COLUMNS = 128  # of a program


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), to a few ulp; of what is below -80 as of -80, 1.8e-35."""
    return 1.0 / (1.0 + exp(-at_least(tl.where(x > 80.0, 80.0, x), -80.0)))


@triton.jit
def lstm_cell_kernel(
    gates,  # (B, 4H): sums of products; replaced by the gates
    c,  # (B, H)
    c_next,  # (B, H), written
    tanh_c,  # (B, H), written: tanh of c_next
    hm_next,  # (B, H), written: the hidden state after the mask
    mask,  # (B, H)
    H,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step forward. Grid (columns / BLOCK, B)."""
    row, j = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at, gate = j < H, row * H + j, gates + row * 4 * H + j
    o = sigmoid(tl.load(gate, mask=inside, other=0.0))
    i = sigmoid(tl.load(gate + H, mask=inside, other=0.0))
    f = sigmoid(tl.load(gate + 2 * H, mask=inside, other=0.0))
    g = tanh(tl.load(gate + 3 * H, mask=inside, other=0.0))
    new = i * g + f * tl.load(c + at, mask=inside, other=0.0)
    squashed = tanh(new)
    hidden = o * squashed
    if HAS_MASK:
        hidden *= tl.load(mask + at, mask=inside, other=0.0)
    tl.store(gate, o, mask=inside)
    tl.store(gate + H, i, mask=inside)
    tl.store(gate + 2 * H, f, mask=inside)
    tl.store(gate + 3 * H, g, mask=inside)
    tl.store(c_next + at, new, mask=inside)
    tl.store(tanh_c + at, squashed, mask=inside)
    tl.store(hm_next + at, hidden, mask=inside)


@triton.jit
def lstm_cell_gradient_kernel(
    gates,  # (B, 4H)
    c,  # (B, H) before the step
    tanh_c,  # (B, H) of the cell after it
    mask,  # (B, H)
    d_hm,  # (B, H) gradient of the hidden state after the mask
    d_c,  # (B, H) gradient of the cell after the step, by what comes later; replaced by that of the cell before it
    d_gates,  # (B, 4H), written: gradient of the sums of products
    H,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step backward. Grid (columns / BLOCK, B)."""
    row, j = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at, gate = j < H, row * H + j, row * 4 * H + j
    o = tl.load(gates + gate, mask=inside, other=0.0)
    i = tl.load(gates + gate + H, mask=inside, other=0.0)
    f = tl.load(gates + gate + 2 * H, mask=inside, other=0.0)
    g = tl.load(gates + gate + 3 * H, mask=inside, other=0.0)
    squashed = tl.load(tanh_c + at, mask=inside, other=0.0)
    d_h = tl.load(d_hm + at, mask=inside, other=0.0)
    if HAS_MASK:
        d_h *= tl.load(mask + at, mask=inside, other=0.0)
    d_cell = tl.load(d_c + at, mask=inside, other=0.0) + d_h * o * (1.0 - squashed * squashed)
    d_f = d_cell * tl.load(c + at, mask=inside, other=0.0)
    tl.store(d_gates + gate, d_h * squashed * o * (1.0 - o), mask=inside)
    tl.store(d_gates + gate + H, d_cell * g * i * (1.0 - i), mask=inside)
    tl.store(d_gates + gate + 2 * H, d_f * f * (1.0 - f), mask=inside)
    tl.store(d_gates + gate + 3 * H, d_cell * i * (1.0 - g * g), mask=inside)
    tl.store(d_c + at, d_cell * f, mask=inside)


def cell(gates: Tensor, c: Tensor, c_next: Tensor, tanh_c: Tensor, hm_next: Tensor, mask: Tensor | None) -> None:
    """A step of B sequences, in place: sums of products `gates` (B, 4H) and c (B, H) to everything else (B, H)."""
    n_seq, n_hid = c.shape
    lstm_cell_kernel[(cdiv(n_hid, COLUMNS), n_seq)](
        gates, c, c_next, tanh_c, hm_next, c if mask is None else mask, n_hid, HAS_MASK=mask is not None, BLOCK=COLUMNS
    )


def cell_gradient(
    gates: Tensor, c: Tensor, tanh_c: Tensor, mask: Tensor | None, d_hm: Tensor, d_c: Tensor, d_gates: Tensor
) -> None:
    """A step backward: `d_gates` (B, 4H) is written, `d_c` (B, H) replaced by the gradient of the cell before."""
    n_seq, n_hid = c.shape
    lstm_cell_gradient_kernel[(cdiv(n_hid, COLUMNS), n_seq)](
        gates, c, tanh_c, c if mask is None else mask, d_hm, d_c, d_gates, n_hid,
        HAS_MASK=mask is not None, BLOCK=COLUMNS,
    )  # fmt: skip
