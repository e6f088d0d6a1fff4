"""What a text itself says of a comparison on it: how far word counts get, and how much of its test split is a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import perplexity

SHORTEST = 5  # tokens of a unit that is no coincidence


def unigram_perplexity(train: Tensor, test: Tensor, n_vocab: int) -> float:
    """The perplexity of `test` for one who knows how often each token is in `train`, and nothing of their order.

    Both are 1-D int64 ids below `n_vocab`; one is added to each count, so that no token is impossible.
    """
    counts = torch.bincount(train, minlength=n_vocab).double() + 1.0
    return perplexity(-float(torch.log(counts / counts.sum())[test].mean()))


def copied_share(train: Tensor, test: Tensor, eos: int) -> float:
    """The share (0..1) of `test`'s tokens in units of five tokens or more that stand in `train` word for word.

    Both are 1-D int64 ids; `eos` ends a unit, a line or a paragraph.
    """
    known = set(_units(train, eos))
    copied = sum(len(unit) for unit in _units(test, eos) if len(unit) >= SHORTEST and unit in known)
    return copied / max(1, len(test))


def _units(tokens: Tensor, eos: int) -> list[tuple[int, ...]]:
    """The units of a stream, each with its end."""
    ends = (tokens == eos).nonzero().flatten().tolist()
    ids, units, start = tokens.tolist(), [], 0
    for end in (*ends, len(ids) - 1):
        if end >= start:
            units.append(tuple(ids[start : end + 1]))
            start = end + 1
    return units
