"""A tokenizer.json in place of words, and what the report says of a vocabulary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import CompareError, compare, corpus
from tiedkl.compare.vocabulary import vocabulary


def tokenizer_file(path: Path, *, special: tuple[str, ...] = ("<unk>", "</s>"), truncate: bool = False) -> str:
    """A tiny byte-pair tokenizer of the letters of the toy text, and a few merges."""
    tokenizers = pytest.importorskip("tokenizers")
    tool = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tool.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=list(special), show_progress=False)
    tool.train_from_iterator(["ba be bi bo da de di do ba ba do do"] * 5, trainer)
    if truncate:
        tool.enable_truncation(2)
    tool.save(str(path))
    return str(path)


def test_text_is_encoded_by_the_tokenizer(tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path / "tokenizer.json", truncate=True)
    for split, text in (("train", "ba do\n\nba Q\n"), ("valid", "do\n"), ("test", "QQ ba\n")):
        (tmp_path / f"toy.{split}.txt").write_text(text, encoding="utf-8")
    loaded = corpus.load(str(tmp_path), tokenizer=file)
    ids = {token: k for k, token in enumerate(loaded.words)}
    ba, do, unk, eos = ids["ba"], ids["do"], ids["<unk>"], ids["</s>"]
    assert loaded.train.tolist() == [ba, do, eos, ba, unk, eos]
    assert loaded.eos == eos
    assert loaded.oov == {"train": pytest.approx(1 / 6), "valid": 0.0, "test": pytest.approx(2 / 4)}
    known = loaded.facts()["vocabulary_facts"]
    assert known["tokens_per_word"] == pytest.approx(8 / 7)  # QQ is two unknown letters
    assert known["share_of_vocabulary_seen_in_training"] == pytest.approx(4 / len(loaded.words))
    text = dict(vocabulary(loaded.facts())[0])
    assert text["tokens a word"] == "1.14"
    assert text["made of"] == "tokenizer tokenizer.json"


def test_end_of_a_unit_without_an_end_token(tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path / "t.json", special=("<unk>",))
    text = tmp_path / "text.txt"
    text.write_text("ba do\n" * 60)
    loaded = corpus.load(str(text), tokenizer=file)
    assert loaded.words[-1] == "<eos>"
    assert loaded.eos == len(loaded.words) - 1
    assert loaded.train.tolist().count(loaded.eos) == pytest.approx(48, abs=8)
    inputs, _ = corpus.batches(loaded.train, 4, loaded.eos)
    assert inputs[0, 0] == loaded.eos


def test_compare_with_a_tokenizer(toy: Any, tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path / "tokenizer.json")
    settings = toy(epochs=1, tokenizer=file)
    report = compare(settings)
    n_tokens = len(json.loads(Path(file).read_text())["model"]["vocab"])
    assert report["corpus"]["vocabulary"] == n_tokens
    assert report["variants"]["real"]["test_ppl"] < n_tokens
    assert "tokens a word" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(CompareError, match="the text"):
        compare(toy(epochs=1))


def test_what_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(CompareError, match=r"expected a tokenizer\.json"):
        corpus.load(None, tokenizer=str(tmp_path / "absent"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CompareError, match=r"bad\.json: not a tokenizer\.json"):
        corpus.load(None, tokenizer=str(tmp_path / "bad.json"))


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CompareError, match="pip install tokenizers"):
        corpus.load(None, tokenizer=str(tmp_path / "t.json"))


def test_unknown_words_are_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "a.train.txt").write_text("x x y y z\n")
    (tmp_path / "a.valid.txt").write_text("new x new\n")
    (tmp_path / "a.test.txt").write_text("z new old\n")
    facts = corpus.load(str(tmp_path), min_count=2).facts()
    assert facts["unknown_words"] == [["new", 3], ["z", 1], ["old", 1]]
    assert facts["vocabulary_facts"]["distinct_training_words"] == 5  # x, y, z, <eos>, <unk>
    assert facts["vocabulary_facts"]["coverage"]["valid"] == pytest.approx(2 / 4)
    read, unknown = vocabulary(facts)
    assert unknown[0] == "new (3)"
    assert dict(read)["unknown tokens"] == "train 16.67%, valid 50.00%, test 75.00%"
