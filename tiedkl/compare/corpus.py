"""Text to token ids: reading, splitting into words (tokenizer.py: into subwords), the vocabulary, and the three splits.

Three sources: a directory in the Penn Treebank layout (`*.train.txt`, `*.valid.txt`, `*.test.txt`, one sentence a line,
already tokenised), one text file, or the help texts that every CPython carries in `pydoc_data.topics`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .settings import CompareError
from .text_checks import copied_share, unigram_perplexity
from .tokenizer import Tokenizer

T = TypeVar("T")
UNK, EOS = "<unk>", "<eos>"
SPLITS = ("train", "valid", "test")
N_BLOCKS = 100  # a single text is cut into so many blocks; of each ten, eight train, one validates, one tests
WORDS = re.compile(rf"{UNK}|\.{{3}}|\w+(?:['’]\w+)*|[^\w\s]")
N_UNKNOWN = 20  # unknown words that the report lists
RULES = re.compile(r"([^\w\s])\1{3,}")  # underlines and table borders
LOWERED = "lower-cased and split at punctuation"
TOKENISED = "taken as already tokenised: split at white space only"
BLANK_LINE = re.compile(r"\n\s*\n")
BLOCK_SPLIT = (
    f"{N_BLOCKS} equal blocks of consecutive tokens; "
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
    oov: dict[str, float]  # share of a split's tokens that are not in the vocabulary, or `<unk>` in the text, 0..1
    eos: int = 1  # id of the end of a unit
    unknown: tuple[tuple[str, int], ...] = ()  # the most frequent unknown words of validation and test
    known: dict[str, Any] | None = None  # what else the report says about the vocabulary
    whole: int | None = None  # training tokens before `max_tokens` shortened them
    copied: float | None = None  # share of the test tokens in lines or paragraphs that are in the training text, 0..1

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
            "whole_training_text": self.whole,
            "oov_rate": self.oov,
            "unknown_words": [list(pair) for pair in self.unknown],
            "vocabulary_facts": self.known or {},
            "unigram_ppl": unigram_perplexity(self.train, self.valid, self.test, len(self.words)),
            "copied": self.copied,
            "sha256": digest.hexdigest(),
        }


def load(
    data: str | None,
    *,
    vocab_size: int = 10_000,
    min_count: int | None = None,
    max_tokens: int | None = None,
    tokenizer: str | None = None,
) -> Corpus:
    """`read`, and shorten at once."""
    return read(data, vocab_size=vocab_size, min_count=min_count, tokenizer=tokenizer)(max_tokens)


def read(
    data: str | None, *, vocab_size: int = 10_000, min_count: int | None = None, tokenizer: str | None = None
) -> Callable[[int | None], Corpus]:
    """What gives the corpus at `data`, a directory, a file, or None for Python's help texts, as long as one wants it.

    vocab_size counts `<unk>` and `<eos>`; words seen less than `min_count` times in training become `<unk>`. Its
    default is 2, and 1 where the training text has `<unk>` in it, since somebody has chosen the vocabulary then. Both
    are unused with `tokenizer`, the path of a tokenizer.json. The result takes `max_tokens`: the training split is
    shortened to so many tokens and the others to a tenth of it, None shortens nothing; the vocabulary is that of the
    whole training split all the same, since it decides what temperature and gamma mean. Both raise CompareError with
    the reason.
    """
    name, units = read_units(data)
    split = BLOCK_SPLIT if isinstance(units, list) else "the files of the directory"

    def shorten(texts: dict[str, list[T]], max_tokens: int | None) -> dict[str, list[T]]:
        if max_tokens is not None:
            texts = {k: v[: max_tokens if k == "train" else max(1, max_tokens // 10)] for k, v in texts.items()}
        for k, v in texts.items():
            if not v:
                raise CompareError(f"{data or name}: the {k} split is empty; give more text")
        return texts

    if tokenizer is not None:
        tool = Tokenizer(tokenizer)
        encoded = split_units(units, tool.encode)
        ratio = tool.tokens_per_word(units, encoded.values())

        def of_subwords(max_tokens: int | None) -> Corpus:
            ids = shorten(encoded, max_tokens)
            known = tool.facts(ratio, ids["train"])
            oov = {k: v.count(tool.unk) / len(v) if tool.unk is not None else 0.0 for k, v in ids.items()}
            train, valid, test = (torch.tensor(ids[k], dtype=torch.int64) for k in SPLITS)
            whole, copied = len(encoded["train"]), copied_share(ids["train"], ids["test"], tool.eos)
            return Corpus(
                name, split, tool.tokens, train, valid, test, oov, tool.eos, known=known, whole=whole, copied=copied
            )

        return of_subwords

    texts = split_units(units, lambda u: list(_tokens(u)) if isinstance(units, list) else _lines(u))
    if min_count is None:
        min_count = 1 if UNK in texts["train"] else 2
    words = build_vocabulary(texts["train"], vocab_size, min_count)
    distinct = len(set(texts["train"]) | {UNK, EOS})
    index = {word: i for i, word in enumerate(words)}
    kind = f"words of the training text, {LOWERED if isinstance(units, list) else TOKENISED}"

    def of_words(max_tokens: int | None) -> Corpus:
        short = shorten(texts, max_tokens)
        train, valid, test = (torch.tensor([index.get(w, 0) for w in short[k]], dtype=torch.int64) for k in SPLITS)
        oov = {k: sum(w == UNK or w not in index for w in v) / len(v) for k, v in short.items()}
        unknown = Counter(w for k in ("valid", "test") for w in short[k] if w not in index).most_common(N_UNKNOWN)
        known = {"kind": kind, "distinct_training_words": distinct, "coverage": {k: 1.0 - v for k, v in oov.items()}}
        whole, copied = len(texts["train"]), copied_share(short["train"], short["test"], EOS)
        return Corpus(
            name, split, words, train, valid, test, oov,
            unknown=tuple(unknown), known=known, whole=whole, copied=copied,
        )  # fmt: skip

    return of_words


def read_units(data: str | None) -> tuple[str, list[str] | dict[str, list[str]]]:
    """The text's name, and its units (lines or paragraphs): one list, or one for each split of a directory."""
    if data is None:
        return "Python's help texts (pydoc_data.topics)", builtin_units()
    path = Path(data).expanduser()
    if path.is_dir():
        return str(path.name), read_directory(path)
    if path.is_file():
        return path.name, text_units(read_text(path))
    raise CompareError(f"{data}: no such file or directory")


def split_units(
    units: list[str] | dict[str, list[str]], encode: Callable[[Iterable[str]], list[T]]
) -> dict[str, list[T]]:
    """The tokens of each split."""
    if isinstance(units, dict):
        return {k: encode(v) for k, v in units.items()}
    return split_blocks(encode(units))


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
    """The lines of each split of a directory that hold anything."""
    texts = {}
    for split in SPLITS:
        found = sorted(path.glob(f"*.{split}.txt"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise CompareError(f"{path}: expected one file *.{split}.txt, found {names}")
        texts[split] = [line for line in read_text(found[0]).splitlines() if line.strip()]
    return texts


def _lines(units: Iterable[str]) -> list[str]:
    """Text that is already tokenised: divided on white space only, `<eos>` after each line."""
    return [w for line in units for w in (*line.split(), EOS)]


def text_tokens(text: str) -> list[str]:
    """Raw text in lower case, punctuation apart, `<eos>` after each unit."""
    return list(_tokens(text_units(text)))


def text_units(text: str) -> list[str]:
    """Paragraphs where blank lines are common (hard-wrapped text), else lines."""
    lines = text.splitlines()
    blank = sum(not line.strip() for line in lines)
    return BLANK_LINE.split(text) if blank > len(lines) / 20 else lines


def builtin_tokens() -> list[str]:
    """The words of `builtin_units`."""
    return list(_tokens(builtin_units()))


def builtin_units() -> list[str]:
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
    return list(dict.fromkeys(" ".join(p.split()) for p in BLANK_LINE.split(text)))


def _tokens(units: Iterable[str]) -> Iterator[str]:
    for unit in units:
        words = WORDS.findall(RULES.sub(" ", unit.lower()))
        if words:
            yield from words
            yield EOS


def split_blocks(tokens: list[T]) -> dict[str, list[T]]:
    """`BLOCK_SPLIT`: every part of the text, early and late, is in each split."""
    edges = [len(tokens) * k // N_BLOCKS for k in range(N_BLOCKS + 1)]
    texts: dict[str, list[T]] = {split: [] for split in SPLITS}
    for k in range(N_BLOCKS):
        texts[{8: "valid", 9: "test"}.get(k % 10, "train")] += tokens[edges[k] : edges[k + 1]]
    return texts


def batches(stream: Tensor, n_seq: int, eos: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (T, n_seq): the stream in `n_seq` consecutive columns, every token a target once.

    The first token is predicted from `<eos>`; the last column is padded with `<eos>` as input and -100 as target.
    """
    n_steps = -(-len(stream) // n_seq)
    pad = n_steps * n_seq - len(stream)
    inputs = torch.cat([torch.tensor([eos]), stream[:-1], torch.full((pad,), eos)])
    targets = torch.cat([stream, torch.full((pad,), -100)])
    return inputs.view(n_seq, n_steps).T.contiguous(), targets.view(n_seq, n_steps).T.contiguous()
