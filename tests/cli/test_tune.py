"""`tiedkl tune`: the search, resuming, interruption, several processes, the files it leaves."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import tiedkl
from tiedkl import cli
from tiedkl.compare.settings import CompareError, Settings, load_config, load_loss_options
from tiedkl.tune import Interrupted, TuneSettings, tune, worker

from .conftest import TOY


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
    assert "Better than the defaults in the search" in out
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


@pytest.mark.parametrize("asks", [2, 10, 15, 24])
def test_a_search_that_is_stopped_anywhere_finds_what_a_whole_one_finds(
    toy: Any, trainings: Any, tmp_path: Path, asks: int
) -> None:
    """Near the defaults and beyond, where the sampler proposes; it is asked before a trial and in its two epochs."""
    whole = tune(toy(trials=9, out=str(tmp_path / "whole")))
    points = [t["params"] for t in whole["trials"]]
    assert len({json.dumps(p) for p in points}) == 9  # the sampler does not repeat itself
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= asks

    with pytest.raises(Interrupted):
        tune(toy(trials=9), should_stop=should_stop)
    found = tune(toy(trials=9))
    assert sum(t["state"] == "interrupted" for t in found["trials"]) == (asks % 3 != 1)
    assert [t["params"] for t in found["trials"] if t["state"] != "interrupted"] == points
    assert found["valid_ppl"] == whole["valid_ppl"]


def test_trials_can_be_added(toy: Any, trainings: Any, tmp_path: Path) -> None:
    """The search is what it would have been with them from the start."""
    tune(toy(trials=5))
    assert trials(tune(toy(trials=9))) == trials(tune(toy(trials=9, out=str(tmp_path / "whole"))))


def test_seed_decides_the_search(toy: Any, trainings: Any, tmp_path: Path) -> None:
    a, b, c = (tune(toy(trials=3, seed=s, out=str(tmp_path / n))) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert trials(a) == trials(b)
    assert trials(a)[1][1] != trials(c)[1][1]


def test_pruning_ends_trials_early(toy: Any, trainings: Any) -> None:
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
        return asked > 30  # an epoch is 10 steps: in the second trial

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
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            with suppress(sqlite3.Error), closing(sqlite3.connect(tmp_path / "out" / "study.db")) as database:
                if database.execute("SELECT COUNT(*) FROM trial_intermediate_values").fetchone()[0]:
                    break
            time.sleep(0.1)
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
        if steps == 25:
            signal.raise_signal(signal.SIGINT)
        train_step(self)

    monkeypatch.setattr(worker.Trainer, "_train_step", step)
    assert main(toy()) == 130
    assert "interrupted" in capsys.readouterr().out
    assert main(toy()) == 0


def test_processes_share_the_study_and_the_text(toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The text is gone before they start: it was read and tokenised once."""
    load = worker.corpora.load

    def load_once(*args: Any, **options: Any) -> Any:
        text = load(*args, **options)
        (tmp_path / "text.txt").unlink()
        return text

    monkeypatch.setattr(worker.corpora, "load", load_once)
    found = tune(toy(trials=4, jobs=2, pruner="none", epochs=1))
    assert sorted(t["state"] for t in found["trials"]) == ["complete"] * 4
    assert sum(t["defaults"] for t in found["trials"]) == 1


def test_timeout_stops_in_time_and_keeps_the_trial(toy: Any) -> None:
    began = time.monotonic()
    found = tune(toy(trials=50, epochs=400, timeout="1s"))
    assert time.monotonic() - began < 20
    assert len(found["trials"]) < 50
    assert found["trials"][-1]["state"] == "waiting"


def test_other_settings_are_refused(toy: Any, tmp_path: Path) -> None:
    tune(toy(trials=1, epochs=1))
    with pytest.raises(CompareError, match=r"hidden=8, now 16.*--fresh"):
        tune(toy(trials=1, epochs=1, hidden=16))
    with pytest.raises(CompareError, match=r"search="):
        tune(toy(trials=1, epochs=1, search="lr=0.001:3,dropout"))
    with pytest.raises(CompareError, match="no such file"):
        tune(toy(trials=1, data=str(tmp_path / "nowhere"), fresh=True))
    assert (tmp_path / "out" / "best.json").exists(), "a request that cannot be carried out loses nothing"
    assert tune(toy(trials=1, epochs=1, hidden=16, fresh=True))["settings"]["hidden"] == 16
    (tmp_path / "out" / "study.db").write_bytes(b"damaged" * 1000)
    with pytest.raises(CompareError, match=r"study\.db: not a readable study.*--fresh"):
        tune(toy(trials=1, epochs=1, hidden=16))


def test_a_backend_that_cannot_run_is_said_before_the_search(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"impl='cuda' cannot run"):
        tune(toy(impl="cuda"))
    assert not (tmp_path / "out" / "study.db").exists()


def test_first_trials_lie_near_the_defaults(toy: Any, trainings: Any) -> None:
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
