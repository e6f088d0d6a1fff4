"""What the backends over a compiled extension, cpp and cuda, have in common."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from ..problem import Needs, Problem


def load(name: str) -> ModuleType | str:
    """The compiled module `tiedkl.<name>`, or the reason why it cannot be loaded."""
    try:
        module = importlib.import_module(f"tiedkl.{name}")
    except ImportError as error:
        return f"the extension tiedkl.{name} cannot be loaded ({error}); `tiedkl doctor` says how to build it"
    built = str(module.build_info().get("torch", torch.__version__)).split("+")[0]
    if built != torch.__version__.split("+")[0]:
        return f"tiedkl.{name} was built for torch {built}, this is torch {torch.__version__}; reinstall tiedkl"
    return module


def arguments(p: Problem, plan: Plan, g: Tensor | None, needs: Needs) -> tuple[Any, ...]:
    """What an extension's `walk` takes (csrc/arguments.h)."""
    o = p.options
    return (
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
