"""The C++ walk on a GPU (csrc/cuda/walk.cpp): cuBLAS products and row kernels over blocks of float32 logits.

Nothing waits for the device and there are no atomics: a step can be captured in a CUDA graph, and reruns give the same
bits. The number of distinct targets stays on the device. A kernel multiplies the similarities of half-precision rows
and reads the number there: they cost rho. Those of float32 rows, and the products of the target gradient, are cuBLAS's,
taken at their capacity of min(C, V) rows: they cost a unit each.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan, Tuning
from ..problem import Grads, Needs, Problem, Terms
from . import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Block sizes by reckoning, not tried against others on a GPU. Logits and similarities in float32, G in the place of the
# logits, every token with a target of its own. Rows of h and w are read where they are; those of the similarity source
# are gathered where they are cuBLAS's to multiply: in float32, and for the target gradient.
FULL = Tuning(
    z_buffers=1,
    s_buffers=1,
    row_buffers=0,
    token_block=8192,
    min_token_block=512,  # fewer rows leave cuBLAS short of work and pass over d_w too often
    min_vocab_block=2048,  # d_h and d_w are read and written once a block: about as wide as high moves least
    panel=1 << 62,
    targets_per_token=1.0,
    widened=0,
    delta_buffers=1,  # the target gradient's block, in the input dtype
    row_copies=False,
    target_copies=1.0,
    all_targets=True,
    all_target_grads=True,
    vocab_multiple=128,  # the walk rounds rows of its blocks up to 32 floats
)
HALF = replace(FULL, delta_buffers=0.5, target_copies=0, all_targets=False)


@functools.cache
def extension() -> ModuleType | str:
    """The compiled module, or the reason why it cannot be loaded."""
    return _native.load("_C_cuda")


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for `architectures`, such as "sm_80 sm_90a compute_90", runs on a device of this capability.

    sm_XY runs within its major version, compute_XY (compiled when it is loaded) on anything newer; neither does with a
    letter behind it, which stands for that very device.
    """
    for kind, digits, letter in re.findall(r"(sm|compute)_(\d+)([a-z]?)", architectures):
        built = divmod(int(digits), 10)
        if built == capability or (
            not letter and built < capability and (kind == "compute" or built[0] == capability[0])
        ):
            return True
    return False


@functools.cache
def _missing_code(device: torch.device, architectures: str) -> str | None:
    """Why code for `architectures` does not run on a GPU, or None."""
    if architectures == "host":
        return "tiedkl._C_cuda was compiled for the host, which is for tests"
    capability = torch.cuda.get_device_capability(device)
    if runs_on(capability, architectures):
        return None
    major, minor = capability
    return (
        f"tiedkl._C_cuda was built for {architectures}, {device} has capability {major}.{minor}; "
        f"reinstall tiedkl with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None on NVIDIA GPUs when the extension is built for them."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported: tensor cores multiply float32, bfloat16 and float16"
    module = extension()
    if device.type == "cpu" and not isinstance(module, str) and module.build_info()["architectures"] == "host":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"it runs on an NVIDIA GPU, got device {device}"
    return module if isinstance(module, str) else _missing_code(device, module.build_info()["architectures"])


def tuning(dtype: torch.dtype, device: torch.device) -> Tuning:
    """Blocks in units of the accumulation dtype."""
    return FULL if dtype == torch.float32 else HALF


def _walk(p: Problem, plan: Plan, g: Tensor | None, needs: Needs) -> tuple[Terms, Grads]:
    module: Any = extension()
    arguments = _native.arguments(p, plan, g, needs)
    if p.h.device.type == "cpu":  # tests
        terms, *grads = module.walk(*arguments, 0)
    else:
        with torch.cuda.device(p.h.device):
            terms, *grads = module.walk(*arguments, torch.cuda.current_stream().cuda_stream)
    return Terms(*terms.unbind(0)), Grads(*grads)


def forward(problem: Problem, plan: Plan) -> Terms:
    """Per-token terms in 1 + rho GEMMs, 2 + 2 rho in vocabulary blocks; rho is 1 in float32."""
    return _walk(problem, plan, None, Needs())[0]


def backward(problem: Problem, plan: Plan, g: Tensor, needs: Needs) -> tuple[Terms, Grads]:
    """Per-token terms and gradients in one walk: 3 + rho GEMMs, 4 + 2 rho in vocabulary blocks; rho is 1 in float32."""
    return _walk(problem, plan, g.contiguous(), needs)
