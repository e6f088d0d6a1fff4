"""LSTM with variational dropout, made cheap: one input GEMM a layer and window, and a hand-written backward.

Variational dropout (Gal and Ghahramani 2016, as used by Inan et al. 2017) draws one mask a sequence and keeps it
through the unrolled window; the same mask hides a hidden unit from its own recurrence and from the layer above.
`nn.LSTM` cannot do that, and a Python loop recorded by autograd spends much of its time on bookkeeping. Here a layer is
one autograd node: the forward loop runs in preallocated buffers, and the backward loop holds one GEMM and four
element-wise operations a step, because every factor that does not depend on the incoming gradient is computed for the
whole window at once. On a GPU, where a small operation costs its launch and no more, Triton's kernels (kernels/lstm.py)
are the element-wise part of a step: one each way.

Symbols: T steps, B sequences, D input width, H units. Gates lie in the order o, i, f, g, so that the three sigmoids are
contiguous, and so are the three gates that the cell gradient drives.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends

State = list[tuple[Tensor, Tensor]]  # one (h, c) a layer, each (B, H), h before its mask


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The Triton kernels of a step, where there are any for such tensors."""
    if device.type != "cuda" or dtype != torch.float32 or backends.load("triton").unsupported(device, dtype):
        return None
    return importlib.import_module("tiedkl.kernels.lstm")


class _LSTMWindow(torch.autograd.Function):
    """One layer over one window.

    x (T, B, D), h0, c0 (B, H), w_x (4H, D), w_h (4H, H), b (4H,), mask (B, H) or None, and what `_kernels` gives ->
    masked hidden states (T, B, H), and the last h (unmasked) and c, each (B, H), which carry no gradient:
    back-propagation is truncated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_x: Tensor,
        w_h: Tensor,
        b: Tensor,
        mask: Tensor | None,
        kernels: ModuleType | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_steps, n_seq, _ = x.shape
        n_hid = h0.shape[1]
        gates = torch.addmm(b, x.reshape(n_steps * n_seq, -1), w_x.T).view(n_steps, n_seq, 4 * n_hid)
        hm = x.new_empty(n_steps + 1, n_seq, n_hid)  # hidden states after the mask; [0] is the carried one
        c = x.new_empty(n_steps + 1, n_seq, n_hid)
        tanh_c = x.new_empty(n_steps, n_seq, n_hid)
        torch.mul(h0, 1.0 if mask is None else mask, out=hm[0])
        c[0] = c0
        w_ht = w_h.T
        hm_at, c_at = hm.unbind(0), c.unbind(0)
        o, i, f, g = (part.unbind(0) for part in gates.chunk(4, dim=-1))
        sigmoids, all_gates, tanh_c_at = gates[..., : 3 * n_hid].unbind(0), gates.unbind(0), tanh_c.unbind(0)
        with kernels.current(x.device) if kernels else contextlib.nullcontext():
            for t in range(n_steps):
                all_gates[t].addmm_(hm_at[t], w_ht)
                if kernels:
                    kernels.cell(all_gates[t], c_at[t], c_at[t + 1], tanh_c_at[t], hm_at[t + 1], mask)
                    continue
                sigmoids[t].sigmoid_()
                g[t].tanh_()
                torch.mul(i[t], g[t], out=c_at[t + 1]).addcmul_(f[t], c_at[t])
                torch.tanh(c_at[t + 1], out=tanh_c_at[t])
                torch.mul(o[t], tanh_c_at[t], out=hm_at[t + 1])
                if mask is not None:
                    hm_at[t + 1].mul_(mask)
        ctx.kernels = kernels
        ctx.save_for_backward(x, w_x, w_h, gates, hm, c, tanh_c, mask)
        h_last, c_last = o[-1] * tanh_c_at[-1], c_at[-1].clone()
        ctx.mark_non_differentiable(h_last, c_last)
        return hm[1:], h_last, c_last

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *_: Tensor) -> Any:
        x, w_x, w_h, gates, hm, c, tanh_c, mask = ctx.saved_tensors
        n_steps, n_seq, n_hid = tanh_c.shape
        d_hm = d_out.clone(memory_format=torch.contiguous_format)
        known = gates, c, tanh_c, mask, w_h, d_hm
        d_gates = _gate_gradients_by(ctx.kernels, *known) if ctx.kernels else _gate_gradients(*known)
        flat = d_gates.view(n_steps * n_seq, 4 * n_hid)
        d_x = (flat @ w_x).view_as(x) if ctx.needs_input_grad[0] else None
        d_w_x = flat.T @ x.reshape(n_steps * n_seq, -1)
        d_w_h = flat.T @ hm[:-1].reshape(n_steps * n_seq, n_hid)
        return d_x, None, None, d_w_x, d_w_h, flat.sum(0), None, None


def _gate_gradients(gates: Tensor, c: Tensor, tanh_c: Tensor, mask: Tensor | None, w_h: Tensor, d_hm: Tensor) -> Tensor:
    """Gradient (T, B, 4H) of the sums of products. d_hm (T, B, H): by the layer above; later steps add theirs."""
    n_hid = tanh_c.shape[-1]
    o, i, f, g = gates.chunk(4, dim=-1)
    masked_o, masked_tanh = (o, tanh_c) if mask is None else (o * mask, tanh_c * mask)
    # d gates = k * (d_hm for o, d_c for the rest); k is known before the loop starts
    k = torch.empty_like(gates)
    driven = torch.cat([masked_tanh, g, c[:-1]], -1)  # what o, i and f multiply
    oif = slice(None, 3 * n_hid)
    torch.ops.aten.sigmoid_backward(driven, gates[..., oif], grad_input=k[..., oif])
    torch.ops.aten.tanh_backward(i, g, grad_input=k[..., 3 * n_hid :])
    k_c = torch.ops.aten.tanh_backward(masked_o, tanh_c)
    d_gates = torch.empty_like(gates)
    d_c = torch.zeros_like(c[0])
    rows, d_hm_at = d_gates.unbind(0), d_hm.unbind(0)
    d_o = d_gates[..., :n_hid].unbind(0)
    d_ifg = d_gates[..., n_hid:].unflatten(-1, (3, n_hid)).unbind(0)
    k_ifg_at = k[..., n_hid:].unflatten(-1, (3, n_hid)).unbind(0)
    k_o_at, k_c_at, f_at = k[..., :n_hid].unbind(0), k_c.unbind(0), f.unbind(0)
    d_c_wide = d_c.unsqueeze(1)
    for t in range(len(gates) - 1, -1, -1):
        torch.mul(d_hm_at[t], k_o_at[t], out=d_o[t])
        d_c.addcmul_(d_hm_at[t], k_c_at[t])
        torch.mul(d_c_wide, k_ifg_at[t], out=d_ifg[t])
        if t:
            d_c.mul_(f_at[t])
            d_hm_at[t - 1].addmm_(rows[t], w_h)
    return d_gates


def _gate_gradients_by(
    kernels: ModuleType, gates: Tensor, c: Tensor, tanh_c: Tensor, mask: Tensor | None, w_h: Tensor, d_hm: Tensor
) -> Tensor:
    """The same with Triton's kernels."""
    d_gates, d_c = torch.empty_like(gates), torch.zeros_like(c[0])
    with kernels.current(gates.device):
        for t in range(len(gates) - 1, -1, -1):
            kernels.cell_gradient(gates[t], c[t], tanh_c[t], mask, d_hm[t], d_c, d_gates[t])
            if t:
                d_hm[t - 1].addmm_(d_gates[t], w_h)
    return d_gates


def draw_mask(shape: tuple[int, ...], dropout: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Inverted-dropout mask: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    return like.new_empty(shape).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class VariationalLSTM(nn.Module):
    """Layers of H units on inputs of width H, (T, B, H) -> (T, B, H), with variational dropout when training.

    A window draws 1 + layers masks (B, H): one for the input, one for each layer's hidden state, which is used for its
    recurrence, for the next layer and, at the top, for the output layer.
    """

    def __init__(self, width: int, layers: int, dropout: float, triton: bool = True) -> None:
        """triton: whether its kernels may be used on a GPU."""
        super().__init__()
        self.width, self.dropout, self.triton = width, dropout, triton
        self.w_x = nn.ParameterList([nn.Parameter(torch.zeros(4 * width, width)) for _ in range(layers)])
        self.w_h = nn.ParameterList([nn.Parameter(torch.zeros(4 * width, width)) for _ in range(layers)])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(4 * width)) for _ in range(layers)])

    def start(self, n_seq: int) -> State:
        """Zero states for `n_seq` sequences."""
        zero = self.b[0].new_zeros(n_seq, self.width)
        return [(zero, zero) for _ in self.b]

    def masks(self, n_seq: int, generator: torch.Generator) -> list[Tensor | None]:
        """The window's masks, input first; None for each where nothing is dropped."""
        if not self.training or not self.dropout:
            return [None] * (len(self.b) + 1)
        shape = (n_seq, self.width)
        return [draw_mask(shape, self.dropout, self.b[0], generator) for _ in range(len(self.b) + 1)]

    def forward(self, x: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """x (T, B, H) and the carried state -> hidden states (T, B, H) and the new state, detached."""
        first, *masks = self.masks(x.shape[1], generator)
        if first is not None:
            x = x * first
        kernels = _kernels(x.device, x.dtype) if self.triton else None
        carried: State = []
        for w_x, w_h, b, mask, (h, c) in zip(self.w_x, self.w_h, self.b, masks, state, strict=True):
            x, h, c = _LSTMWindow.apply(x, h, c, w_x, w_h, b, mask, kernels)
            carried.append((h, c))
        return x, carried
