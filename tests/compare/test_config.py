"""Configuration files: what they may hold, and that options given on the command line come first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiedkl.cli import compare as command
from tiedkl.compare import CompareError, Settings, compare
from tiedkl.compare.settings import load_config, load_loss_options
from tiedkl.compare.verdict import limits

from .test_command import parser
from .test_resume import numbers


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_settings_alone_or_under_a_key(tmp_path: Path) -> None:
    values = {"lr": 2.0, "gamma": 0.7, "temperature": 9.0, "target_grad": True}
    for content in (values, {"settings": values, "trials": []}):
        file = write(tmp_path / "c.json", content)
        assert load_config(file) == values
        assert load_loss_options(file) == {"gamma": 0.7, "temperature": 9.0, "target_grad": True}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"settings": {"lr": 2.0}, "variant": "real"}, "real"),
        ({"settings": {"lr": 2.0}, "variant": "real", "tuned_for": "re"}, "re"),
        ({"settings": {"lr": 2.0}, "variant": "real", "tuned_for": None}, "real"),
        ({"settings": {"lr": 2.0, "tuned_for": "al"}}, "al"),
        ({"lr": 2.0, "tuned_for": "baseline"}, "baseline"),
        ({"settings": {"lr": 2.0}}, None),
    ],
)
def test_file_of_a_search_names_the_variant(tmp_path: Path, content: Any, expected: str | None) -> None:
    file = write(tmp_path / "c.json", content)
    assert Settings(**load_config(file)).tuned_for == expected
    assert "tuned_for" not in load_loss_options(file)


def test_report_says_for_whom_the_settings_were_searched(toy: Any, tmp_path: Path) -> None:
    """From the file to the report; a finished comparison is found again, since no number depends on it."""
    plain = compare(toy(epochs=1))
    file = write(tmp_path / "best.json", {"settings": {"lr": 1.0}, "variant": "real"})
    tuned = compare(toy(epochs=1, **load_config(file)))
    assert numbers(tuned) == numbers(plain)
    limit = (
        "The settings (lr, dropout, ...) were searched for +REAL; the other variants use them without a search of "
        "their own, which favours +REAL."
    )
    common = (
        "The settings are common to all variants, not tuned for each. On little text one of them, --embedding-range, "
        "can matter more than the variant."
    )
    assert (limit in tuned["limits"], common in tuned["limits"]) == (True, False)
    assert (limit in plain["limits"], common in plain["limits"]) == (False, True)
    assert limit in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert limit in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_a_transformer_has_no_such_range() -> None:
    assert not any("--embedding-range" in text for text in limits({}, config={"model": "transformer"}))


def test_search_for_the_baseline_favours_the_baseline() -> None:
    (limit,) = (text for text in limits({}, "baseline") if text.startswith("The settings"))
    assert "were searched for the baseline; the other variants use them" in limit
    assert limit.endswith("which favours the baseline.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "expected a JSON object"),
        ({"settings": 3}, "expected a JSON object"),
        ({"learning_rate": 1}, "unknown settings learning_rate"),
        ({"lr": -1}, "lr=-1"),
        ({"lr": "fast"}, "wrong type"),
        ({"settings": {}, "variant": "best"}, "tuned_for=best: expected one of baseline, al, re, real"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CompareError, match=rf"c\.json: .*{message}"):
        load_config(write(tmp_path / "c.json", content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="No such file"):
        load_config(tmp_path / "absent.json")


def test_options_come_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "c.json", {"lr": 2.0, "dropout": 0.1, "gamma": 0.7, "tied_bias": True, "tuned_for": "re"})
    seen: list[Any] = []

    class Stop(Exception):
        pass

    def compare(settings: Any, **_: Any) -> None:
        seen.append(settings)
        raise Stop

    monkeypatch.setattr("tiedkl.compare.runner.compare", compare)
    argv = ["compare", "--dropout", "0.3", "--config", file, "--lr", "1.5", "--no-tied-bias", "--target-grad"]
    with pytest.raises(Stop):
        command.run(parser().parse_args(argv))
    assert (seen[0].lr, seen[0].dropout, seen[0].gamma, seen[0].tied_bias) == (1.5, 0.3, 0.7, False)
    assert seen[0].target_grad is True
    assert seen[0].tuned_for == "re"
    file = write(tmp_path / "d.json", {"fresh": False, "quiet": False})
    with pytest.raises(Stop):
        command.run(parser().parse_args(["compare", "--config", file, "--fresh", "--quiet"]))
    assert (seen[1].fresh, seen[1].quiet, seen[1].tied_bias) == (True, True, True)


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": 10**20},
        {"seed": -(10**20)},
        {"checkpoint_every": -5.0},
        {"dropout": 1.0},
        {"gamma": -1.0},
        {"target_grad": 1.0},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_named(bad: dict[str, float]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(CompareError, match=f"^{name}={value}: expected"):
        Settings(**bad)  # type: ignore[arg-type]
