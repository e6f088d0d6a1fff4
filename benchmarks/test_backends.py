"""Every backend: forward alone, forward and backward, both strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiedkl import backends
from tiedkl.bench.candidates import Candidate, candidates
from tiedkl.bench.measure import BOUND
from tiedkl.bench.shapes import MIB, Workload
from tiedkl.bench.steps import inputs, prepare, relative, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRICT = 8 * MIB


def check_and_time(benchmark: Any, w: Workload, c: Candidate) -> None:
    """Right in the first 64 tokens, then timed."""
    h, weight, y = inputs(w)
    few = h.detach()[:64].clone().requires_grad_()
    right = truth(w, few, weight, y[:64], c.kl)
    found = prepare(c, w.mode, few, weight, y[:64])()
    for name, x in zip(("loss", "dh", "dw"), found, strict=True):
        if x is not None:
            assert relative(x, right[name]) <= BOUND[w.dtype], name
    step = prepare(c, w.mode, h, weight, y)

    def timed() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{w.mode} {w.dtype}"
    benchmark.pedantic(timed, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("workspace", [None, STRICT], ids=["default", "strict"])
@pytest.mark.parametrize("impl", backends.BACKENDS)
def test_backend(
    benchmark: Any, size: tuple[int, int, int], impl: str, workspace: int | None, mode: str, dtype: str
) -> None:
    w = Workload(*size, dtype, DEVICE, mode=mode, targets="zipf", workspace_bytes=workspace)
    why = backends.load(impl).unsupported(torch.device(DEVICE), w.torch_dtype)
    if why:
        pytest.skip(why)
    check_and_time(benchmark, w, candidates(w, [impl], compiled=False)[f"tiedkl {impl}"])


@pytest.mark.parametrize("name", ["eager CE+KL", "eager CE"])
def test_eager(benchmark: Any, size: tuple[int, int, int], name: str) -> None:
    """What the backends are compared with."""
    w = Workload(*size, "float32", DEVICE, targets="zipf")
    check_and_time(benchmark, w, candidates(w, [], compiled=False)[name])
