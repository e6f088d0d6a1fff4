"""Collectives of one process group, in the forms that the walk needs, and what all ranks have to agree on.

Every rank calls them in the same order. Nothing is sent for an empty tensor, which all ranks know to be empty.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ERRORS = {e.__name__: e for e in (TypeError, ValueError, RuntimeError)}
ODD = 0x9E3779B97F4A7C15 - (1 << 64)
HEADER = 6  # int64 that every rank sends ahead of a call

# Named *_into_tensor and *_tensor before torch 2.13, which warns of those names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """x over all ranks, in place; x has the same shape everywhere."""
    if x.numel():
        dist.all_reduce(x, op, group=group)
    return x


def all_gather(x: Tensor, sizes: list[int], group: Any) -> Tensor:
    """The ranks' x (sizes[rank], ...) one after another, (sum of sizes, ...). Shorter ones are padded on the way."""
    longest, rest = max(sizes), x.shape[1:]
    if longest == 0 or rest.numel() == 0:
        return x.new_empty(sum(sizes), *rest)
    padded = x.contiguous() if len(x) == longest else torch.cat([x, x.new_zeros(longest - len(x), *rest)])
    out = x.new_empty(longest * len(sizes), *rest)
    _all_gather(out, padded, group=group)
    return (
        torch.cat([part[:n] for part, n in zip(out.split(longest), sizes, strict=True)])
        if min(sizes) < longest
        else out
    )


def reduce_scatter(x: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
    """This rank's rows (sizes[rank], ...) of the sum of all ranks' x (sum of sizes, ...)."""
    longest, rest = max(sizes), x.shape[1:]
    if longest == 0 or rest.numel() == 0:
        return x.new_empty(sizes[rank], *rest)
    if min(sizes) < longest:
        padded = x.new_zeros(len(sizes), longest, *rest)
        for row, part in zip(padded, x.split(sizes), strict=True):
            row[: len(part)] = part
        x = padded.flatten(0, 1)
    out = x.new_empty(longest, *rest)
    _reduce_scatter(out, x.contiguous(), group=group)
    return out[: sizes[rank]]


def checksum(x: Tensor) -> int:
    """Of the bits and places of x; an int64."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().contiguous().view(kind).reshape(-1).to(torch.int64)
    mixed = (bits + torch.arange(len(bits), device=x.device) * ODD) * ODD
    return int((mixed ^ (mixed >> 29)).sum())


@dataclass
class Claim:
    """What one rank is about to compute."""

    facts: dict[str, object] = field(default_factory=dict)  # to be the same on every rank
    rows: int = 0  # of its shard of the vocabulary
    tokens: int = 0  # of its input
    low: int = 0  # smallest valid target
    high: int = -1  # largest one; below `low` without any
    error: Exception | None = None  # why it cannot


def agree(claim: Claim, group: Any) -> list[Claim]:
    """Every rank's claim, in rank order, but for `facts`. Raises the same error on every rank when one has failed or
    facts differ, so that none is left waiting for another.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
    checksum = zlib.crc32(repr(sorted(claim.facts.items())).encode())
    mine = [int(claim.error is not None), checksum, claim.rows, claim.tokens, claim.low, claim.high]
    out = torch.empty(HEADER * dist.get_world_size(group), dtype=torch.int64, device=device)
    _all_gather(out, torch.tensor(mine, dtype=torch.int64, device=device), group=group)
    headers = out.view(-1, HEADER).tolist()
    if any(h[0] for h in headers) or len({h[1] for h in headers}) > 1:
        _disagree(claim, group)
    return [Claim(rows=h[2], tokens=h[3], low=h[4], high=h[5]) for h in headers]


def _disagree(claim: Claim, group: Any) -> None:
    error = claim.error
    found: list[Any] = [None] * dist.get_world_size(group)
    own = (claim.facts, "" if error is None else type(error).__name__, str(error))
    dist.all_gather_object(found, own, group=group)
    failed = [(rank, kind, text) for rank, (_, kind, text) in enumerate(found) if kind]
    if failed:
        rank, kind, text = failed[0]
        everybody = len(failed) == len(found) and len({f[1:] for f in failed}) == 1
        raise ERRORS.get(kind, RuntimeError)(text if everybody else f"rank {rank} of the group: {text}") from error
    first = found[0][0]
    for rank, (facts, *_) in enumerate(found):
        for name in {**first, **facts}:
            a, b = first.get(name), facts.get(name)
            if a != b:
                raise ValueError(f"the ranks disagree: {name} is {a!r} on rank 0, {b!r} on rank {rank}")
    raise RuntimeError("the ranks disagree, but send the same facts: do all run the same version of tiedkl?")
