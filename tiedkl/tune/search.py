"""The search from start to end: open or continue the study, run trials, check the winner, write the result."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compare.evidence import Run, against
from ..compare.lock import locked
from ..compare.settings import CompareError, parse_duration
from ..compare.store import Store, differences
from ..compare.tables import number
from ..compare.training import Diverged
from . import report
from .settings import TuneSettings
from .study import LOCK, clear, finished, open_study, optuna, recover
from .worker import Stopped, Task, child, work


class Interrupted(Exception):
    """The search was asked to stop; the study is whole, and `result` holds what it has found so far."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.result = result


def _silent(_: str) -> None:
    pass


def tune(
    settings: TuneSettings,
    *,
    say: Callable[[str], None] = _silent,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Search, or continue the search in `settings.out`; write `best.json` and `tune.md`; return the result (report.py).

    `say` gets a line after each trial; with several jobs it must be a function that can be pickled. `should_stop` is
    asked after every training step; when it says yes, Interrupted is raised. Trainings that diverge are part of the
    result. Raises CompareError for what the user has to change.
    """
    optuna()
    deadline = None if settings.timeout is None else time.time() + parse_duration(settings.timeout)
    threads_before, out = torch.get_num_threads(), Path(settings.out).expanduser()
    stopped = False

    def late() -> bool:
        return deadline is not None and time.time() >= deadline

    try:
        with locked(out, LOCK, "tiedkl tune"):
            task = Task(settings)
            if settings.fresh:
                clear(out)
            study = open_study(settings, task.identity)
            lost, n_done = recover(study), len(finished(study))
            if n_done or lost:
                again = f", {lost} that were interrupted are repeated" if lost else ""
                say(f"continuing the study in {out}: {n_done} trials done{again}")
            left = settings.trials - n_done
            if left > 0:
                _run(task, study, settings, left, deadline, say, should_stop)
            stopped, n_done = should_stop(), len(finished(study))
            torch.set_num_threads(threads_before if settings.threads is None else settings.threads)
            checked = None
            if not stopped and settings.check and n_done >= settings.trials:
                checked = _check(settings, task, study, out, say, lambda: should_stop() or late())
                stopped = should_stop()
            unchecked = report.why_unchecked(settings, n_done, late=late() and not stopped)
            result = report.write_best(study, settings, task, out, checked, unchecked)
    finally:
        torch.set_num_threads(threads_before)
    if stopped:
        raise Interrupted(result)
    return result


def _run(
    task: Task,
    study: Any,
    settings: TuneSettings,
    left: int,
    deadline: float | None,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """`left` trials, shared between the jobs."""
    jobs = min(settings.jobs, left)
    if jobs == 1:
        work(task, study, settings, left, 0, deadline, say, should_stop)
        return
    context = multiprocessing.get_context("spawn")
    text = pickle.dumps(task.text)
    shares = [left // jobs + (k < left % jobs) for k in range(jobs)]
    processes = [
        context.Process(target=child, args=(text, settings, share, k, deadline, say, os.getpid()), name=f"tune-{k}")
        for k, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    told = False
    for process in processes:
        while process.is_alive():
            process.join(0.2)
            if should_stop() and not told:  # a signal to this process alone
                told = True
                for other in processes:
                    if other.is_alive() and other.pid:
                        os.kill(other.pid, signal.SIGINT)
    failed = [p.name for p in processes if p.exitcode]
    if failed and not should_stop():
        raise CompareError(f"{', '.join(failed)} ended with an error; what was found is kept in {settings.out}")


def _check(
    settings: TuneSettings,
    task: Task,
    study: Any,
    out: Path,
    say: Callable[[str], None],
    over: Callable[[], bool],
) -> dict[str, Any] | None:
    """The winner and the defaults with other seeds, on the test split, which no trial has seen (form: report.py).

    The winner is the best of the finalists that is better than the defaults on validation with these seeds. None when
    `over` says stop before the first is checked, and when there is nothing to compare. Trainings that have ended are
    kept in files, so that a check goes on where it was stopped.
    """
    (defaults, _), store = report.pair(study), Store(str(out))
    tried: list[dict[str, Any]] = []
    for trial in report.finalists(study):
        found = _against_defaults(settings, task, defaults, trial, store, say, over)
        if found is None:
            return tried[0] | {"rejected": tried[1:], "unfinished": trial.number} if tried else None
        if found["held"] or report.defaults_diverged(found):
            return found | {"rejected": tried, "unfinished": None}
        tried.append(found)
    return tried[0] | {"rejected": tried[1:], "unfinished": None} if tried else None


def _against_defaults(
    settings: TuneSettings,
    task: Task,
    defaults: Any,
    trial: Any,
    store: Store,
    say: Callable[[str], None],
    over: Callable[[], bool],
) -> dict[str, Any] | None:
    """One trial against the defaults with every seed of the check; None when `over` says stop."""
    runs: dict[str, list[Run]] = {"defaults": [], "best": []}
    rows, diverged = [], []
    for seed in range(settings.seed + 1, settings.seed + 1 + settings.check):
        row: dict[str, Any] = {"seed": seed}
        for which, of in (("defaults", defaults), ("best", trial)):
            kept = _training(task, of, seed, store, over)
            if kept is None:
                return None
            runs[which].append(Run(seed, {}, kept["losses"]))
            row[which] = kept["valid_ppl"]
            if kept.get("diverged"):
                diverged.append({"seed": seed, "settings": which, "note": kept["diverged"]})
        rows.append(row)
        say(
            f"check of trial {trial.number} with seed {seed}: valid ppl {number(row['best'], '.2f')}, "
            f"{number(row['defaults'], '.2f')} (defaults)"
        )
    change = report.valid_change(rows)
    held = change is not None and change < 0
    test = against(runs["defaults"], runs["best"])
    return {"trial": trial.number, "valid_ppl": rows, "diverged": diverged, "held": held, "test": test}


def _training(task: Task, trial: Any, seed: int, store: Store, over: Callable[[], bool]) -> dict[str, Any] | None:
    """`valid_ppl` and test `losses` of the trial's settings with another seed; None when stopped.

    Both are None where the training diverged, and `diverged` says when it did.
    """
    name = f"check-{trial.number}-{seed}"
    made_for = json.dumps([task.identity, trial.params], sort_keys=True)
    kept = store.load(name, torch.device("cpu"))
    if kept is None or not _same(kept.get("made_for"), made_for):
        if over():
            return None
        try:
            trainer = task.train(trial.params, seed, lambda *_: None, over, test=True)
            kept = {"valid_ppl": trainer.best["valid_ppl"], "losses": trainer.test_losses}
        except Stopped:
            return None
        except Diverged as error:
            kept = {"valid_ppl": None, "losses": None, "diverged": str(error)}
        store.save(name, kept | {"made_for": made_for})
    return kept


def _same(old: str | None, new: str) -> bool:
    """Whether a training that was kept is of this study and these parameters."""
    if old is None:
        return False
    (identity, params), (own, wanted) = json.loads(old), json.loads(new)
    return bool(params == wanted and not differences(identity, own))
