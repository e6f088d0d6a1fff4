"""What a time buys, and that the plan is decided once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import CompareError, Interrupted, budget, compare, corpus, runner
from tiedkl.compare import settings as compare_settings
from tiedkl.compare.budget import LEAST_TOKENS, Speed, fit
from tiedkl.compare.settings import parse_duration

from .test_resume import killed_after, numbers

CONFIG = {"batch": 10, "bptt": 35, "epochs": 7, "decay_after": 4}
TOKENS = {"train": 35_000, "valid": 4_000, "test": 4_000}
SPEED = Speed(step=0.1, token=0.0005)  # an epoch is 100 steps and 4,000 tokens: 12 s; the test 2 s; a seed 86 s


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1.5h", 5400), (" 2 M ", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5s", "0", "0m", "15", "5d", "1m30", "nan"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(CompareError, match="90s, 15m, 2h"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1e6, (7, 5)),
        (345, (7, 4)),
        (343, (7, 3)),
        (257, (6, 3)),  # three seeds of fewer epochs before one seed of more
        (150, (4, 3)),
        (125, (7, 1)),  # three seeds of 4 epochs on 30,000 tokens take 126 s
        (60, (4, 1)),
        (14, (1, 1)),
    ],
)
def test_what_a_time_buys(seconds: float, expected: tuple[int, int]) -> None:
    plan = fit(SPEED, TOKENS, seconds, CONFIG)
    assert (plan["epochs"], plan["seeds"]) == expected
    assert plan["max_tokens"] is None
    assert plan["estimated_seconds"] <= seconds
    assert plan["decay_after"] == max(1, round(4 * expected[0] / 7))


@pytest.mark.parametrize("seconds", [149, 126])
def test_less_text_before_fewer_seeds_and_epochs(seconds: float) -> None:
    plan = fit(SPEED, TOKENS, seconds, CONFIG)
    assert (plan["epochs"], plan["seeds"], plan["decay_after"]) == (4, 3, 2)
    assert LEAST_TOKENS <= plan["max_tokens"] < TOKENS["train"]
    assert seconds - 10 < plan["estimated_seconds"] <= seconds


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1e4, (6, 5, 930_000)),
        (2500, (4, 3, 930_000)),
        (700, (3, 3, 390_000)),
        (54, (3, 3, 30_000)),  # the least that three seeds get
        (53, (1, 1, 250_000)),
    ],
)
def test_what_a_time_buys_of_a_long_text(seconds: float, expected: tuple[int, int, int]) -> None:
    tokens = {"train": 930_000, "valid": 74_000, "test": 82_000}
    config = {"batch": 20, "bptt": 35, "epochs": 6, "decay_after": 3}
    plan = fit(Speed(0.12, 0.0002), tokens, seconds, config)  # an epoch takes 174 s, on 30,000 tokens 6 s
    assert (plan["epochs"], plan["seeds"]) == expected[:2]
    assert (plan["max_tokens"] or tokens["train"]) == pytest.approx(expected[2], rel=0.05)
    fixed = fit(Speed(0.12, 0.0002), tokens, seconds, config | {"epochs": 4}, seeds=2, epochs=4)
    assert (fixed["epochs"], fixed["seeds"]) == (4, 2)


def test_less_than_an_epoch_takes_less_text() -> None:
    plan = fit(SPEED, TOKENS, 7.0, CONFIG)
    assert (plan["epochs"], plan["seeds"]) == (1, 1)
    assert 10_000 < plan["max_tokens"] < TOKENS["train"]
    assert 6.0 < plan["estimated_seconds"] <= 7.0
    assert fit(SPEED, TOKENS, 3.5, CONFIG)["max_tokens"] < plan["max_tokens"]
    with pytest.raises(CompareError, match="budget is too short: about 9 s are needed"):
        fit(SPEED, TOKENS, 0.01, CONFIG)
    with pytest.raises(CompareError, match="budget is too short: about 29 s are needed"):  # some of it is gone
        fit(SPEED, TOKENS, 0.01, CONFIG, spent=20.0)


def test_what_the_user_fixed_stays() -> None:
    assert fit(SPEED, TOKENS, 200, CONFIG, seeds=2)["seeds"] == 2
    assert fit(SPEED, TOKENS, 60, CONFIG, seeds=2)["epochs"] == 2
    assert fit(SPEED, TOKENS, 100, CONFIG, epochs=7)["seeds"] == 1
    short = fit(SPEED, TOKENS, 60, CONFIG, epochs=7)  # `epochs` of the configuration is what the user said
    assert (short["epochs"], short["seeds"]) == (7, 1)
    assert short["max_tokens"] < TOKENS["train"]
    assert fit(SPEED, TOKENS, 60, CONFIG, decay_after=3)["decay_after"] == 3
    two = fit(SPEED, TOKENS, 90, CONFIG, seeds=2)
    assert (two["epochs"], two["seeds"]) == (4, 2)
    assert LEAST_TOKENS <= two["max_tokens"] < TOKENS["train"]


def fixed_speed(monkeypatch: pytest.MonkeyPatch, step: float, token: float) -> None:
    monkeypatch.setattr(runner, "measure_speed", lambda trainers, seconds: Speed(step, token))


def test_only_steps_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what waiting at the end of an epoch takes, were an epoch but a step."""

    class Trainer:
        def __init__(self) -> None:
            self.trained = {"seconds": 0.0}

        def run(self) -> Iterator[str]:
            while True:
                self.trained["seconds"] += 2.0
                yield "step"
                yield "epoch"

        def wait(self) -> None:
            self.trained["seconds"] += 1e-3

    monkeypatch.setattr(budget, "_scoring", lambda trainer: 0.25)
    assert budget.measure([Trainer(), Trainer()], 60.0) == Speed(step=pytest.approx(4.002), token=0.5)  # type: ignore


def test_killed_and_resumed_follows_the_first_plan(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(seeds: int) -> None:
        plan = {"epochs": 1, "decay_after": 1, "seeds": seeds, "max_tokens": 1200, "estimated_seconds": 9.0}
        monkeypatch.setattr(runner, "_plan", lambda *_: plan)

    whole, parts = (toy(out=str(tmp_path / n), budget="40s", epochs=None, checkpoint_every=0.0) for n in ("w", "p"))
    planned(2)
    expected = compare(whole)
    assert expected["config"]["epochs"] == 1
    assert expected["config"]["seeds"] == [1, 2]
    killed_after(monkeypatch, parts, 10)
    planned(3)  # the machine has become faster: the plan stays
    killed_after(monkeypatch, parts, 30)
    resumed = compare(parts)
    assert resumed["plan"] == expected["plan"]
    assert numbers(resumed) == numbers(expected)


def test_killed_before_the_first_checkpoint(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 0.1, 1e-4)
    settings = toy(budget="40s", epochs=1)
    killed_after(monkeypatch, settings, 1)
    assert not list((tmp_path / "out").glob("*.pt"))
    plan = json.loads((tmp_path / "out" / "config.json").read_text())["plan"]
    fixed_speed(monkeypatch, 1.0, 1e-3)
    assert {k: v for k, v in compare(settings)["plan"].items() if k in plan} == plan


def test_shortened_text(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 2.0, 1e-4)  # an epoch is 19 steps; 22 s * 0.7 buy 7
    settings = toy(budget="30s", epochs=None)
    report = compare(settings)
    assert report["plan"]["max_tokens"] < 1000
    assert report["corpus"]["tokens"]["train"] == report["plan"]["max_tokens"]
    assert "training tokens" in report["plan"]["text"]
    assert numbers(compare(settings)) == numbers(report)  # found again under the digest of the whole text


def test_seeds_are_added_to_a_plan(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 2.0, 1e-4)
    first = compare(toy(budget="30s", epochs=None))
    assert first["plan"]["seeds"] == 1
    assert first["plan"]["max_tokens"] < 1000
    monkeypatch.setattr(runner, "_plan", None)  # it is not made again
    two = compare(toy(budget="30s", epochs=None, seeds=2))
    assert two["config"]["seeds"] == [1, 2]
    assert two["plan"]["text"] == first["plan"]["text"] + "; 2 seeds in all by --seeds"
    three = compare(toy(epochs=None, seeds=3))  # as the report says: without --budget
    assert [run["seed"] for run in three["variants"]["real"]["runs"]] == [1, 2, 3]
    assert three["config"] == first["config"] | {"seeds": [1, 2, 3]}
    again = compare(toy(epochs=None))
    assert numbers(again) == numbers(three)
    assert again["plan"]["text"] == three["plan"]["text"]


def test_the_users_own_text_length_stays(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 0.1, 1e-4)
    settings = toy(budget="30s", epochs=1, seeds=1, max_tokens=1200)
    report = compare(settings)
    assert report["config"]["max_tokens"] == 1200
    assert report["corpus"]["tokens"]["train"] == 1200
    assert "1,200 training tokens" in report["plan"]["text"]
    whole = compare(toy(budget="30s", epochs=1, seeds=1, fresh=True))
    assert "all of the text" in whole["plan"]["text"]


def test_little_of_a_long_text_is_trained_like_a_short_one(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runner, compare_settings):
        monkeypatch.setattr(module, "SMALL", 1400)  # the text has some more
    fixed_speed(monkeypatch, 4.0, 1e-4)  # an epoch is 4 steps; 22 s * 0.7 buy 3
    settings = toy(budget="30s", batch=None, epochs=None)
    reads, read_units = [], corpus.read_units
    monkeypatch.setattr(corpus, "read_units", lambda data: reads.append(data) or read_units(data))
    report = compare(settings)
    assert len(reads) == 1, "a long text takes a while"
    assert report["plan"]["batch"] == report["config"]["batch"] == 10
    assert report["corpus"]["tokens"]["train"] == report["config"]["max_tokens"] < 1400
    assert numbers(compare(settings)) == numbers(report)
    long = compare(toy(budget="500s", batch=None, epochs=None, fresh=True))
    assert (long["config"]["batch"], long["config"]["max_tokens"]) == (20, None)


def test_another_budget_is_another_comparison(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 0.1, 1e-4)
    compare(toy(budget="20s", seeds=1, epochs=1))
    with pytest.raises(CompareError, match="budget=20s, now 30s"):
        compare(toy(budget="30s", seeds=1, epochs=1))
    with pytest.raises(CompareError, match=r"hidden=16, now 8"):
        compare(toy(hidden=8, epochs=1))


def test_measuring_leaves_the_runs_alone(toy: Any, tmp_path: Path) -> None:
    """Seeds and epochs fixed, and time enough: the budget changes nothing about the numbers."""
    plain = compare(toy(out=str(tmp_path / "a")))
    planned = compare(toy(out=str(tmp_path / "b"), budget="10m", epochs=2, seeds=1))
    assert planned["plan"]["epochs"] == 2
    assert 0 < planned["plan"]["estimated_seconds"] < 100
    assert [v["test_ppl"] for v in planned["variants"].values()] == [v["test_ppl"] for v in plain["variants"].values()]


def test_interrupted_report_names_the_plan(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 0.1, 1e-4)
    with pytest.raises(Interrupted) as stopped:
        compare(toy(budget="40s", epochs=1), should_stop=lambda: True)
    plan = stopped.value.report["plan"]
    assert plan["text"] == (
        "planned for a budget of 40s: 5 seeds, 1 epoch, all of the text, "
        f"about {plan['estimated_seconds']:.0f} s of training and evaluation"
    )
