"""Pretrained word vectors as the similarity source: rows for a vocabulary, to be given as `target_weight`.

Text files of word2vec, GloVe and fastText (a word and its numbers on a line, with or without a header line), the binary
files of word2vec, all three with gzip or without, and matrices in safetensors files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .vectors import Row, read_binary, read_safetensors, read_text

log = logging.getLogger("tiedkl")

MISSING = ("mean", "zero", "normal", "error")
FORMATS = ("auto", "text", "binary", "safetensors")
MISSING_ROW, LOWER_CASE, AS_WRITTEN = range(3)  # how a word was found
SHOWN = 5  # words that a message lists


@dataclass(frozen=True)
class EmbeddingReport:
    """What `load_embeddings` found. `str()` of it is one readable line."""

    path: str
    format: str  # "text", "binary" or "safetensors"
    vocabulary: int  # V
    width: int  # D'
    rows: int  # in the file
    found: int  # words of the vocabulary that have a vector
    lowercased: int  # of these, found in lower case only
    duplicates: int  # rows not used, because their word, one of the vocabulary, had a row before
    missing: list[str]  # words without a vector, in the vocabulary's order

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that has a vector."""
        return self.found / self.vocabulary

    def __str__(self) -> str:
        text = f"{self.path} ({self.format}, {self.rows} x {self.width}): {self.found} of {self.vocabulary} words found"
        text += f" ({self.coverage:.1%})"
        text += f", {self.lowercased} in lower case" * bool(self.lowercased)
        text += f", {self.duplicates} duplicates not used" * bool(self.duplicates)
        return text + (f"; missing: {_some(self.missing)}" if self.missing else "")


def load_embeddings(
    path: str | Path,
    vocabulary: Sequence[str] | Mapping[str, int],
    *,
    format: str = "auto",
    name: str | None = None,
    words: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    missing: str = "mean",
    lowercase: bool = False,
    normalize: bool = False,
    norm: float | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    header: bool | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, EmbeddingReport]:
    """Rows of an embedding file for a vocabulary, (V, D'), ready to be a `target_weight`.

    Similarities are dot products divided by the temperature: the vectors' length decides how sharp the target is, and
    `normalize` and `norm` set it. The result requires no gradient; register it as a buffer to keep it so.

    The file is read once, as a stream, and only rows that are wanted are kept. Of the others a text file's numbers are
    counted, not read.

    Args:
        path: the file. gzip is recognised by its content.
        vocabulary: words by id, or ids 0 to V - 1 by word.
        format: "text", "binary" (word2vec) or "safetensors"; "auto" goes by the name: .safetensors, .bin, others text.
        name: the tensor in a safetensors file; not needed where the file has only one matrix.
        words: the words of a safetensors matrix's rows. None: row i is for id i, and rows from V on are padding.
        dtype: of the result. Sums for `missing` and `norm` are float32 or better.
        missing: rows of words that are not in the file: "mean" of the rows found, "zero", "normal" with mean and
            standard deviation of each column of the rows found, or "error".
        lowercase: look a word that is not there as it is written up in lower case.
        normalize: scale every row to length 1 (zero rows stay zero).
        norm: then scale all rows by one number that makes the root mean square of their lengths this.
        encoding, errors: of the words, as in `open`.
        header: whether a text file starts with "rows width"; None: it does if its first line is two whole numbers.
        generator: for missing="normal".
        progress: called now and then with bytes read and bytes in all (compressed ones of a gzip file; rows of a
            safetensors file).

    Returns:
        The matrix and an `EmbeddingReport`.

    Raises:
        ValueError: for arguments; for an empty file, a malformed line (with its number), a row of another width, wrong
        encoding; when no word is found at all, or one is missing and `missing="error"`.
        OSError: when the file cannot be read. ImportError: without the safetensors package for such a file.
    """
    path = Path(path)
    if missing not in MISSING:
        raise ValueError(f"missing={missing!r} is not one of {', '.join(map(repr, MISSING))}")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(map(repr, FORMATS))}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating dtype")
    if norm is not None and not 0 < norm < float("inf"):
        raise ValueError(f"norm={norm} is outside (0, inf)")
    if format == "auto":
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        format = {".safetensors": "safetensors", ".bin": "binary"}.get(suffix, "text")
    if format != "safetensors" and (name is not None or words is not None):
        raise ValueError(f"name and words are for safetensors files, got format={format!r}")
    own = _by_id(vocabulary)
    by_number = format == "safetensors" and words is None
    exact, lower = _ids(range(len(own)) if by_number else own), _lower(own) if lowercase and not by_number else {}

    def wanted(key: str | int) -> bool:
        return key in exact or key in lower

    if format == "safetensors":
        rows = read_safetensors(path, name, words, wanted, progress)
    elif format == "binary":
        rows = read_binary(path, wanted, encoding, errors, progress)
    else:
        rows = read_text(path, wanted, encoding, errors, header, progress)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    matrix, how, count, duplicates = _collect(rows, len(own), exact, lower, work)
    if by_number and count < len(own):
        raise ValueError(f"{path} has {count} rows for a vocabulary of {len(own)}: say in words= whose they are")
    found, absent = how > MISSING_ROW, [own[i] for i in (how == MISSING_ROW).nonzero()[:, 0].tolist()]
    if len(absent) == len(own):
        advice = "" if lowercase else "; lowercase=True looks up lower case too"
        raise ValueError(f"{path}: none of the {len(own)} words has a vector, such as {_some(own)}{advice}")
    if absent and missing == "error":
        raise ValueError(f"{path}: {len(absent)} of {len(own)} words have no vector: {_some(absent)}")
    _fill(matrix, found, missing, generator)
    if normalize:
        matrix = torch.nn.functional.normalize(matrix, dim=1)
    if norm is not None:
        rms = matrix.norm(dim=1, dtype=torch.float64).square().mean().sqrt()
        if rms == 0:
            raise ValueError(f"{path}: all vectors are zero, and have no norm to be scaled to {norm}")
        matrix = matrix * (norm / rms).to(work)
    report = EmbeddingReport(
        path=str(path),
        format=format,
        vocabulary=len(own),
        width=matrix.shape[1],
        rows=count,
        found=len(own) - len(absent),
        lowercased=int((how == LOWER_CASE).sum()),
        duplicates=duplicates,
        missing=absent,
    )
    log.info("%s", report)
    return matrix.to(dtype), report


def _collect(
    rows: Iterable[Row],
    n_vocab: int,
    exact: Mapping[str | int, list[int]],
    lower: Mapping[str | int, list[int]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, int, int]:
    """The matrix (V, D'), how each of its rows was found (V,), the number of rows and of duplicates."""
    matrix, how = torch.zeros(n_vocab, 0, dtype=dtype), torch.full((n_vocab,), MISSING_ROW)
    seen: set[str | int] = set()
    count = duplicates = 0
    for key, vector in rows:
        count += 1
        if vector is None:
            continue
        if key in seen:
            duplicates += 1
            continue
        if not seen:
            matrix = torch.zeros(n_vocab, len(vector), dtype=dtype)
        if not bool(vector.isfinite().all()):
            raise ValueError(f"the vector of {key!r} has a number that is not finite")
        seen.add(key)
        for i in exact.get(key, ()):
            matrix[i], how[i] = vector, AS_WRITTEN
        for i in lower.get(key, ()):
            if how[i] == MISSING_ROW:
                matrix[i], how[i] = vector, LOWER_CASE
    return matrix, how, count, duplicates


def _fill(matrix: Tensor, found: Tensor, missing: str, generator: torch.Generator | None) -> None:
    """Rows that were not found, in place; they are zero now."""
    absent = int((~found).sum())
    if not absent or missing == "zero":
        return
    there = matrix[found]
    rows = there.mean(0).expand(absent, -1)
    if missing == "normal":
        noise = torch.randn(absent, matrix.shape[1], dtype=matrix.dtype, generator=generator)
        rows = rows + there.std(0, correction=0) * noise
    matrix[~found] = rows


def _by_id(vocabulary: Sequence[str] | Mapping[str, int]) -> list[str]:
    if isinstance(vocabulary, str):
        raise ValueError("vocabulary must be words by id, or ids by word, got a str")
    if not isinstance(vocabulary, Mapping):
        words = list(vocabulary)
    elif sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"vocabulary: the ids of its {len(vocabulary)} words are not 0 to {len(vocabulary) - 1}")
    else:
        words = sorted(vocabulary, key=vocabulary.__getitem__)
    if not words:
        raise ValueError("vocabulary is empty")
    return words


def _ids(keys: Iterable[str | int]) -> dict[str | int, list[int]]:
    ids: dict[str | int, list[int]] = {}
    for i, key in enumerate(keys):
        ids.setdefault(key, []).append(i)
    return ids


def _lower(words: Sequence[str]) -> dict[str | int, list[int]]:
    return {w: [i for i in ids if words[i] != w] for w, ids in _ids(w.lower() for w in words).items()}


def _some(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words[:SHOWN])) + (", ..." if len(words) > SHOWN else "")
