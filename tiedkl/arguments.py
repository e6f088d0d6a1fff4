"""Every check of what users pass to `FusedTiedLoss`, and the form in which tiedkl.ops takes it.

Sources of the rules: the docstring of `FusedTiedLoss`.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .problem import Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Number = int | float


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high or value == math.inf or (open_low and value == low):  # NaN fails the first
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name}={value} is outside {interval}")
    return float(value)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    return value


class Settings(NamedTuple):
    """Everything about a loss that is not a tensor, checked."""

    scalars: ops.Scalars  # needs = 0
    impl: str
    return_terms: bool


def check_settings(
    *,
    temperature: float,
    gamma: float,
    alpha: float | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    target_grad: bool,
    workspace_bytes: int | None,
    impl: str,
    return_terms: bool,
) -> Settings:
    """The options of `FusedTiedLoss`. TypeError for types, ValueError for ranges and enums."""
    temperature = _number("temperature", temperature, 0.0, math.inf, open_low=True)
    gamma = _number("gamma", gamma, 0.0, math.inf)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    for name, flag in (("target_grad", target_grad), ("return_terms", return_terms)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    if workspace_bytes is not None:
        if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
            raise TypeError(f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}")
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes={workspace_bytes} must be positive")
    options = Options(
        temperature=temperature,
        alpha=gamma * temperature if alpha is None else _number("alpha", alpha, 0.0, math.inf),
        label_smoothing=_number("label_smoothing", label_smoothing, 0.0, 1.0),
        z_loss=_number("z_loss", z_loss, 0.0, math.inf),
        softcap=0.0 if softcap is None else _number("softcap", softcap, 0.0, math.inf, open_low=True),
        target_grad=target_grad,
    )
    scalars = ops.Scalars(
        options=options,
        ignore_index=ignore_index,
        reduction=ops.REDUCTIONS.index(_choice("reduction", reduction, ops.REDUCTIONS)),
        workspace_bytes=-1 if workspace_bytes is None else workspace_bytes,
        needs=0,
    )
    return Settings(scalars, _choice("impl", _impl(impl), ("auto", *backends.BACKENDS)), return_terms)


def _impl(impl: str) -> str:
    """The `impl` argument, or TIEDKL_IMPL where it says "auto"."""
    return os.environ.get("TIEDKL_IMPL") or impl if impl == "auto" else impl


def _tensor(name: str, x: object, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, input is on {device}")
    return x


def is_dtensor(x: object) -> bool:
    """Whether x is a `torch.distributed.tensor.DTensor`, without importing that package."""
    return type(x).__name__ == "DTensor"


def _no_dtensor(name: str, x: object) -> None:
    if is_dtensor(x):
        raise TypeError(
            f"{name} is a DTensor with placements {getattr(x, 'placements', ())}. Tensor parallelism: use "
            "tiedkl.distributed.VocabParallelTiedLoss. FSDP: compute the loss inside the forward of the module that "
            "fully_shard wraps, where the weight is whole. See docs/distributed.md"
        )


class Call(NamedTuple):
    """The tensors of one call, checked and flattened, in the order of the op's arguments."""

    h: Tensor  # (N, D)
    w: Tensor  # (V, D)
    target: Tensor  # (N,)
    b: Tensor | None
    t: Tensor | None
    token_weight: Tensor | None  # (N,)
    num_items: Tensor | None  # ()
    shape: torch.Size  # of `target`


def check_call(
    settings: Settings,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    target_weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Number | Tensor | None,
    shift: int,
    *,
    empty: bool = False,
) -> Call:
    """Check, autocast, shift and flatten the tensors. TypeError for dtypes, ValueError for shapes and devices.

    `empty` allows a `weight` without rows, as the shard of a vocabulary may be.
    """
    for name, x in (("input", input), ("weight", weight), ("target", target), ("bias", bias)):
        _no_dtensor(name, x)
    _no_dtensor("target_weight", target_weight)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    device = input.device
    weight, target = _tensor("weight", weight, device), _tensor("target", target, device)
    floats = {"input": input, "weight": weight}
    if bias is not None:
        floats["bias"] = _tensor("bias", bias, device)
    if target_weight is not None:
        floats["target_weight"] = _tensor("target_weight", target_weight, device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        floats = {
            k: x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for k, x in floats.items()
        }
    input, weight = floats["input"], floats["weight"]
    bias, target_weight = floats.get("bias"), floats.get("target_weight")
    if input.dtype not in DTYPES:
        raise TypeError(f"input.dtype={input.dtype} is not one of {', '.join(map(str, DTYPES))}")
    for name, x in floats.items():
        if x.dtype != input.dtype:
            raise TypeError(f"{name}.dtype={x.dtype} does not match input.dtype={input.dtype}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target.dtype={target.dtype} is not torch.int64 or torch.int32")
    if input.dim() < 1:
        raise ValueError("input must have at least one dimension (..., D), got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (V, D), got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0 and not empty:
        raise ValueError("weight.shape[0]=0: the vocabulary is empty")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input.shape[-1]={input.shape[-1]} does not match weight.shape[1]={weight.shape[1]}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target.shape={tuple(target.shape)} does not match input.shape[:-1]={tuple(input.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias.shape={tuple(bias.shape)} does not match weight.shape[:1]={tuple(weight.shape[:1])}")
    if target_weight is not None and (target_weight.dim() != 2 or target_weight.shape[0] != weight.shape[0]):
        raise ValueError(
            f"target_weight.shape={tuple(target_weight.shape)} does not match (weight.shape[0]={weight.shape[0]}, D')"
        )
    if token_weight is not None:
        token_weight = _tensor("token_weight", token_weight, device)
        if not token_weight.is_floating_point():
            raise TypeError(f"token_weight.dtype={token_weight.dtype} is not a floating dtype")
        if token_weight.shape != target.shape:
            raise ValueError(
                f"token_weight.shape={tuple(token_weight.shape)} does not match target.shape={tuple(target.shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError(
                "token_weight requires a gradient, but it is treated as a constant: pass token_weight.detach()"
            )
    count = _num_items(num_items, ops.REDUCTIONS[settings.scalars.reduction], device)
    target, token_weight = shift_targets(target, token_weight, shift, settings.scalars.ignore_index)
    return Call(
        h=input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input,
        w=weight,
        target=target.reshape(-1),
        b=bias,
        t=target_weight,
        token_weight=None if token_weight is None else token_weight.reshape(-1),
        num_items=count,
        shape=target.shape,
    )


def _num_items(num_items: Number | Tensor | None, reduction: str, device: torch.device) -> Tensor | None:
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_items applies to reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must hold one number, got shape {tuple(num_items.shape)}")
        return num_items.detach().reshape(()).to(device)
    value = _number("num_items", num_items, 0.0, math.inf, open_low=True)
    # A count above 2^24 is no float32. Filled in place: a copy from the host would wait for the device.
    return torch.full((), value, dtype=torch.float64, device=device)


def shift_targets(
    target: Tensor, token_weight: Tensor | None, shift: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Targets `shift` places ahead, the last ones ignored: the input itself is not copied."""
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift must be an int, got {type(shift).__name__}")
    if shift == 0:
        return target, token_weight
    if target.dim() == 0 or not 0 < shift <= target.shape[-1]:
        raise ValueError(f"shift={shift} is outside [0, target.shape[-1]] for target.shape={tuple(target.shape)}")
    ahead = torch.full_like(target, ignore_index, memory_format=torch.contiguous_format)
    ahead[..., :-shift] = target[..., shift:]
    if token_weight is not None:
        weights = torch.zeros_like(token_weight, memory_format=torch.contiguous_format)
        weights[..., :-shift] = token_weight[..., shift:]
        token_weight = weights
    return ahead, token_weight
