"""Trials: a process asks the study for parameters, trains, reports each epoch, and tells the result."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compare import corpus as corpora
from ..compare.runner import check_length, pick_device
from ..compare.settings import VARIANTS, CompareError
from ..compare.training import Data, Trainer
from . import report
from .settings import TuneSettings
from .study import DIVERGED, REASON, abandon, finished, open_study, optuna, queue_neighbour


class Stopped(Exception):
    """The training was asked to stop."""


class Task:
    """The text and the settings of all trials; `train` makes one model."""

    def __init__(self, settings: TuneSettings) -> None:
        self.device = pick_device(settings.device)
        compared = settings.compared()
        text = corpora.load(
            settings.data,
            vocab_size=settings.vocab_size,
            min_count=settings.min_count,
            max_tokens=settings.max_tokens,
            tokenizer=settings.tokenizer,
        )
        self.facts = text.facts()
        n_train = self.facts["tokens"]["train"]
        self.config = compared.resolved(n_train)
        check_length(self.facts["tokens"], self.config["batch"], self.config["bptt"])
        self.data = Data.of(text, self.config["batch"], self.device)
        self.variant = VARIANTS[settings.variant]
        self.identity = {k: v for k, v in self.config.items() if k not in ("threads", "budget")} | {
            "corpus": self.facts["sha256"],
            "variant": settings.variant,
            "search": {name: list(r) for name, r in settings.ranges().items()},
            "defaults": settings.defaults(),
        }

    def train(
        self,
        params: dict[str, float],
        seed: int,
        epoch_done: Callable[[int, float], None],
        should_stop: Callable[[], bool],
        *,
        test: bool,
    ) -> Trainer:
        """Train with `params`; `epoch_done(epoch, valid_ce)` may raise to end it, Stopped is raised when told to.

        Without `test` the test split is never looked at. Raises CompareError when the training diverges.
        """
        try:
            trainer = Trainer(self.variant, self.config | params | {"seed": seed}, self.data, self.device)
        except (RuntimeError, ValueError) as error:
            raise CompareError(str(error).splitlines()[0]) from None
        for event in trainer.run():
            if should_stop():
                raise Stopped
            if event == "epoch":
                epoch_done(trainer.epoch, trainer.curves[-1]["valid_ce"])
                if trainer.epoch == self.config["epochs"] and not test:
                    break
        return trainer


def work(
    settings: TuneSettings,
    quota: int,
    worker: int,
    deadline: float | None,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """Run up to `quota` trials. A trial under way at the deadline (of time.time) or at a stop is queued again."""
    torch.set_num_threads(threads(settings))
    task = Task(settings)
    study = open_study(settings, task.identity, worker=worker)

    def over() -> bool:
        return should_stop() or (deadline is not None and time.time() >= deadline)

    for _ in range(quota):
        if over():
            return
        queue_neighbour(study, settings)
        trial = study.ask()
        params = {name: trial.suggest_float(name, r.low, r.high, log=r.log) for name, r in settings.ranges().items()}
        if not _trial(task, study, trial, params, settings, over):
            return
        out = Path(settings.out).expanduser()
        if worker == 0:  # one process writes; the command itself writes again at the end
            report.write_best(study, settings, task, out)
        say(report.line(study, trial.number, len(finished(study)), settings.trials))


def _trial(
    task: Task, study: Any, trial: Any, params: dict[str, float], settings: TuneSettings, over: Callable[[], bool]
) -> bool:
    """One trial; False when it was stopped."""
    package = optuna()
    state, began, best = package.trial.TrialState, time.perf_counter(), float("inf")

    def epoch_done(epoch: int, valid_ce: float) -> None:
        nonlocal best
        best = min(best, valid_ce)
        trial.report(valid_ce, epoch)
        if epoch < settings.epochs and trial.should_prune():
            raise package.TrialPruned

    try:
        task.train(params, settings.seed, epoch_done, over, test=False)
        outcome: dict[str, Any] = {"values": best}
    except package.TrialPruned:
        outcome = {"state": state.PRUNED}
    except CompareError as error:
        if "diverged" not in str(error):
            abandon(study, trial)
            raise
        trial.set_user_attr(REASON, DIVERGED)
        outcome = {"state": state.FAIL}
    except (Stopped, KeyboardInterrupt) as stopped:
        abandon(study, trial)
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return False
    trial.set_user_attr("seconds", time.perf_counter() - began)
    study.tell(trial, **outcome)
    return True


def threads(settings: TuneSettings) -> int:
    """Threads of one process: what the user said, else an equal share of PyTorch's choice."""
    return settings.threads or max(1, torch.get_num_threads() // settings.jobs)


def child(
    settings: TuneSettings, quota: int, worker: int, deadline: float | None, say: Callable[[str], None], parent: int
) -> None:
    """`work` in a process of its own: stops at Ctrl-C, and when the command that started it is gone."""
    pressed = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    work(settings, quota, worker, deadline, say, lambda: pressed.is_set() or os.getppid() != parent)
