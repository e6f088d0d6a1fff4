"""The report's dictionary, table, verdict and page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import compare, report
from tiedkl.compare.page import render


def result(valid: float, test: float | None, *, parameters: int = 1000, status: str = "done") -> dict[str, Any]:
    row = {"epoch": 1, "lr": 1.0, "train_ce": 5.0, "train_kl": 0.1, "valid_ce": 4.0, "valid_ppl": valid}
    return {
        "status": status, "epochs_done": 1.5, "epochs_planned": 3, "parameters": parameters, "best_epoch": 1,
        "valid_ppl": valid, "test_ppl": test, "tokens_per_second": 1234.5, "seconds": 6.0,
        "curves": [row | {"tokens_per_second": 1234.5}],
        "loss_memory": {"total_bytes": 3 << 20, "eager_bytes": 9 << 20},
    }  # fmt: skip


def built(**results: dict[str, Any] | None) -> dict[str, Any]:
    corpus = {
        "name": "<b>toy</b>",
        "split": "blocks",
        "vocabulary": 50,
        "tokens": {"train": 1000, "valid": 9, "test": 9},
    }
    return report.build({"model": "lstm", "layers": 2, "hidden": 8, "epochs": 3}, corpus, {"torch": "2"}, results)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One toy comparison of all four variants, and its directory."""
    from tiedkl.compare import VARIANTS, Settings

    from .conftest import sentences

    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text("\n".join(sentences(300)), encoding="utf-8")
    settings = Settings(
        data=str(folder / "text.txt"), out=str(folder / "out"), variants=tuple(VARIANTS), epochs=2, hidden=8, batch=4,
        bptt=20, impl="reference", threads=1, quiet=True,
    )  # fmt: skip
    return compare(settings), folder / "out"


def test_json_holds_the_schema(trained: tuple[dict[str, Any], Path]) -> None:
    data = json.loads((trained[1] / "report.json").read_text("utf-8"))
    assert data == json.loads(report.to_json(trained[0]))
    assert data["schema"] == 1
    assert data["status"] == "complete"
    assert set(data) == {
        "schema", "created", "status", "verdict", "limits", "config", "corpus", "environment", "variants",
    }  # fmt: skip
    assert {"torch", "python", "cpu", "threads", "git_commit", "tiedkl", "device"} <= set(data["environment"])
    assert {"temperature", "gamma", "lr", "epochs", "seed", "threads", "impl"} <= set(data["config"])
    assert {"name", "split", "vocabulary", "tokens", "oov_rate", "sha256"} == set(data["corpus"])
    assert list(data["variants"]) == ["baseline", "al", "re", "real"]
    for v in data["variants"].values():
        assert [row["epoch"] for row in v["curves"]] == [1, 2]
        assert v["valid_ppl"] == min(row["valid_ppl"] for row in v["curves"])
        assert v["valid_ppl"] == pytest.approx(math.exp(v["curves"][v["best_epoch"] - 1]["valid_ce"]))
        assert v["tokens_per_second"] > 0
        memory = v["loss_memory"]
        assert memory["total_bytes"] == memory["scratch_bytes"] + memory["gradient_bytes"] > 0
        assert memory["tokens"] == 80
    width, n_vocab = 8, data["corpus"]["vocabulary"]
    matrices = {name: v["loss_memory"]["eager_matrices"] for name, v in data["variants"].items()}
    assert matrices == {"baseline": 3, "al": 7, "re": 3, "real": 7}
    real = data["variants"]["real"]["loss_memory"]
    assert real["gradient_bytes"] == 4 * (80 * width + n_vocab * width + n_vocab)
    assert real["eager_bytes"] == 4 * 7 * 80 * n_vocab + real["gradient_bytes"]


def test_change_is_against_the_baseline() -> None:
    data = built(baseline=result(110.0, 100.0), al=None, re=result(99.0, 95.0, parameters=600))
    assert data["variants"]["re"]["change"] == {
        "valid_ppl": pytest.approx(-10.0), "test_ppl": pytest.approx(-5.0), "parameters": pytest.approx(-40.0),
    }  # fmt: skip
    assert data["variants"]["baseline"]["change"]["test_ppl"] is None
    assert data["status"] == "partial"
    partial = built(baseline=result(110.0, 100.0), re=result(99.0, None, status="partial"))
    assert partial["variants"]["re"]["change"]["valid_ppl"] is None


@pytest.mark.parametrize(
    ("real", "start"),
    [(90.0, "Yes: +REAL predicts unseen text 10.0% better"), (99.5, "A draw"), (105.0, "No: nothing")],
)
def test_verdict(real: float, start: str) -> None:
    data = built(baseline=result(110.0, 100.0), al=result(111.0, 120.0), real=result(95.0, real, parameters=600))
    assert data["verdict"][0].startswith(start)
    text = " ".join(data["verdict"])
    assert f"test perplexity {real:.1f} instead of 100.0" in text
    assert "40% fewer parameters (600 instead of 1,000)" in text
    assert "+AL +20.0%" in text


def test_verdict_without_enough_results() -> None:
    assert "baseline was not part" in built(al=result(9.0, 9.0), re=result(8.0, 8.0))["verdict"][0]
    nothing = built(baseline=result(9.0, None, status="partial"), re=None)
    assert "nothing to compare" in nothing["verdict"][0]
    assert "baseline and +RE are not finished" in nothing["verdict"][1]


def test_table_marks_what_is_unfinished() -> None:
    lines = report.table(built(baseline=result(110.0, 100.0), al=result(9.0, None, status="partial"), re=None)).split(
        "\n"
    )
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:3] == ["baseline", "110.00", "100.00"]
    assert "+AL (stopped in epoch 2 of 3)" in lines[2]
    assert "+RE (not started)" in lines[3]
    assert "3.0" in lines[1]


def test_json_has_no_infinities() -> None:
    data = built(baseline=result(math.inf, math.nan))
    assert json.loads(report.to_json(data))["variants"]["baseline"]["valid_ppl"] is None


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


def test_page_needs_nothing_from_outside(trained: tuple[dict[str, Any], Path]) -> None:
    text = (trained[1] / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert [load for load in page.loads if not re.fullmatch(r"use #\S+", load)] == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("<svg") == 3
    assert not re.search(r"\b(nan|inf|None|undefined)\b", text)


def test_page_says_what_the_reader_needs(trained: tuple[dict[str, Any], Path]) -> None:
    text = (trained[1] / "report.html").read_text("utf-8")
    for word in ("+REAL", "one random seed", "Validation perplexity", "parameters", trained[0]["corpus"]["sha256"]):
        assert word in text
    for cells in report.rows(trained[0]):
        for cell in cells:
            assert cell in text


def test_page_of_a_partial_report_escapes_and_renders() -> None:
    text = render(built(baseline=result(110.0, None, status="partial"), al=None))
    assert "incomplete" in text
    assert "&lt;b&gt;toy" in text
    assert "<b>toy" not in text
    assert "<svg" not in render(built(baseline=None, al=None))
