"""`tiedkl tune`: ranges, resuming, interruption, several processes, the files it leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import tiedkl
from tiedkl import cli
from tiedkl.cli import tune as command
from tiedkl.compare.settings import CompareError, Settings, load_config, load_loss_options
from tiedkl.tune import Interrupted, TuneSettings, search, tune, worker
from tiedkl.tune import study as studies

# learning rate 0.002 is far too small, so the search has something to find
TOY = {"hidden": 8, "layers": 1, "batch": 4, "bptt": 20, "epochs": 2, "impl": "reference", "threads": 1, "check": 0,
       "lr": 0.002, "search": "lr=0.001:4,dropout", "trials": 4, "max_tokens": 1500}  # fmt: skip


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    rng, words = random.Random(0), [f"{a}{b}" for a in "bdgklm" for b in "aeio"]
    lines = [" ".join(words[int(24 * rng.random() ** 4)] for _ in range(7)) for _ in range(250)]  # a few are frequent
    (tmp_path / "text.txt").write_text("\n".join(lines))

    def make(**changes: Any) -> TuneSettings:
        return TuneSettings(**{"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out"), **TOY, **changes})

    return make


def main(settings: TuneSettings, *more: str) -> int:
    argv = [f"--{n.replace('_', '-')}={getattr(settings, n)}" for n in ("data", "out", *TOY)]
    return cli.main(["tune", *argv, *more])


def trials(found: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What a clock does not decide."""
    return [(t["state"], t["params"], t["valid_ppl"]) for t in found["trials"]]


def test_search_improves_on_bad_defaults_and_its_result_is_used(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(toy(check=3)) == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "best.json").read_text())
    first = found["trials"][0]
    assert first["defaults"]
    assert first["params"] == {"lr": 0.002, "dropout": 0.3}
    done = [t for t in found["trials"] if t["state"] == "complete"]
    assert found["valid_ppl"]["best"] == min(t["valid_ppl"] for t in done) < 0.9 * first["valid_ppl"]
    assert found["valid_ppl"]["defaults"] == first["valid_ppl"]
    assert "Improves on the defaults" in out
    assert "It holds with 3 other seeds on the test text" in out
    assert [row["seed"] for row in found["check"]["valid_ppl"]] == [2, 3, 4]
    assert "  4/4  " in err
    assert "best so far" in err
    assert "0 (defaults)" in (tmp_path / "out" / "tune.md").read_text()

    best = found["trials"][found["trial"]]["params"]
    values = load_config(tmp_path / "out" / "best.json")
    assert {name: values[name] for name in best} == best
    assert Settings(**values).lr == best["lr"]
    loss = tiedkl.FusedTiedLoss(**load_loss_options(tmp_path / "out" / "best.json"))
    assert loss.settings.scalars.options.alpha == pytest.approx(0.5 * 20)

    again = main(toy(check=3), "--quiet")  # nothing is trained again
    assert (again, capsys.readouterr().err) == (0, "")
    assert json.loads((tmp_path / "out" / "best.json").read_text()) == found


def test_best_is_judged_as_compare_judges(toy: Any, tmp_path: Path) -> None:
    """A trial is a run of `tiedkl compare`, to the last bit."""
    from tiedkl.compare import compare

    found = tune(toy(trials=1))
    settings = toy().compared()
    values = {f: getattr(settings, f) for f in settings.__dataclass_fields__}
    report = compare(Settings(**values | {"variants": ("real",), "out": str(tmp_path / "c"), "quiet": True}))
    assert found["valid_ppl"]["defaults"] == pytest.approx(report["variants"]["real"]["valid_ppl"], rel=1e-12)


def test_continuing_equals_the_whole_only_in_what_is_done(toy: Any) -> None:
    two = tune(toy(trials=2))
    four = tune(toy(trials=4))
    assert trials(four)[:2] == trials(two)
    params = [json.dumps(t["params"]) for t in four["trials"]]
    assert len(params) == len(set(params)) == 4  # the resumed sampler does not repeat itself


def test_seed_decides_the_search(toy: Any, tmp_path: Path) -> None:
    a, b, c = (tune(toy(trials=3, seed=s, out=str(tmp_path / n))) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert trials(a) == trials(b)
    assert trials(a)[1][1] != trials(c)[1][1]


def test_pruning_ends_trials_early(toy: Any) -> None:
    found = tune(toy(trials=8, epochs=3, search="lr=0.0001:4", seed=3))
    pruned = [t for t in found["trials"] if t["state"] == "pruned"]
    assert pruned
    assert all(0 < t["epochs"] < 3 for t in pruned)
    assert found["trials"][found["trial"]]["state"] == "complete"


def test_stopped_trial_is_repeated(toy: Any, tmp_path: Path) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 50  # an epoch is 14 steps: in the second trial

    with pytest.raises(Interrupted) as stopped:
        tune(toy(), should_stop=should_stop)
    assert [t["state"] for t in stopped.value.result["trials"]] == ["complete", "interrupted", "waiting"]
    assert json.loads((tmp_path / "out" / "best.json").read_text())["trial"] == 0
    lines: list[str] = []
    found = tune(toy(), say=lines.append)
    assert "1 trials done" in lines[0]
    assert found["trials"][2]["params"] == found["trials"][1]["params"]
    assert sum(t["state"] in ("complete", "pruned") for t in found["trials"]) == 4


def test_killed_defaults_are_still_the_first_result(toy: Any, tmp_path: Path) -> None:
    """SIGKILL in the first trial: the study is whole, and the defaults are tried again as such."""
    settings = toy(epochs=60)
    code = f"from tiedkl.tune import *; tune({settings!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        task = worker.Task(settings)
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            if (tmp_path / "out" / "study.db").exists():
                try:
                    running = studies.open_study(settings, task.identity).trials
                except CompareError:  # its tables are being made
                    running = []
                if running and running[0].intermediate_values:
                    break
            time.sleep(0.05)
        with pytest.raises(CompareError, match="another tiedkl tune is at work"):
            tune(settings)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(Interrupted) as stopped:
        tune(settings, should_stop=lambda: True)
    killed, again = stopped.value.result["trials"]
    assert (killed["state"], again["state"]) == ("interrupted", "waiting")
    assert killed["defaults"]
    assert again["defaults"]


def test_ctrl_c(toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps, train_step = 0, worker.Trainer._train_step

    def step(self: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 40:
            signal.raise_signal(signal.SIGINT)
        train_step(self)

    monkeypatch.setattr(worker.Trainer, "_train_step", step)
    assert main(toy()) == 130
    assert "interrupted" in capsys.readouterr().out
    assert main(toy()) == 0


def test_processes_share_the_study(toy: Any) -> None:
    found = tune(toy(trials=4, jobs=2, pruner="none"))
    assert sorted(t["state"] for t in found["trials"]) == ["complete"] * 4
    assert sum(t["defaults"] for t in found["trials"]) == 1


def test_timeout_stops_in_time_and_keeps_the_trial(toy: Any) -> None:
    began = time.monotonic()
    found = tune(toy(trials=50, epochs=400, timeout="1s"))
    assert time.monotonic() - began < 20
    assert len(found["trials"]) < 50
    assert found["trials"][-1]["state"] == "waiting"


def test_diverged_trial_counts_and_is_not_repeated(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, calls = worker.Task.train, 0

    def diverging(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise CompareError("+REAL: training diverged in epoch 1")
        return train(self, *args, **options)

    monkeypatch.setattr(worker.Task, "train", diverging)
    found = tune(toy(trials=3, pruner="none"))
    assert [t["state"] for t in found["trials"]] == ["complete", "diverged", "complete"]


def test_nothing_better_than_the_defaults_is_said(toy: Any) -> None:
    found = tune(toy(trials=1))
    assert found["verdict"] == [f"Nothing beats the defaults (validation perplexity {found['valid_ppl']['best']:.2f}) "
                                "in this search."]  # fmt: skip


def test_a_gain_that_other_seeds_do_not_show_is_said(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A winner that is the defaults but for 1e-9 in the learning rate, and a hair better in the search."""
    settings = toy(trials=2, check=3, search="lr=0.002:0.0020000001", pruner="none")
    train, seen = worker.Task.train, 0

    def lucky(self: Any, params: Any, seed: int, epoch_done: Any, *args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        bonus = 0.1 if seen == 2 else 0.0
        return train(self, params, seed, lambda k, ce: epoch_done(k, ce - bonus), *args, **options)

    monkeypatch.setattr(worker.Task, "train", lucky)
    found = tune(settings)
    assert found["verdict"][0].startswith("Improves on the defaults")
    assert not found["verdict"][1].startswith("It holds")


def test_other_settings_are_refused(toy: Any, tmp_path: Path) -> None:
    tune(toy(trials=1))
    with pytest.raises(CompareError, match=r"hidden=8, now 16.*--fresh"):
        tune(toy(trials=1, hidden=16))
    with pytest.raises(CompareError, match=r"search="):
        tune(toy(trials=1, search="lr=0.001:3,dropout"))
    assert tune(toy(trials=1, hidden=16, fresh=True))["settings"]["hidden"] == 16
    (tmp_path / "out" / "study.db").write_bytes(b"damaged" * 1000)
    with pytest.raises(CompareError, match=r"study\.db: not a readable study.*--fresh"):
        tune(toy(trials=1, hidden=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "momentum"}, "expected some of"),
        ({"search": ","}, "nothing to search"),
        ({"search": "lr=3:1"}, "LOW < HIGH"),
        ({"search": "lr=0:1"}, "0 < LOW"),
        ({"search": "dropout=0:1"}, "HIGH < 1"),
        ({"search": "lr=a:b"}, "two numbers"),
        ({"search": "lr=0.5:2"}, "leaves out the default 0.002"),
        ({"search": "gamma", "variant": "re"}, "has no augmented loss"),
        ({"trials": 0}, "trials=0"),
        ({"jobs": 0}, "jobs=0"),
        ({"timeout": "soon"}, "not a time"),
        ({"variant": "best"}, "unknown variant"),
        ({"pruner": "axe"}, "unknown pruner"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_input_is_named(toy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        toy(**changes)


def test_variants_without_the_augmented_loss_search_the_rest() -> None:
    assert list(TuneSettings(variant="re").ranges()) == ["lr", "dropout"]
    assert list(TuneSettings().ranges()) == ["gamma", "temperature", "lr", "dropout"]
    assert TuneSettings(model="transformer").ranges()["lr"].high == 0.003


def test_first_trials_lie_near_the_defaults(toy: Any) -> None:
    """Between half-way to the ends of the range, on its scale; they differ."""
    found = tune(toy(trials=4, epochs=1))
    near = [t["params"] for t in found["trials"][1:]]
    assert all((0.001 * 0.002) ** 0.5 <= p["lr"] <= (0.002 * 4) ** 0.5 for p in near)
    assert all(0.15 <= p["dropout"] <= 0.45 for p in near)
    assert len({p["dropout"] for p in near}) == 3


def test_bad_input_is_one_line_and_status_2(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(toy(), "--data=/absent") == 2
    assert capsys.readouterr().err == "tiedkl tune: /absent: no such file or directory\n"


def test_missing_package(toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(toy()) == 2
    assert capsys.readouterr().err == "tiedkl tune: optuna is not installed: pip install 'tiedkl[tune]'\n"


def test_options_have_the_defaults_of_the_settings() -> None:
    import argparse
    import dataclasses

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = vars(parser.parse_args(["tune"]))
    for field in dataclasses.fields(TuneSettings):
        assert args[field.name] == field.default, field.name
    assert search.tune is tune
