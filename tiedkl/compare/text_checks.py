"""What a text itself says of a comparison on it: how far word counts get, and how much of its test split is a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .statistics import perplexity

T = TypeVar("T", int, str)
SHORTEST = 5  # tokens of a unit that is no coincidence
LONGEST = 200  # of the units on average: more is a text without lines or paragraphs
ADDED = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # to every count


def unigram_perplexity(train: Tensor, valid: Tensor, test: Tensor, n_vocab: int) -> float:
    """The perplexity of `test` for one who knows how often each token is in `train`, and nothing of their order.

    All are 1-D int64 ids below `n_vocab`. So that no token is impossible, something is added to each count: what suits
    `valid` best, as a whole one is too much for a large vocabulary.
    """
    counts = torch.bincount(train, minlength=n_vocab).double()

    def cross_entropy(text: Tensor, added: float) -> float:
        return float(-torch.log((counts + added) / (len(train) + added * n_vocab))[text].mean())

    return perplexity(cross_entropy(test, min(ADDED, key=lambda added: cross_entropy(valid, added))))


def copied_share(train: Sequence[T], test: Sequence[T], eos: T) -> float | None:
    """The share (0..1) of `test`'s tokens in units of five tokens or more that stand in `train` word for word.

    `eos` ends a unit, a line or a paragraph. None where the text has hardly any.
    """
    units = list(_units(test, eos))
    if len(test) > LONGEST * len(units):
        return None
    known = set(_units(train, eos))
    return sum(len(unit) for unit in units if len(unit) >= SHORTEST and unit in known) / len(test)


def _units(tokens: Sequence[T], eos: T) -> Iterator[tuple[T, ...]]:
    """The whole units of a stream, each with its end."""
    start = 0
    while start < len(tokens):
        try:
            end = tokens.index(eos, start) + 1
        except ValueError:
            return
        yield tuple(tokens[start:end])
        start = end
