"""Text to token ids: reading, splitting into words, the vocabulary, and the three splits.

Three sources: a directory in the Penn Treebank layout (`*.train.txt`, `*.valid.txt`, `*.test.txt`, one sentence a line,
already tokenised), one text file, or the help texts that every CPython carries in `pydoc_data.topics`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .settings import CompareError

UNK, EOS = "<unk>", "<eos>"
SPLITS = ("train", "valid", "test")
N_BLOCKS = 100  # a single text is cut into so many blocks; of each ten, eight train, one validates, one tests
WORDS = re.compile(rf"{UNK}|\.{{3}}|\w+(?:['’]\w+)*|[^\w\s]")
RULES = re.compile(r"([^\w\s])\1{3,}")  # underlines and table borders
BLANK_LINE = re.compile(r"\n\s*\n")
BLOCK_SPLIT = (
    f"{N_BLOCKS} equal blocks of consecutive words; "
    "of each ten, eight for training, the ninth for validation, the tenth for test"
)


@dataclass(frozen=True)
class Corpus:
    """Three streams of token ids, each 1-D int64, and where they came from."""

    name: str
    split: str  # how the splits were made, in words
    words: list[str]  # id -> word
    train: Tensor
    valid: Tensor
    test: Tensor
    oov: dict[str, float]  # share of a split's tokens that are not in the vocabulary, 0..1

    def facts(self) -> dict[str, Any]:
        """What the report says about the corpus; `sha256` identifies the token streams and the vocabulary."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for split in SPLITS:
            digest.update(getattr(self, split).numpy().tobytes())
        return {
            "name": self.name,
            "split": self.split,
            "vocabulary": len(self.words),
            "tokens": {split: len(getattr(self, split)) for split in SPLITS},
            "oov_rate": self.oov,
            "sha256": digest.hexdigest(),
        }


def load(data: str | None, *, vocab_size: int = 10_000, min_count: int = 2, max_tokens: int | None = None) -> Corpus:
    """The corpus at `data`: a directory, a file, or None for Python's help texts.

    vocab_size counts `<unk>` and `<eos>`; words seen less than `min_count` times in training become `<unk>`;
    `max_tokens` shortens the training split to so many tokens and the others to a tenth of it. Raises CompareError with
    the reason.
    """
    if data is None:
        name, split, texts = "Python's help texts (pydoc_data.topics)", BLOCK_SPLIT, split_blocks(builtin_tokens())
    else:
        path = Path(data).expanduser()
        if path.is_dir():
            name, split, texts = str(path.name), "the files of the directory", read_directory(path)
        elif path.is_file():
            name, split, texts = path.name, BLOCK_SPLIT, split_blocks(text_tokens(read_text(path)))
        else:
            raise CompareError(f"{data}: no such file or directory")
    if max_tokens is not None:
        texts = {k: v[: max_tokens if k == "train" else max(1, max_tokens // 10)] for k, v in texts.items()}
    for k, v in texts.items():
        if not v:
            raise CompareError(f"{data or name}: the {k} split is empty; give more text")
    words = build_vocabulary(texts["train"], vocab_size, min_count)
    ids = {word: i for i, word in enumerate(words)}
    streams = {k: torch.tensor([ids.get(w, 0) for w in v], dtype=torch.int64) for k, v in texts.items()}
    oov = {k: sum(w not in ids for w in v) / len(v) for k, v in texts.items()}
    return Corpus(name, split, words, streams["train"], streams["valid"], streams["test"], oov)


def build_vocabulary(tokens: Iterable[str], size: int, min_count: int) -> list[str]:
    """`<unk>`, `<eos>`, then the most frequent words (ties in alphabetical order), at most `size` in all."""
    counts = Counter(tokens)
    del counts[UNK], counts[EOS]
    ranked = sorted((-n, word) for word, n in counts.items() if n >= min_count)
    return [UNK, EOS, *(word for _, word in ranked[: size - 2])]


def read_text(path: Path) -> str:
    """The file as text. Raises CompareError when it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CompareError(f"{path}: not UTF-8 text (byte {error.start}); convert it first, e.g. with iconv") from None
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise CompareError(f"{path}: the file is empty")
    return text


def read_directory(path: Path) -> dict[str, list[str]]:
    """Splits of a directory, divided on white space only, `<eos>` after each line."""
    texts = {}
    for split in SPLITS:
        found = sorted(path.glob(f"*.{split}.txt"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise CompareError(f"{path}: expected one file *.{split}.txt, found {names}")
        texts[split] = [w for line in read_text(found[0]).splitlines() if line.strip() for w in (*line.split(), EOS)]
    return texts


def text_tokens(text: str) -> list[str]:
    """Raw text in lower case, punctuation apart, `<eos>` after each unit.

    A unit is a paragraph where blank lines are common (hard-wrapped text), else a line.
    """
    lines = text.splitlines()
    blank = sum(not line.strip() for line in lines)
    return list(_tokens(BLANK_LINE.split(text) if blank > len(lines) / 20 else lines))


def builtin_tokens() -> list[str]:
    """Python's help texts, paragraph by paragraph, each paragraph once: topics quote one another.

    Repeats would put the same text into training and test.
    """
    try:
        from pydoc_data import topics
    except ImportError:
        raise CompareError(
            "this Python does not ship pydoc_data.topics, the default text; give your own with --data"
        ) from None
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return list(_tokens(dict.fromkeys(" ".join(p.split()) for p in BLANK_LINE.split(text))))


def _tokens(units: Iterable[str]) -> Iterator[str]:
    for unit in units:
        words = WORDS.findall(RULES.sub(" ", unit.lower()))
        if words:
            yield from words
            yield EOS


def split_blocks(tokens: list[str]) -> dict[str, list[str]]:
    """`BLOCK_SPLIT`: every part of the text, early and late, is in each split."""
    edges = [len(tokens) * k // N_BLOCKS for k in range(N_BLOCKS + 1)]
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for k in range(N_BLOCKS):
        texts[{8: "valid", 9: "test"}.get(k % 10, "train")] += tokens[edges[k] : edges[k + 1]]
    return texts


def batches(stream: Tensor, n_seq: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (T, n_seq): the stream in `n_seq` consecutive columns, every token a target once.

    The first token is predicted from `<eos>`; the last column is padded with `<eos>` as input and -100 as target.
    """
    n_steps = -(-len(stream) // n_seq)
    pad = n_steps * n_seq - len(stream)
    inputs = torch.cat([torch.tensor([1]), stream[:-1], torch.full((pad,), 1)])
    targets = torch.cat([stream, torch.full((pad,), -100)])
    return inputs.view(n_seq, n_steps).T.contiguous(), targets.view(n_seq, n_steps).T.contiguous()
