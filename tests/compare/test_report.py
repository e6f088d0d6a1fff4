"""The report's dictionary, table, verdict and page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tiedkl.compare import compare, report
from tiedkl.compare.evidence import Run
from tiedkl.compare.markdown import markdown
from tiedkl.compare.page import render

N_TOKENS = 600
MEMORY = {
    "loss_memory": {"total_bytes": 3 << 20, "eager_bytes": 9 << 20},
    "training_memory": {"total_bytes": 5 << 20, "eager_bytes": 11 << 20, "parameter_bytes": 1 << 20},
}


def run(
    valid: float,
    test: float | None,
    *,
    seed: int = 1,
    parameters: int = 1000,
    status: str = "done",
    noise: float = 0.02,
) -> Run:
    """A run whose losses have the mean log(test) and share most of their noise with every other run."""
    row = {"epoch": 1, "lr": 1.0, "train_ce": 5.0, "train_kl": 0.1, "valid_ce": math.log(valid), "valid_ppl": valid}
    losses = None
    if test is not None:
        shared, own = (
            torch.randn(N_TOKENS, generator=torch.Generator().manual_seed(k)) for k in (0, seed + parameters)
        )
        losses = math.log(test) + (shared - shared.mean()) + noise * (own - own.mean())
    found = {
        "status": status, "epochs_done": 1.5, "epochs_planned": 3, "parameters": parameters, "best_epoch": 1,
        "valid_ppl": valid, "test_ppl": test, "tokens_per_second": 1234.5, "seconds": 6.0,
        "curves": [row | {"tokens_per_second": 1234.5}],
    }  # fmt: skip
    return Run(seed, found, losses)


def built(n_seeds: int = 1, **runs: Run | list[Run] | None) -> dict[str, Any]:
    corpus = {
        "name": "<b>toy</b>",
        "split": "blocks",
        "vocabulary": 50,
        "tokens": {"train": 1000, "valid": 9, "test": 9},
        "oov_rate": {"train": 0.01, "valid": 0.02, "test": 0.03},
        "unknown_words": [["<i>odd</i>", 3]],
        "vocabulary_facts": {},
    }
    config = {"model": "lstm", "layers": 2, "hidden": 8, "epochs": 3, "temperature": 20.0, "gamma": 0.5,
              "seeds": list(range(1, n_seeds + 1))}  # fmt: skip
    lists = {name: r if isinstance(r, list) else [] if r is None else [r] for name, r in runs.items()}
    return report.build(config, corpus, {"torch": "2"}, lists, memory=dict.fromkeys(runs, MEMORY))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One toy comparison of all four variants, and its directory."""
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
    }  # fmt: skip
    assert list(data["variants"]) == ["baseline", "al", "re", "real"]
    for v in data["variants"].values():
        assert [row["epoch"] for row in v["curves"]] == [1, 2]
        assert [run["seed"] for run in v["runs"]] == v["seeds_done"] == [1, 2]
        for run in v["runs"]:
            assert run["valid_ppl"] == min(row["valid_ppl"] for row in run["curves"])
            assert run["valid_ppl"] == pytest.approx(math.exp(run["curves"][run["best_epoch"] - 1]["valid_ce"]))
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
    assert matrices == {"baseline": 3, "al": 7, "re": 3, "real": 7}
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


def three(test: float, *, spread: float = 0.001, parameters: int = 1000) -> list[Run]:
    return [run(test, test * math.exp(spread * (s - 2)), seed=s, parameters=parameters) for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("real", "spread", "outcome", "start"),
    [
        (90.0, 0.001, "yes", "Yes: +REAL predicts unseen text 10.0% better than the baseline (95% interval 9."),
        (99.5, 0.001, "draw", "A draw: the best variant, +REAL, is within 1% of the baseline (-0.5%"),
        (95.0, 0.05, "draw", "A draw so far: +REAL predicts unseen text 5.0% better than the baseline, but 3 seeds"),
        (105.0, 0.001, "no", "No: nothing beats the baseline on this text; +REAL is nearest, 5.0% worse"),
        (105.0, 0.1, "draw", "A draw so far: +REAL predicts unseen text 5.0% worse than the baseline, but 3 seeds"),
    ],
)
def test_verdict_of_three_seeds(real: float, spread: float, outcome: str, start: str) -> None:
    worse = three(120.0)
    data = built(3, baseline=three(100.0), al=worse, real=three(real, spread=spread, parameters=600))
    assert data["verdict"][0].startswith(start)
    assert data["outcome"] == outcome
    text = " ".join(data["verdict"])
    assert f"test perplexity {real:.1f} instead of 100.0" in text
    assert "3 seeds" in text
    assert "40% fewer parameters (600 instead of 1,000)" in text
    assert "+AL +20.0%" in text


@pytest.mark.parametrize(
    ("real", "noise", "outcome", "start"),
    [
        (90.0, 0.02, "one seed", "One seed: +REAL predicts the test text 10.0% better"),
        (110.0, 0.02, "one seed", "One seed: nothing beats the baseline"),
        (97.0, 2.0, "draw", "A draw so far: +REAL predicts unseen text 3.0% better than the baseline, but one seed"),
        (99.9, 0.02, "draw", "A draw: "),
    ],
)
def test_verdict_of_one_seed_is_no_yes(real: float, noise: float, outcome: str, start: str) -> None:
    data = built(baseline=run(110.0, 100.0), real=run(95.0, real, parameters=600, noise=noise))
    assert data["verdict"][0].startswith(start)
    assert data["outcome"] == outcome
    assert "for another text of this kind" in data["verdict"][0]
    assert ("--seeds 3" in data["verdict"][1]) == (outcome == "one seed")
    assert "one random seed" in data["limits"][0]


def test_a_gain_that_only_one_comparison_would_pass_is_a_draw() -> None:
    """p-values are Holm's: the same change that decides alone does not decide as the best of three."""
    real = run(95.0, 98.6, parameters=600, noise=0.12)
    alone = built(baseline=run(110.0, 100.0, noise=0.1), real=real)
    p = alone["variants"]["real"]["evidence"]["over_text"]["p"]
    assert 0.05 / 3 < p < 0.05
    assert alone["outcome"] == "one seed"
    among = built(baseline=run(110.0, 100.0, noise=0.1), al=run(110.0, 100.0), re=run(110.0, 100.2), real=real)
    assert among["variants"]["real"]["evidence"]["over_text"]["p_holm"] == pytest.approx(3 * p)
    assert among["outcome"] == "draw"


def test_verdict_without_enough_results() -> None:
    assert "baseline was not part" in built(al=run(9.0, 9.0), re=run(8.0, 8.0))["verdict"][0]
    nothing = built(baseline=run(9.0, None, status="partial"), re=None)
    assert "nothing to compare" in nothing["verdict"][0]
    assert "baseline and +RE are not finished" in nothing["verdict"][1]
    assert nothing["checklist"] == []


def test_table_marks_what_is_unfinished() -> None:
    text = report.table(built(baseline=run(110.0, 100.0), al=run(9.0, None, status="partial"), re=None))
    quality, size, speed = (part.split("\n") for part in text.split("\n\n"))
    for lines in (quality, size, speed):
        assert len({len(line) for line in lines}) == 1
    assert quality[1].split()[:4] == ["baseline", "1", "110.00", "100.00"]
    assert "+AL (stopped in epoch 2 of 3)" in quality[2]
    assert "+RE (not started)" in quality[3]
    assert size[1].split()[1:6] == ["1,000", "3.0", "9.0", "5.0", "11.0"]


def test_json_has_no_infinities() -> None:
    data = built(baseline=run(1e308, None, status="partial")) | {"extra": [math.inf, math.nan]}
    assert json.loads(report.to_json(data))["extra"] == [None, None]


def test_checklist_has_the_numbers_of_this_run(trained: tuple[dict[str, Any], Path]) -> None:
    data = trained[0]
    small, real, production = data["checklist"]
    best = min((v for v in data["variants"].values() if v["evidence"]), key=lambda v: v["evidence"]["percent"])
    assert f"{best['evidence']['percent']:+.1f}%" in small["seen"][0]
    assert "2 seeds" in small["seen"][0]
    assert small["commands"] == [f"tiedkl compare --data {trained[1].parent / 'text.txt'} --out {trained[1]} --seeds 3"]
    assert any(c.startswith("tiedkl tune --data") for c in real["commands"])
    assert "--config tiedkl-tune/best.json --hidden 650 --seeds 3" in real["commands"][1]
    assert f"{data['corpus']['vocabulary']},8" in production["commands"][2]
    eager = {True: 7, False: 3}[best["augmented"]] * 8192 * data["corpus"]["vocabulary"] * 4 / 2**20
    assert f"{eager:,.0f} MiB" in production["memory"]
    assert built(3, baseline=three(100.0), re=three(90.0))["checklist"][0]["commands"] == []


def test_commands_of_the_checklist_are_understood(trained: tuple[dict[str, Any], Path]) -> None:
    """Every `tiedkl` line of the checklist is parsed by the command line."""
    import argparse
    import importlib
    import shlex

    for stage in trained[0]["checklist"]:
        for line in stage["commands"]:
            program, name, *rest = shlex.split(line)
            parser = argparse.ArgumentParser()
            module = importlib.import_module(f"tiedkl.cli.{name}")
            module.add_parser(parser.add_subparsers())
            assert program == "tiedkl"
            parser.parse_args([name, *rest])


def test_markdown_has_the_tables_verdict_and_limits(trained: tuple[dict[str, Any], Path]) -> None:
    data = trained[0]
    text = (trained[1] / "report.md").read_text("utf-8")
    assert text == markdown(data)
    for _, (columns, rows) in report.tables(data):
        assert f"| {' | '.join(columns)} |" in text
        for row in rows:
            assert f"| {' | '.join(row)} |" in text
    for sentence in (*data["verdict"][1:], *data["limits"][:2], "## Roll-out checklist", "unknown tokens"):
        assert sentence.replace("<", "\\<").replace(">", "\\>") in text or sentence in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| variant | seeds")}
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
    for _, (_, rows) in report.tables(trained[0]):
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
