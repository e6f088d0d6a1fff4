"""Targets have the statistics they claim."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiedkl.bench.errors import BenchError
from tiedkl.bench.shapes import IGNORE, Workload
from tiedkl.bench.targets import describe, make_targets
from tiedkl.compare.corpus import builtin_tokens

TEXT = Workload(3000, 20_000, 8)


def test_text_repeats_words_as_the_text_does() -> None:
    y, words = make_targets(TEXT), builtin_tokens()[:3000]
    assert len(y.unique()) == len(set(words))
    assert sorted(Counter(y.tolist()).values()) == sorted(Counter(words).values())
    assert [(y == y[0]).nonzero().flatten().tolist()] == [[i for i, w in enumerate(words) if w == words[0]]]
    assert int(y.max()) > 10_000, "spread over the vocabulary, not packed at its start"
    assert torch.equal(y, make_targets(TEXT))


def test_a_small_vocabulary_shares_its_last_number() -> None:
    y = make_targets(replace(TEXT, vocab=50))
    assert int(y.max()) < 50
    frequent = {word for word, _ in Counter(builtin_tokens()).most_common(40)}
    rare = torch.tensor([word not in frequent for word in builtin_tokens()[:3000]])
    counts = Counter(y[rare].tolist()).most_common(2)
    assert counts[0][1] > 10 * counts[1][1], "all but the 49 most frequent words have one number"


def test_more_tokens_than_the_text_has_start_again() -> None:
    n = len(builtin_tokens())
    y = make_targets(replace(TEXT, tokens=n + 100))
    assert torch.equal(y[n:], y[:100])
    assert f"{n:,}" in describe(replace(TEXT, tokens=n + 100))


def test_zipf_repeats_and_uniform_does_not() -> None:
    share = {k: len(make_targets(replace(TEXT, targets=k)).unique()) / 3000 for k in ("zipf", "uniform")}
    assert share["uniform"] > 0.9
    assert share["zipf"] < 0.6


def test_ignored_is_the_share_that_was_asked_for() -> None:
    y = make_targets(replace(TEXT, ignored=0.3))
    assert int((y == IGNORE).sum()) == 900
    kept = y != IGNORE
    assert torch.equal(y[kept], make_targets(TEXT)[kept])
    assert int((make_targets(replace(TEXT, tokens=1, ignored=0.9)) != IGNORE).sum()) == 1


def test_files(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    ids = [3, 1, 3, 7]
    (tmp_path / "ids.txt").write_text("3 1 3\n7\n")
    numpy.save(tmp_path / "ids.npy", numpy.array(ids, dtype="uint16"))
    torch.save(torch.tensor(ids), tmp_path / "ids.pt")
    for name in ("ids.txt", "ids.npy", "ids.pt"):
        w = Workload(6, 9, 4, targets=str(tmp_path / name))
        assert make_targets(w).tolist() == [3, 1, 3, 7, 3, 1]
        assert name in describe(w)
        with pytest.raises(BenchError, match="from 1 to 7 do not fit a vocabulary of 7"):
            make_targets(replace(w, vocab=7))
    (tmp_path / "words.txt").write_text("the cat and the dog and the mouse")
    y = make_targets(Workload(8, 50, 4, targets=str(tmp_path / "words.txt")))
    assert y[0] == y[3] == y[6]
    assert len(y.unique()) == 5


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    for name in ("empty.txt", "broken.npy", "missing.txt"):
        with pytest.raises(BenchError, match=f"--targets .*{name}"):
            make_targets(Workload(4, 9, 4, targets=str(tmp_path / name)))
