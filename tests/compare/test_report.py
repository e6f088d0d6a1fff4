"""The report's dictionary, tables and page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import compare, page, report, tables
from tiedkl.compare.markdown import markdown
from tiedkl.compare.page import render
from tiedkl.compare.settings import OWN

from .made import built, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One toy comparison of all variants, and its directory."""
    from tiedkl.compare import VARIANTS, Settings

    from .conftest import sentences

    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text("\n".join(sentences(300)), encoding="utf-8")
    settings = Settings(
        data=str(folder / "text.txt"), out=str(folder / "out"), variants=tuple(VARIANTS), epochs=2, hidden=8, batch=4,
        bptt=20, impl="reference", threads=1, quiet=True, seeds=2, price_per_hour=2.0,
    )  # fmt: skip
    return compare(settings), folder / "out"


def test_json_holds_the_schema(trained: tuple[dict[str, Any], Path]) -> None:
    data = json.loads((trained[1] / "report.json").read_text("utf-8"))
    assert data == json.loads(report.to_json(trained[0]))
    assert data["schema"] == 2
    assert data["status"] == "complete"
    assert set(data) == {
        "schema", "created", "status", "verdict", "outcome", "limits", "config", "corpus", "environment", "plan",
        "variants", "inference", "cost", "checklist",
    }  # fmt: skip
    assert {"torch", "python", "cpu", "threads", "git_commit", "tiedkl", "device"} <= set(data["environment"])
    assert {"temperature", "gamma", "lr", "epochs", "seed", "threads", "impl"} <= set(data["config"])
    assert data["config"]["seeds"] == [1, 2]
    assert set(data["corpus"]) == {
        "name", "split", "vocabulary", "tokens", "oov_rate", "unknown_words", "vocabulary_facts", "sha256",
        "whole_training_text", "unigram_ppl", "copied",
    }  # fmt: skip
    assert list(data["variants"]) == ["baseline", "al", "re", "real", "ls", "re-ls"]
    assert {n: v["control"] and v["control"]["name"] for n, v in data["variants"].items()} == {
        "baseline": None, "al": "ls", "re": None, "real": "re-ls", "ls": None, "re-ls": None
    }  # fmt: skip
    for v in data["variants"].values():
        assert [row["epoch"] for row in v["curves"]] == [1, 2]
        assert [run["seed"] for run in v["runs"]] == v["seeds_done"] == [1, 2]
        for one in v["runs"]:
            assert one["valid_ppl"] == min(row["valid_ppl"] for row in one["curves"])
            assert one["valid_ppl"] == pytest.approx(math.exp(one["curves"][one["best_epoch"] - 1]["valid_ce"]))
        for key in ("valid_ppl", "test_ppl"):
            assert v[key] == pytest.approx(math.prod(run[key] for run in v["runs"]) ** 0.5)
        low, high = v["test_ppl_interval"]
        assert low < v["test_ppl"] < high
        assert v["tokens_per_second"] > 0
        memory = v["loss_memory"]
        assert memory["total_bytes"] == memory["scratch_bytes"] + memory["gradient_bytes"] > 0
        assert memory["tokens"] == 80
    width, n_vocab = 8, data["corpus"]["vocabulary"]
    matrices = {name: v["loss_memory"]["eager_matrices"] for name, v in data["variants"].items()}
    assert matrices == {"baseline": 3, "al": 7, "re": 3, "real": 7, "ls": 3, "re-ls": 3}
    real = data["variants"]["real"]["loss_memory"]
    assert real["gradient_bytes"] == 4 * (80 * width + n_vocab * width + n_vocab)
    assert real["eager_bytes"] == 4 * 7 * 80 * n_vocab + real["gradient_bytes"]


def test_change_is_against_the_baseline() -> None:
    data = built(baseline=run(110.0, 100.0), al=None, re=run(99.0, 95.0, parameters=600))
    assert data["variants"]["re"]["change"] == {
        "valid_ppl": pytest.approx(-10.0),
        "test_ppl": pytest.approx(-5.0, rel=1e-4),
        "parameters": pytest.approx(-40.0),
    }  # fmt: skip
    assert data["variants"]["baseline"]["change"]["test_ppl"] is None
    assert data["status"] == "partial"
    partial = built(baseline=run(110.0, 100.0), re=run(99.0, None, status="partial"))
    assert partial["variants"]["re"]["change"]["valid_ppl"] is None


def test_table_marks_what_is_unfinished() -> None:
    text = tables.table(built(baseline=run(110.0, 100.0), al=run(9.0, None, status="partial"), re=None))
    quality, size, speed = (part.split("\n") for part in text.split("\n\n"))
    for lines in (quality, size, speed):
        assert len({len(line) for line in lines}) == 1
    assert quality[1].split() == ["baseline", *"---", "100.00", "-", "110.00", "1"]
    assert "+AL (stopped in epoch 2 of 3)" in quality[2]
    assert "+RE (not started)" in quality[3]
    assert size[1].split()[1:6] == ["1,000", "3.0", "9.0", "5.0", "11.0"]


def test_json_has_no_infinities() -> None:
    data = built(baseline=run(1e308, None, status="partial")) | {"extra": [math.inf, math.nan]}
    assert json.loads(report.to_json(data))["extra"] == [None, None]


def test_markdown_has_the_tables_verdict_and_limits(trained: tuple[dict[str, Any], Path]) -> None:
    data = trained[0]
    text = (trained[1] / "report.md").read_text("utf-8")
    assert text == markdown(data)
    for _, (columns, rows) in tables.tables(data):
        assert f"| {' | '.join(columns)} |" in text
        for row in rows:
            assert f"| {' | '.join(row)} |".replace("<", "\\<") in text
    assert "<unk>" not in text  # a reader of Markdown would take it for a tag and not show it
    sentences = (*data["verdict"][1:], *data["limits"], *data["checklist"][0]["monitor"])
    for sentence in (*sentences, "## Roll-out checklist", "unknown tokens"):
        assert sentence.replace("<", "\\<").replace(">", "\\>") in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| variant | change | 95%")}
    assert widths == {7}
    odd = markdown(built(baseline=run(110.0, 100.0)))
    assert "\\<i\\>odd" in odd
    assert "<b>" not in odd


class Page(HTMLParser):
    """Collects what a page loads, and checks that its elements are closed in order."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action") or (name.endswith("href") and tag != "a"):
                self.loads.append(f"{tag} {value}")
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_setting_that_may_differ_is_explained() -> None:
    assert list(page.OWN_HINTS) == list(OWN)


def test_page_needs_nothing_from_outside(trained: tuple[dict[str, Any], Path]) -> None:
    text = (trained[1] / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert [load for load in page.loads if not re.fullmatch(r"use #\S+", load)] == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("<svg") == 4
    assert not re.search(r"\b(nan|inf|None|undefined)\b", text)


def test_page_says_what_the_reader_needs(trained: tuple[dict[str, Any], Path]) -> None:
    text = (trained[1] / "report.html").read_text("utf-8")
    for word in ("+REAL", "2 random seeds", "Validation perplexity", "parameters", trained[0]["corpus"]["sha256"]):
        assert word in text
    for _, (_, rows) in tables.tables(trained[0]):
        for cell in (cell for cells in rows for cell in cells):
            assert cell.replace("<", "&lt;") in text
    for stage in trained[0]["checklist"]:
        assert stage["stage"] in text
        assert stage["memory"] in text


def test_page_of_a_partial_report_escapes_and_renders() -> None:
    text = render(built(baseline=run(110.0, None, status="partial"), al=None))
    assert "incomplete" in text
    assert "&lt;b&gt;toy" in text
    assert "<b>toy" not in text
    assert "<i>odd" not in text
    assert "<svg" not in render(built(baseline=None, al=None))
