"""Reading, splitting, vocabulary, batches, and the errors for texts that cannot be used."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tiedkl.compare import CompareError, corpus


def test_raw_text_is_lowered_and_punctuation_set_apart() -> None:
    assert corpus.text_tokens("It's  Blue, “he” said...\n=====\nNext_one 3") == [
        "it's", "blue", ",", "“", "he", "”", "said", "...", "<eos>", "next_one", "3", "<eos>",
    ]  # fmt: skip


def test_hard_wrapped_text_is_read_by_paragraphs() -> None:
    assert corpus.text_tokens("one\ntwo\n\nthree\n") == ["one", "two", "<eos>", "three", "<eos>"]


def test_directory_is_split_on_white_space_only(tmp_path: Path) -> None:
    for split, text in (("train", " A-b <unk> c. \n\nA-b d\n"), ("valid", "d\n"), ("test", "x A-b\n")):
        (tmp_path / f"toy.{split}.txt").write_text(text, encoding="utf-8")
    loaded = corpus.load(str(tmp_path))  # <unk> is there, so somebody has chosen the vocabulary: once is enough
    assert loaded.words == ["<unk>", "<eos>", "A-b", "c.", "d"]
    assert loaded.train.tolist() == [2, 0, 3, 1, 2, 4, 1]
    assert loaded.test.tolist() == [0, 2, 1]
    assert loaded.oov == {"train": pytest.approx(1 / 7), "valid": 0.0, "test": pytest.approx(1 / 3)}


def test_unknown_words_of_the_text_itself_count_as_unknown(tmp_path: Path) -> None:
    for split, text in (("train", "a <unk> b a\n"), ("valid", "<unk> a <unk> new\n"), ("test", "b <unk> a\n")):
        (tmp_path / f"toy.{split}.txt").write_text(text, encoding="utf-8")
    loaded = corpus.load(str(tmp_path))
    assert loaded.oov == {"train": pytest.approx(1 / 5), "valid": pytest.approx(3 / 5), "test": pytest.approx(1 / 4)}
    assert loaded.unknown == (("new", 1),)  # `<unk>` says nothing of the word it stands for
    single = tmp_path / "text.txt"
    single.write_text("<unk> a\n" * 200, encoding="utf-8")
    assert corpus.load(str(single)).oov["train"] == pytest.approx(1 / 3, abs=0.01)


def test_what_a_text_says_of_a_comparison_on_it(tmp_path: Path) -> None:
    lines = ("a b c d\n", "b a b a\n", "c\n")
    for split, text in (("train", "".join(lines)), ("valid", "a\n"), ("test", "a b c d\nc\nb b b b\n")):
        (tmp_path / f"toy.{split}.txt").write_text(text, encoding="utf-8")
    facts = corpus.load(str(tmp_path), min_count=1).facts()
    assert facts["copied"] == pytest.approx(5 / 12)  # the line "c" is too short to be a copy
    counts = {"a": 3, "b": 3, "c": 2, "d": 1, "<eos>": 3, "<unk>": 0}
    test = ["a", "b", "c", "d", "<eos>", "c", "<eos>", "b", "b", "b", "b", "<eos>"]

    def surprise(text: list[str], added: float) -> float:
        total = sum(counts.values()) + added * len(counts)
        return -sum(math.log((counts[word] + added) / total) for word in text) / len(text)

    best = min((1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001), key=lambda added: surprise(["a", "<eos>"], added))
    assert best < 1.0
    assert facts["unigram_ppl"] == pytest.approx(math.exp(surprise(test, best)))


def test_unknown_words_are_no_copies_of_one_another(tmp_path: Path) -> None:
    for split, names in (("train", "xy"), ("valid", "zz"), ("test", "uv")):
        (tmp_path / f"toy.{split}.txt").write_text("".join(f"my name is {n} here\n" for n in names), encoding="utf-8")
    assert corpus.load(str(tmp_path), min_count=2).facts()["copied"] == 0.0


def test_a_text_without_ends_has_no_copies_to_count(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"toy.{split}.txt").write_text("a b " * 300, encoding="utf-8")
    assert corpus.load(str(tmp_path)).facts()["copied"] is None


def test_the_report_says_how_the_text_was_split(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"toy.{split}.txt").write_text("A b.\n", encoding="utf-8")
    single = tmp_path / "text.txt"
    single.write_text("A b.\n" * 200, encoding="utf-8")
    kinds = {path: corpus.load(str(path)).facts()["vocabulary_facts"]["kind"] for path in (tmp_path, single)}
    assert kinds[tmp_path] == "words of the training text, taken as already tokenised: split at white space only"
    assert kinds[single] == "words of the training text, lower-cased and split at punctuation"


def test_a_word_must_be_seen_twice_unless_the_text_has_its_vocabulary(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"toy.{split}.txt").write_text("a b a\n", encoding="utf-8")
    assert corpus.load(str(tmp_path)).words == ["<unk>", "<eos>", "a"]
    assert corpus.load(str(tmp_path), min_count=1).words == ["<unk>", "<eos>", "a", "b"]


def test_vocabulary_is_capped_by_frequency_then_alphabet() -> None:
    tokens = ["b", "b", "b", "a", "a", "c", "c", "d", "<eos>", "<unk>"]
    assert corpus.build_vocabulary(tokens, 10, 2) == ["<unk>", "<eos>", "b", "a", "c"]
    assert corpus.build_vocabulary(tokens, 4, 1) == ["<unk>", "<eos>", "b", "a"]


@pytest.mark.parametrize("n", [100, 999, 1234])
def test_blocks_divide_the_text_without_loss_or_overlap(n: int) -> None:
    texts = corpus.split_blocks([str(k) for k in range(n)])
    assert Counter(w for part in texts.values() for w in part) == Counter(str(k) for k in range(n))
    assert len(texts["valid"]) == pytest.approx(n / 10, abs=10)
    assert len(texts["test"]) == pytest.approx(n / 10, abs=10)
    for half in (range(n // 2), range(n // 2, n)):  # early and late text in every split
        assert all(set(map(str, half)) & set(part) for part in texts.values())


@pytest.mark.parametrize(("n", "n_seq"), [(24, 4), (25, 4), (7, 7), (3, 2)])
def test_every_token_is_a_target_once_and_follows_its_predecessor(n: int, n_seq: int) -> None:
    stream = torch.arange(10, 10 + n)
    inputs, targets = corpus.batches(stream, n_seq)
    assert inputs.shape == targets.shape == (-(-n // n_seq), n_seq)
    columns = targets.T.reshape(-1)
    assert columns[columns != -100].tolist() == stream.tolist()
    assert inputs.T.reshape(-1)[:n].tolist() == [1, *stream[:-1].tolist()]


def test_default_text_is_large_and_has_no_repeated_paragraph() -> None:
    loaded = corpus.load(None)
    assert sum(loaded.facts()["tokens"].values()) > 50_000
    paragraphs = " ".join(corpus.builtin_tokens()).split("<eos>")
    long = [p for p in paragraphs if len(p) > 300]
    assert len(long) > 100
    assert len(set(long)) == len(long)


def test_default_text_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    with pytest.raises(CompareError, match="--data"):
        corpus.load(None)


def test_max_tokens_shortens_every_split(text_file: Path) -> None:
    short, whole = (corpus.load(str(text_file), max_tokens=n).facts() for n in (500, None))
    assert short["tokens"] == {"train": 500, "valid": 50, "test": 50}
    assert short["whole_training_text"] == whole["whole_training_text"] == whole["tokens"]["train"] > 500


def test_max_tokens_leaves_the_vocabulary_alone(tmp_path: Path) -> None:
    """Words, how often one must be seen, and the order of the words are those of the whole training split."""
    for split, text in (("train", "a b a\nc c c <unk>\n"), ("valid", "c b\n"), ("test", "a x\n")):
        (tmp_path / f"toy.{split}.txt").write_text(text, encoding="utf-8")
    whole, short = (corpus.load(str(tmp_path), max_tokens=n) for n in (None, 3))
    assert short.words == whole.words == ["<unk>", "<eos>", "c", "a", "b"]
    assert short.train.tolist() == whole.train.tolist()[:3] == [3, 4, 3]
    assert short.known is not None
    assert whole.known is not None
    assert short.known["distinct_training_words"] == whole.known["distinct_training_words"] == 5
    assert short.oov["valid"] == 0.0


def test_digest_depends_on_the_text(text_file: Path) -> None:
    before = corpus.load(str(text_file)).facts()["sha256"]
    assert corpus.load(str(text_file)).facts()["sha256"] == before
    text_file.write_text(text_file.read_text() + "\nba de gi", encoding="utf-8")
    assert corpus.load(str(text_file)).facts()["sha256"] != before


def test_unusable_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="no such file"):
        corpus.load(str(tmp_path / "absent"))
    with pytest.raises(CompareError, match=r"one file \*\.train\.txt, found none"):
        corpus.load(str(tmp_path))
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(CompareError, match="empty"):
        corpus.load(str(empty))
    with pytest.raises(CompareError, match=r"not UTF-8 text \(byte 3\)"):
        corpus.load(str(latin))
    for name in ("a.train.txt", "b.train.txt"):
        (tmp_path / name).write_text("x y\n")
    with pytest.raises(CompareError, match=r"found a\.train\.txt, b\.train\.txt"):
        corpus.load(str(tmp_path))
