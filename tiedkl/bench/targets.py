"""Targets with the statistics that matter: how many of them are distinct decides what the similarity target costs.

    text       consecutive words of the help texts that every CPython carries; the default
    zipf       drawn with frequency 1 / (rank + 2.7)
    uniform    drawn evenly: nearly all are distinct, the worst case
    FILE       a text, whose words are counted in the same way; or token ids: a .npy file, a .pt file with one tensor,
               or a text file of nothing but integers

Words are numbered by how often the text has them, and those numbers are spread over the vocabulary by a fixed random
permutation; where the vocabulary is smaller than the text's, the rarest words share the last number. Words are not the
pieces of a subword tokeniser: for figures with your tokeniser's own statistics give a file of its ids. More tokens than
the text has are taken from its start again.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ..compare.corpus import builtin_tokens, read_text, text_tokens
from ..compare.settings import CompareError
from .errors import BenchError
from .shapes import IGNORE, Workload

KINDS = ("text", "zipf", "uniform")


def make_targets(w: Workload) -> Tensor:
    """(N,) int64 on the CPU, the same for the same workload; IGNORE where ignored. Raises BenchError."""
    generator = torch.Generator().manual_seed(w.tokens + w.vocab)
    if w.targets == "uniform":
        y = torch.randint(w.vocab, (w.tokens,), generator=generator)
    elif w.targets == "zipf":
        y = zipf(w.tokens, w.vocab, generator)
    else:
        y = _repeated(_stream(w.targets, w.vocab), w.tokens)
    if w.ignored:
        chosen = torch.randperm(w.tokens, generator=generator)[: min(w.tokens - 1, round(w.ignored * w.tokens))]
        y = y.index_fill(0, chosen, IGNORE)
    return y


def zipf(n: int, v: int, generator: torch.Generator) -> Tensor:
    """(n,) ids with frequency 1 / (rank + 2.7), ranks shuffled over the vocabulary."""
    p = 1 / (torch.arange(v, dtype=torch.float64) + 2.7)
    return torch.randperm(v, generator=generator)[torch.multinomial(p, n, replacement=True, generator=generator)]


def describe(w: Workload) -> str:
    """Where the targets come from, for the report."""
    if w.targets == "text":
        n = len(_words("text"))
        again = f", from its start again after {n:,}" if w.tokens > n else ""
        return f"words of Python's help texts{again}"
    if w.targets in KINDS:
        return {"zipf": "drawn by Zipf's law", "uniform": "drawn evenly"}[w.targets]
    return f"from {Path(w.targets).name}"


def _repeated(stream: Tensor, n: int) -> Tensor:
    return stream.repeat(-(-n // len(stream)))[:n]


def _stream(source: str, vocab: int) -> Tensor:
    """All ids of a source, in its order."""
    ids = None if source == "text" else _ids(source)
    if ids is not None:
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
            found = f"ids from {int(ids.min())} to {int(ids.max())}" if len(ids) else "no ids"
            raise BenchError(f"--targets {source}: {found} do not fit a vocabulary of {vocab}")
        return ids
    words = _words(source)
    ranked = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))
    number = {word: min(i, vocab - 1) for i, (word, _) in enumerate(ranked)}
    spread = torch.randperm(vocab, generator=torch.Generator().manual_seed(vocab))
    return spread[torch.tensor([number[word] for word in words])]


@functools.cache
def _words(source: str) -> list[str]:
    try:
        return builtin_tokens() if source == "text" else text_tokens(read_text(Path(source).expanduser()))
    except CompareError as error:
        raise BenchError(f"--targets {source}: {error}") from None


@functools.cache
def _ids(source: str) -> Tensor | None:
    """The file's token ids; None for a text."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise BenchError(f"--targets {source}: expected one of {', '.join(KINDS)}, or a file; there is no such file")
    try:
        if path.suffix == ".npy":
            import numpy

            ids = torch.from_numpy(numpy.load(path).astype("int64"))
        elif path.suffix == ".pt":
            ids = torch.load(path, weights_only=True).long()
        else:
            text = read_text(path)
            if not re.fullmatch(r"[\s\d,]+", text):
                return None
            ids = torch.tensor([int(x) for x in text.replace(",", " ").split()])
    except Exception as error:  # whatever a broken file makes its reader raise
        raise BenchError(f"--targets {source}: not readable ({type(error).__name__}: {error})") from None
    return ids.reshape(-1)
