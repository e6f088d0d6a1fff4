"""Implementations of the loss, one module each, all with the same four names.

    unsupported(device, dtype) -> str | None             None when it can run, else the reason
    tuning(dtype, device) -> Tuning                      block sizes it likes, for tiedkl.plan
    forward(problem, plan) -> Terms
    backward(problem, plan, g, needs) -> (Terms, Grads)  g (N,) upstream weights

The choice depends on device and dtype only.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Not `import torch`: the submodule of that name becomes an attribute of this package.
from torch import device as Device
from torch import dtype as Dtype

# In the order `auto` tries them. Triton's kernels are faster on an H200 than the CUDA extension, with either workspace.
BACKENDS: tuple[str, ...] = ("cpp", "triton", "cuda", "torch", "reference")


def load(name: str) -> ModuleType:
    """The backend module called `name`, one of BACKENDS."""
    return importlib.import_module(f".{name}", __name__)


def choose(impl: str, device: Device, dtype: Dtype) -> tuple[str, dict[str, str]]:
    """The backend for `impl` and why every other one was passed over. RuntimeError when a named one cannot run."""
    if impl != "auto":
        why = load(impl).unsupported(device, dtype)
        if why:
            raise RuntimeError(f"impl={impl!r} cannot run: {why}")
        return impl, {name: f"impl={impl!r} was asked for" for name in BACKENDS if name != impl}
    chosen, skipped = "", {}
    for name in BACKENDS:
        if chosen:
            skipped[name] = f"{chosen} comes first"
            continue
        why = load(name).unsupported(device, dtype)
        if why is None and name in ("triton", "cuda") and device.type == "cpu":
            why = "on a CPU it is for tests"
        if why is None:
            chosen = name
        else:
            skipped[name] = why
    return chosen, skipped
