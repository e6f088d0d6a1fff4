"""The Triton kernels of an LSTM's step against PyTorch's operations in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tiedkl import backends
from tiedkl.compare import lstm

pytest.importorskip("triton")
if backends.load("triton").unsupported(torch.device("cpu"), torch.float32):
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tiedkl.kernels import lstm as kernels

STEPS, SEQUENCES, WIDTH = 4, 3, kernels.COLUMNS + 21


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_window_is_that_of_pytorch(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, the state to carry on and every gradient, as near to float64 as PyTorch's float32 is."""
    torch.manual_seed(0)
    net = lstm.VariationalLSTM(WIDTH, 2, dropout).double()
    for p in net.parameters():
        torch.nn.init.uniform_(p, -0.3, 0.3)
    x = torch.randn(STEPS, SEQUENCES, WIDTH).double()
    x[:, 0] *= 30.0  # gates saturate
    x[:, 1] = 0.0  # cells near zero
    state = [(torch.randn(SEQUENCES, WIDTH), 1e-3 * torch.randn(SEQUENCES, WIDTH)) for _ in range(2)]
    upstream = torch.randn(STEPS, SEQUENCES, WIDTH)
    masks = net.masks(SEQUENCES, torch.Generator().manual_seed(1))

    def run(dtype: torch.dtype, kernels: ModuleType | None) -> list[torch.Tensor]:
        monkeypatch.setattr(lstm, "_kernels", lambda device, dtype: kernels)
        net.to(dtype)
        monkeypatch.setattr(net, "masks", lambda n, g: [m if m is None else m.to(dtype) for m in masks])
        mine = x.to(dtype).requires_grad_()
        out, carried = net(mine, [(h.to(dtype), c.to(dtype)) for h, c in state], torch.Generator())
        grads = torch.autograd.grad(out, [mine, *net.parameters()], upstream.to(dtype))
        return [t.detach().double() for t in (out, *(t for pair in carried for t in pair), *grads)]

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got - want).norm() / want.norm())

    for want, plain, got in zip(
        run(torch.float64, None), run(torch.float32, None), run(torch.float32, kernels), strict=True
    ):
        assert error(got, want) < 1.5 * error(plain, want) + 5e-8


def test_functions() -> None:
    """Near zero, where they saturate, at infinity and of no number."""
    x = torch.tensor([[0.0, 1e-6, -1e-3, 0.5, -3.0, 20.0, -50.0, 300.0, float("inf"), float("-inf"), float("nan")]])
    n = x.shape[1]
    gates = torch.cat([x, x, x, x], 1)
    c, new, squashed, hidden = torch.zeros(1, n), torch.empty(1, n), torch.empty(1, n), torch.empty(1, n)
    kernels.cell(gates, c, new, squashed, hidden, None)
    sigmoid, tanh = x.double().sigmoid(), x.double().tanh()
    for got, want in zip(gates.chunk(4, 1), (sigmoid, sigmoid, sigmoid, tanh), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-7, atol=1e-17, equal_nan=True)
    torch.testing.assert_close(
        hidden.double(), sigmoid * (sigmoid * tanh).tanh(), rtol=2e-6, atol=1e-17, equal_nan=True
    )
