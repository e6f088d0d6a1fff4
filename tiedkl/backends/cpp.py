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
    try:
        from .. import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return f"the extension tiedkl._C cannot be loaded ({error}); `tiedkl doctor` says how to build it"
    built = str(_C.build_info().get("torch", torch.__version__)).split("+")[0]
    if built != torch.__version__.split("+")[0]:
        return f"tiedkl._C was built for torch {built}, this is torch {torch.__version__}; reinstall tiedkl"
    return _C


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None on CPU tensors when the extension is built."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got device {device}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported"
    module = extension()
    return module if isinstance(module, str) else None


def tuning(dtype: torch.dtype) -> Tuning:
    """Half-precision weights are widened panel by panel, but for bfloat16 where the processor multiplies it."""
    module: Any = extension()
    return NATIVE_BF16 if dtype == torch.bfloat16 and module.build_info()["bf16_products"] else TUNING


def _walk(p: Problem, plan: Plan, g: Tensor | None, needs: Needs) -> tuple[Terms, Grads]:
    module: Any = extension()
    o = p.options
    terms, *grads = module.walk(
        p.h,
        p.w,
        p.y.contiguous(),
        p.b,
        p.t,
        g,
        o.temperature,
        o.alpha,
        o.label_smoothing,
        o.z_loss,
        o.softcap,
        o.target_grad,
        (needs.h, needs.w, needs.b, needs.t),
        (plan.token_block, plan.target_block, plan.vocab_block, plan.panel),
    )
    return Terms(*terms.unbind(0)), Grads(*grads)


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms in 1 + rho GEMMs (2 + 2 rho in vocabulary blocks)."""
    return _walk(problem, plan, None, Needs())[0]


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients in one walk."""
    return _walk(problem, plan, g.contiguous(), needs)
