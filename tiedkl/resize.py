"""More or fewer rows for a Parameter and for what an optimizer keeps about it. `TiedHead.resize` uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer


def resized(x: Tensor, rows: int) -> Tensor:
    """A new tensor (rows, ...) with the first rows of `x`, and zeros beyond them."""
    out = torch.zeros((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    kept = min(rows, x.shape[0])
    out[:kept] = x[:kept]
    return out


def check_resizable(module: nn.Module, name: str) -> Parameter:
    """Parameter `name` of `module`. RuntimeError where it is something else than a plain Parameter."""
    parameter = module._parameters.get(name)
    if type(parameter) is not Parameter:
        found = "a parametrization" if parameter is None else type(parameter).__name__
        raise RuntimeError(
            f"{name} is {found}, not a plain Parameter: resize before sharding or parametrizing the model"
        )
    return parameter


def aligned_state(optimizer: Optimizer, rows: Mapping[Parameter, int]) -> dict[Parameter, dict[str, Any]]:
    """The optimizer's state of each parameter of `rows`, with that many rows. Changes nothing.

    A state tensor has a row for each of the parameter's when it broadcasts to the parameter's shape with all of its
    rows (momentum, or the row statistics of Adafactor). One element, or one row for all, stays as it is.

    ValueError for any other tensor, and when the optimizer holds none of the parameters.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in rows):
        raise ValueError("optimizer holds none of this module's parameters: pass the one that trains them")
    states: dict[Parameter, dict[str, Any]] = {}
    for parameter, n in rows.items():
        if parameter in optimizer.state:
            old = optimizer.state[parameter]
            states[parameter] = {key: _aligned(key, value, parameter, n) for key, value in old.items()}
    return states


def _aligned(key: str, value: Any, parameter: Parameter, rows: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or (value.numel() == 1 and len(parameter) != 1):
        return value
    if value.dim() == parameter.dim():
        fits = all(a in (1, b) for a, b in zip(value.shape[1:], parameter.shape[1:], strict=True))
        if fits and value.shape[0] == parameter.shape[0]:
            return resized(value, rows)
        if fits and value.shape[0] == 1:
            return value
    raise ValueError(
        f"optimizer state {key!r} of shape {tuple(value.shape)} has no row for each of the parameter's "
        f"{tuple(parameter.shape)}: make a new optimizer after resizing"
    )


def adopt(optimizer: Optimizer, old: Parameter, new: Parameter, state: dict[str, Any] | None) -> None:
    """Put `new` in the place of `old`, with `state`."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = state
