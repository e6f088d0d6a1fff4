"""tiedkl/embeddings.py and tiedkl/vectors.py: every format, what is missing, and what is refused with which line."""

from __future__ import annotations

import gzip
import logging
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiedkl
from tiedkl import vectors
from tiedkl.embeddings import load_embeddings

WORDS = ["the", "cat", ". . .", "naïve", "3"]
ROWS = torch.tensor([[0.5, -1, 2], [1, 0, 0.25], [3, 3, 3], [-1, -2, -4.5], [8, 0.125, 1e-3]])
LINES = [f"{w} {' '.join(f'{x:g}' for x in r.tolist())}" for w, r in zip(WORDS, ROWS, strict=True)]
VOCABULARY = ["cat", "<unk>", "naïve", "the", ". . .", "Cat"]


def write(path: Path, lines: list[str], end: str = "\n", encoding: str = "utf-8") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    return write(tmp_path / "glove.txt", LINES)


def test_rows_in_the_vocabularys_order_and_the_report(glove: Path) -> None:
    got, report = load_embeddings(glove, VOCABULARY, missing="zero")
    assert torch.equal(got, torch.stack([ROWS[1], ROWS[0] * 0, ROWS[3], ROWS[0], ROWS[2], ROWS[0] * 0]))
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert (report.format, report.rows, report.width, report.vocabulary) == ("text", 5, 3, 6)
    assert (report.found, report.duplicates, report.lowercased) == (4, 0, 0)
    assert report.missing == ["<unk>", "Cat"]
    assert report.coverage == 4 / 6
    assert str(report) == f"{glove} (text, 5 x 3): 4 of 6 words found (66.7%); missing: '<unk>', 'Cat'"


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n", "\t\n"])
@pytest.mark.parametrize("start", [[], ["5 3"]], ids=["no header", "header"])
@pytest.mark.parametrize("zipped", [False, True])
def test_text_variants(tmp_path: Path, start: list[str], end: str, zipped: bool) -> None:
    path = write(tmp_path / "vectors.txt", start + LINES, end)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # the last line needs no end
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    got, report = load_embeddings(path, WORDS, missing="error")
    assert torch.equal(got, ROWS)
    assert (report.rows, report.width, report.missing) == (5, 3, [])


def test_other_spellings_of_text(tmp_path: Path) -> None:
    tabs = write(tmp_path / "tabs.txt", [line.replace(" ", "\t") for line in LINES[:2]])
    assert torch.equal(load_embeddings(tabs, WORDS[:2])[0], ROWS[:2])
    bom = tmp_path / "bom.txt"
    bom.write_bytes(b"\xef\xbb\xbf" + LINES[0].encode())
    assert torch.equal(load_embeddings(bom, WORDS[:1])[0], ROWS[:1])
    latin = write(tmp_path / "latin.txt", LINES, encoding="latin-1")
    assert torch.equal(load_embeddings(latin, WORDS, encoding="latin-1")[0], ROWS)
    space = write(tmp_path / "nbsp.txt", ["a\u00a0b 1 2", "\u2028 3 4"])  # in GloVe 840B words hold such spaces
    assert torch.equal(load_embeddings(space, ["\u2028", "a\u00a0b"])[0], torch.tensor([[3.0, 4], [1, 2]]))
    narrow = write(tmp_path / "narrow.txt", ["7 5", "8 6"])  # two whole numbers, and no header
    assert load_embeddings(narrow, ["7", "8"], header=False)[0].tolist() == [[5], [6]]


def test_vocabulary_by_word_and_words_that_come_twice(glove: Path) -> None:
    got, _ = load_embeddings(glove, {"the": 1, "cat": 0})
    assert torch.equal(got, ROWS[[1, 0]])
    got, report = load_embeddings(glove, ["cat", "the", "cat"])
    assert torch.equal(got, ROWS[[1, 0, 1]])
    assert report.found == 3


def test_the_first_of_duplicated_rows_wins_and_others_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "v.txt", [*LINES, "cat 9 9 9", "dog 1 1 1", "dog 2 2 2", "cat 8 8 8"])
    got, report = load_embeddings(path, WORDS)
    assert torch.equal(got, ROWS)
    assert (report.rows, report.duplicates) == (9, 2)  # dog is not of the vocabulary
    assert "2 duplicates not used" in str(report)


def test_lower_case_is_for_words_that_are_not_there_as_written(tmp_path: Path) -> None:
    path = write(tmp_path / "v.txt", ["paris 1 0", "Rome 2 0", "rome 3 0", "oslo 4 0", "Bonn 5 0", "bonn 6 0"])
    words = ["Paris", "PARIS", "paris", "Rome", "rome", "ROME", "Oslo", "BONN", "OSLO!"]
    got, report = load_embeddings(path, words, lowercase=True, missing="zero")
    assert got[:, 0].tolist() == [1, 1, 1, 2, 3, 3, 4, 6, 0]
    assert report.lowercased == 5
    assert report.missing == ["OSLO!"]
    assert load_embeddings(path, words, missing="zero")[1].found == 3
    write(path, ["rome 3 0", "Rome 2 0"])  # the spelling that was asked for may come later
    assert load_embeddings(path, ["Rome"], lowercase=True)[0].tolist() == [[2, 0]]


def test_missing_words(glove: Path) -> None:
    absent, there = [1, 5], [0, 2, 3, 4]
    got, _ = load_embeddings(glove, VOCABULARY)
    mean = ROWS[:4].mean(0)
    torch.testing.assert_close(got[absent], mean.expand(2, -1))
    many = [*VOCABULARY, *(f"word{i}" for i in range(4000))]
    drawn = [
        load_embeddings(glove, many, missing="normal", generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][there], got[there])
    torch.testing.assert_close(drawn[0][6:].mean(0), mean, rtol=0, atol=0.2)
    torch.testing.assert_close(drawn[0][6:].std(0), ROWS[:4].std(0, correction=0), rtol=0.1, atol=0)
    with pytest.raises(ValueError, match=re.escape("2 of 6 words have no vector: '<unk>', 'Cat'")):
        load_embeddings(glove, VOCABULARY, missing="error")


def test_length_of_the_vectors_and_dtype(glove: Path) -> None:
    got, _ = load_embeddings(glove, VOCABULARY, normalize=True, missing="zero", dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.norm(dim=1), torch.tensor([1, 0, 1, 1, 1, 0]).double())
    scaled, _ = load_embeddings(glove, WORDS, norm=2.5)
    assert scaled.norm(dim=1).square().mean().sqrt().item() == pytest.approx(2.5)
    torch.testing.assert_close(scaled, ROWS * (scaled[0, 0] / ROWS[0, 0]))
    both, _ = load_embeddings(glove, WORDS, normalize=True, norm=2.5)
    torch.testing.assert_close(both.norm(dim=1), torch.full((5,), 2.5))
    assert load_embeddings(glove, WORDS, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_as_the_similarity_source(glove: Path) -> None:
    t, _ = load_embeddings(glove, VOCABULARY, normalize=True)
    h, w = torch.randn(4, 7, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    y = torch.tensor([3, 0, 5, 1])
    out = tiedkl.fused_tied_loss(h, w, y, target_weight=t, temperature=0.5, return_terms=True)
    q, log_r = torch.softmax(t[y] @ t.T / 0.5, -1), torch.log_softmax(h @ w.T / 0.5, -1)
    torch.testing.assert_close(out.kl, (q * (q.log() - log_r)).sum(-1).mean().detach())
    out.loss.backward()


MALFORMED: list[tuple[list[str], dict[str, Any], str]] = [
    ([], {}, "v.txt is empty"),
    (["5 3"], {}, "has a header and no rows"),
    (["5 0", "the"], {}, "line 1: the header says that vectors have 0 numbers"),
    ([*LINES[:2], "dog 1 2"], {}, "line 3: expected a word and 3 numbers, got 'dog 1 2'"),
    ([*LINES[:2], "dog 1 2 3 4"], {}, "line 3: 4 numbers where other lines have 3: 'dog 1 2 3 4'"),
    (["2 4", LINES[0]], {}, "line 2: expected a word and 4 numbers, got 'the 0.5 -1 2'"),
    ([LINES[0], "", LINES[1]], {}, "line 2: expected a word and 3 numbers, got ''"),
    (["the", LINES[0]], {}, "line 1: expected a word and numbers, got 'the'"),
    ([LINES[0], "cat 1 two 3"], {}, "line 2: 'two' is not a number"),
    ([LINES[0], "cat 1  2 3"], {}, "line 2: 4 numbers where"),
    ([LINES[0], "cat 1 nan 3"], {}, "line 2: 'nan' is not a finite number"),
    (LINES, {"header": True}, "line 1: expected a header 'rows width', got 'the 0.5 -1 2'"),
    (LINES, {"encoding": "ascii"}, "line 4: the word b'na\\xc3\\xafve' is not ascii: give its encoding=, or errors="),
]


@pytest.mark.parametrize(("lines", "options", "message"), MALFORMED, ids=[m[2][:40] for m in MALFORMED])
def test_malformed_text(tmp_path: Path, lines: list[str], options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "v.txt", lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_embeddings(path, WORDS, **options)


def test_wrong_encodings(tmp_path: Path) -> None:
    latin = write(tmp_path / "v.txt", LINES, encoding="latin-1")
    with pytest.raises(ValueError, match=r"line 4: the word b'na\\xefve' is not utf-8"):
        load_embeddings(latin, WORDS)
    assert load_embeddings(latin, WORDS, errors="replace")[1].missing == ["naïve"]
    with pytest.raises(ValueError, match="is UTF-16, which cannot be read: convert it to UTF-8"):
        load_embeddings(write(tmp_path / "w.txt", ["".join(LINES)], encoding="utf-16"), WORDS)
    (tmp_path / "v.zip").write_bytes(b"PK\x03\x04...")
    with pytest.raises(ValueError, match="is a zip archive: unpack it first"):
        load_embeddings(tmp_path / "v.zip", WORDS)


def test_damaged_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "v.txt.gz"
    path.write_bytes(gzip.compress("\n".join(LINES).encode())[:-12])
    with pytest.raises(ValueError, match="is a damaged or truncated gzip file"):
        load_embeddings(path, WORDS)
    with pytest.raises(FileNotFoundError):
        load_embeddings(tmp_path / "nothing.txt", WORDS)
    with caplog.at_level(logging.WARNING, "tiedkl"):
        load_embeddings(write(tmp_path / "short.txt", ["9 3", *LINES]), WORDS)
    assert "the header announces 9 rows, there are 5" in caplog.text


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        ([], {}, "vocabulary is empty"),
        ("the cat", {}, "vocabulary must be words by id, or ids by word, got a str"),
        ({"the": 0, "cat": 2}, {}, "the ids of its 2 words are not 0 to 1"),
        (["zebra", "The"], {}, "none of the 2 words has a vector, such as 'zebra', 'The'; lowercase=True looks up"),
        (WORDS, {"missing": "skip"}, "missing='skip' is not one of 'mean', 'zero', 'normal', 'error'"),
        (WORDS, {"format": "csv"}, "format='csv' is not one of 'auto', 'text', 'binary', 'safetensors'"),
        (WORDS, {"dtype": torch.int64}, "dtype=torch.int64 is not a floating dtype"),
        (WORDS, {"norm": 0}, "norm=0 is outside (0, inf)"),
        (WORDS, {"name": "w"}, "name and words are for safetensors files, got format='text'"),
    ],
)
def test_bad_arguments(glove: Path, vocabulary: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_embeddings(glove, vocabulary, **options)


def test_vectors_of_zeros_have_no_norm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all vectors are zero, and have no norm to be scaled to 1"):
        load_embeddings(write(tmp_path / "v.txt", ["the 0 0"]), ["the"], norm=1)


def test_only_wanted_rows_are_parsed_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "EVERY", 1000)
    parsed: list[str] = []
    real = vectors._parsed
    monkeypatch.setattr(vectors, "_parsed", lambda numbers, where: parsed.append(where) or real(numbers, where))
    path = write(tmp_path / "v.txt", [f"word{i} {i} 1" for i in range(5000)])
    told: list[tuple[int, int]] = []
    got, report = load_embeddings(path, ["word4999", "word17"], progress=lambda *x: told.append(x))
    assert got[:, 0].tolist() == [4999, 17]
    assert len(parsed) == 2
    assert report.rows == 5000
    assert len(told) == 6
    assert told == sorted(told)
    assert told[-1] == (path.stat().st_size, path.stat().st_size)


def binary(rows: int = len(WORDS), end: bytes = b"\n") -> bytes:
    out = f"{rows} 3\n".encode()
    for word, row in zip(WORDS, ROWS, strict=True):
        out += word.replace(" ", "_").encode() + b" " + struct.pack("<3f", *row.tolist()) + end
    return out


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("name", ["v.bin", "v.bin.gz"])
def test_word2vec_binary(tmp_path: Path, end: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(binary(end=end)) if name.endswith("gz") else binary(end=end))
    got, report = load_embeddings(path, [w.replace(" ", "_") for w in WORDS], missing="error")
    assert torch.equal(got, ROWS)
    assert (report.format, report.rows) == ("binary", 5)


def test_a_word2vec_file_longer_than_one_read(tmp_path: Path) -> None:
    n, width = 3000, 200  # 2.4 MB, read 1 MiB at a time
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    body = b"".join(f"w{i} ".encode() + row.numpy().tobytes() + b"\n" for i, row in enumerate(rows))
    path = tmp_path / "long.bin"
    path.write_bytes(f"{n} {width}\n".encode() + body)
    got, report = load_embeddings(path, [f"w{i}" for i in range(n)], missing="error")
    assert torch.equal(got, rows)
    assert report.rows == n


def test_word2vec_binary_refuses(tmp_path: Path) -> None:
    path = tmp_path / "v.bin"
    path.write_bytes(binary(rows=9))
    with pytest.raises(ValueError, match=r"v.bin ends within row 6 of 9"):
        load_embeddings(path, WORDS)
    path.write_bytes(LINES[0].encode())
    with pytest.raises(ValueError, match="does not start with 'rows width'"):
        load_embeddings(path, WORDS)
    path.write_bytes(b"1 1\ncat " + struct.pack("<f", float("nan")))
    with pytest.raises(ValueError, match="vector of 'cat' has a number that is not finite"):
        load_embeddings(path, ["cat"])
    path.write_bytes(b"1 1\n\xff\xfe \x00\x00\x00\x00")
    with pytest.raises(ValueError, match=r"row 1: the word b'\\xff\\xfe' is not utf-8"):
        load_embeddings(path, WORDS)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {"emb": ROWS.bfloat16(), "head": ROWS.flip(0).clone(), "bias": ROWS[0].clone(), "ids": ROWS.int()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_safetensors_by_words_and_by_number(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "EVERY", 2)  # blocks of two rows
    got, report = load_embeddings(weights, VOCABULARY, name="head", words=WORDS[::-1], missing="zero")
    assert torch.equal(got, load_embeddings_of_text(weights.with_name("v.txt")))
    assert report.missing == ["<unk>", "Cat"]
    got, report = load_embeddings(weights, ["a", "a", "b"], name="emb")  # a row a number, padding at the end
    assert torch.equal(got, ROWS[:3].bfloat16().float())
    assert (report.format, report.found, report.rows) == ("safetensors", 3, 5)
    got, report = load_embeddings(weights, ["a"], name="head", words=["a", "a", "b", "c", "d"])
    assert torch.equal(got[0], ROWS[4])
    assert report.duplicates == 1


def load_embeddings_of_text(path: Path) -> torch.Tensor:
    return load_embeddings(write(path, LINES), VOCABULARY, missing="zero")[0]


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        (WORDS, {}, "has 3 matrices, name= one of them: emb, head, ids"),
        (WORDS, {"name": "bias"}, "has no matrix 'bias', only emb, head, ids"),
        (WORDS, {"name": "ids"}, "'ids' is torch.int32, not a floating dtype"),
        (WORDS, {"name": "emb", "words": WORDS[:3]}, "3 words for the 5 rows of 'emb'"),
        (VOCABULARY, {"name": "emb"}, "has 5 rows for a vocabulary of 6: say in words= whose they are"),
    ],
)
def test_safetensors_refuses(weights: Path, vocabulary: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_embeddings(weights, vocabulary, **options)


def test_a_broken_safetensors_file_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "v.safetensors", LINES)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match="pip install safetensors"):
            load_embeddings(path, WORDS)
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_embeddings(path, WORDS)
