"""Trials: a process asks the study for parameters, trains, reports each epoch, and tells the result."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compare import corpus as corpora
from ..compare.lock import in_turn
from ..compare.runner import check_length, pick_device
from ..compare.settings import VARIANTS, CompareError
from ..compare.training import Data, Diverged, Trainer
from . import report
from .settings import TuneSettings
from .study import DEFAULTS, DIVERGED, DIVERGED_CE, NOTE, REASON, abandon, finished, open_study, optuna, prepare


class Stopped(Exception):
    """The training was asked to stop."""


class Task:
    """The text and the settings of all trials; `train` makes one model. `text` is given where it has been read."""

    def __init__(self, settings: TuneSettings, text: corpora.Corpus | None = None) -> None:
        self.device = pick_device(settings.device)
        compared = settings.compared()
        self.text = text = text or corpora.load(
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
        self._trainer({})  # what cannot begin says so before the search
        self.identity = {k: v for k, v in self.config.items() if k not in ("threads", "budget")} | {
            "corpus": self.facts["sha256"],
            "variant": settings.variant,
            "search": {name: list(r) for name, r in settings.ranges().items()},
            "defaults": settings.defaults(),
        }

    def _trainer(self, changes: dict[str, float]) -> Trainer:
        """A training at its start. Raises CompareError when it cannot begin."""
        try:
            trainer = Trainer(self.variant, self.config | changes, self.data, self.device)
            trainer.loss.plan(trainer.model, self.config["batch"] * self.config["bptt"])
        except (RuntimeError, ValueError) as error:  # a backend of the loss that cannot run here says why
            raise CompareError(str(error).splitlines()[0]) from None
        return trainer

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

        Without `test` the test split is never looked at. Raises Diverged when the training diverges, and CompareError
        when it cannot begin.
        """
        trainer = self._trainer(params | {"seed": seed})
        for event in trainer.run():
            if should_stop():
                raise Stopped
            if event == "epoch":
                epoch_done(trainer.epoch, trainer.curves[-1]["valid_ce"])
                if trainer.epoch == self.config["epochs"] and not test:
                    break
        return trainer


def work(
    task: Task,
    study: Any,
    settings: TuneSettings,
    quota: int,
    worker: int,
    deadline: float | None,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """Run up to `quota` trials. A trial under way at the deadline (of time.time) or at a stop is queued again."""
    torch.set_num_threads(threads(settings))

    def over() -> bool:
        return should_stop() or (deadline is not None and time.time() >= deadline)

    out = Path(settings.out).expanduser()
    for _ in range(quota):
        if over():
            return
        # SQLite locks no rows, and Optuna would give two the same waiting trial
        with in_turn(out):
            prepare(study, settings, worker)
            trial = study.ask()
        params = {name: trial.suggest_float(name, r.low, r.high, log=r.log) for name, r in settings.ranges().items()}
        if not _trial(task, study, trial, params, settings, over):
            return
        if worker == 0:  # one process writes; the command itself writes again at the end
            report.write_best(study, settings, task, out)
        say(report.line(study, trial.number, len(finished(study)), settings.trials))


def _trial(
    task: Task, study: Any, trial: Any, params: dict[str, float], settings: TuneSettings, over: Callable[[], bool]
) -> bool:
    """One trial; False when it was stopped."""
    package = optuna()
    state, began, best, n_epochs = package.trial.TrialState, time.perf_counter(), float("inf"), 0

    def epoch_done(epoch: int, valid_ce: float) -> None:
        nonlocal best, n_epochs
        best, n_epochs = min(best, valid_ce), epoch
        trial.report(valid_ce, epoch)
        judged = epoch == settings.epochs or trial.user_attrs.get(DEFAULTS)  # the defaults are needed to the end
        if not judged and trial.should_prune():
            raise package.TrialPruned

    try:
        task.train(params, settings.seed, epoch_done, over, test=False)
        outcome: dict[str, Any] = {"values": best}
    except package.TrialPruned:
        outcome = {"state": state.PRUNED}
    except Diverged as error:
        trial.set_user_attr(REASON, DIVERGED)
        trial.set_user_attr(NOTE, str(error))
        trial.report(DIVERGED_CE, n_epochs + 1)  # the sampler overlooks failed trials, and would come back here
        outcome = {"state": state.PRUNED}
    except (Stopped, CompareError, KeyboardInterrupt) as stopped:
        abandon(study, trial)
        if not isinstance(stopped, Stopped):
            raise
        return False
    trial.set_user_attr("seconds", time.perf_counter() - began)
    study.tell(trial, **outcome)
    return True


def threads(settings: TuneSettings) -> int:
    """Threads of one process: what the user said, else an equal share of PyTorch's choice."""
    return settings.threads or max(1, torch.get_num_threads() // settings.jobs)


def child(
    text: bytes,
    settings: TuneSettings,
    quota: int,
    worker: int,
    deadline: float | None,
    say: Callable[[str], None],
    parent: int,
) -> None:
    """`work` in a process of its own: stops at Ctrl-C, and when the command that started it is gone.

    text: the pickled `Task.text`, so that it is read and tokenised once and not in each process.
    """
    pressed = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    task = Task(settings, pickle.loads(text))
    study = open_study(settings, task.identity)
    work(task, study, settings, quota, worker, deadline, say, lambda: pressed.is_set() or os.getppid() != parent)
