"""The C++ walk (csrc/driver.cpp) with vectorised row kernels (csrc/cpu/row_kernels.cpp)."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan, Tuning
from ..problem import Grads, Needs, Problem, Terms
from . import _native

# AMD EPYC 9R14-class, 2 cores, 2026-11; docs/design.md has the measurements.
TUNING = Tuning(
    z_buffers=1,
    s_buffers=1,
    row_buffers=1,
    token_block=512,
    min_token_block=48,
    min_vocab_block=512,
    panel=1024,
    shared_rows=True,
)
NATIVE_BF16 = replace(TUNING, widened=0)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def extension() -> ModuleType | str:
    """The compiled module, or the reason why it cannot be loaded."""
    return _native.load("_C")


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None on CPU tensors when the extension is built."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got device {device}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported"
    module = extension()
    return module if isinstance(module, str) else None


def tuning(dtype: torch.dtype, device: torch.device) -> Tuning:
    """Half-precision weights are widened panel by panel, but for bfloat16 where the processor multiplies it."""
    module: Any = extension()
    return NATIVE_BF16 if dtype == torch.bfloat16 and module.build_info()["bf16_products"] else TUNING


def _walk(p: Problem, plan: Plan, g: Tensor | None, needs: Needs) -> tuple[Terms, Grads]:
    module: Any = extension()
    terms, *grads = module.walk(*_native.arguments(p, plan, g, needs))
    return Terms(*terms.unbind(0)), Grads(*grads)


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms in 1 + rho GEMMs (2 + 2 rho in vocabulary blocks)."""
    return _walk(problem, plan, None, Needs())[0]


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients in one walk."""
    return _walk(problem, plan, g.contiguous(), needs)
