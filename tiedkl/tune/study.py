"""The study on the disk: an SQLite file that processes share, that says what it was made for and survives a kill.

A trial that was interrupted is marked failed and queued again, so that its place in the search is not lost. Only one
command at a time works on a study (a lock on a file beside it); therefore whatever is marked as running when a command
starts has been killed.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from ..compare.settings import CompareError
from ..compare.store import differences
from .settings import TuneSettings

NAME = "tiedkl"
DATABASE, LOCK, BEST, TABLE = "study.db", "study.lock", "best.json", "tune.md"
DEFAULTS, REASON, NOTE = "defaults", "reason", "note"  # attributes of a trial
DIVERGED, ABANDONED = "diverged", "interrupted"
DIVERGED_CE = 1e6  # what the sampler is told of a training that diverged


def optuna() -> Any:
    """The package, quiet. Raises CompareError, with the command that installs it, when it is missing."""
    try:
        import optuna as package
    except ImportError:
        raise CompareError("optuna is not installed: pip install 'tiedkl[tune]'") from None
    package.logging.set_verbosity(package.logging.ERROR)
    return package


def clear(out: Path) -> None:
    """Remove a study and what was made from it."""
    for file in (*out.glob("check-*.pt"), *(out / name for name in (DATABASE, BEST, TABLE))):
        file.unlink(missing_ok=True)


def open_study(settings: TuneSettings, identity: dict[str, Any]) -> Any:
    """The study in `settings.out`, made with the defaults as its first trial where there is none.

    Raises CompareError when the study belongs to other settings or text, or cannot be read.
    """
    package = optuna()
    file = Path(settings.out).expanduser() / DATABASE
    try:
        storage = package.storages.RDBStorage(
            f"sqlite:///{file.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        study = package.create_study(storage=storage, study_name=NAME, direction="minimize", load_if_exists=True)
        old = study.user_attrs.get("identity")
    except Exception as error:
        raise CompareError(f"{file}: not a readable study ({type(error).__name__}); start again with --fresh") from None
    identity = json.loads(json.dumps(identity))
    if old is None:
        study.set_user_attr("identity", identity)
        study.enqueue_trial(settings.defaults(), user_attrs={DEFAULTS: True})
    elif what := differences(old, identity):
        raise CompareError(f"{file} holds a search with other settings ({what}): start again with --fresh, or --out")
    study.pruner = {
        "median": lambda: package.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=max(1, settings.epochs // 2)),
        "hyperband": lambda: package.pruners.HyperbandPruner(min_resource=1, max_resource=settings.epochs),
        "none": package.pruners.NopPruner,
    }[settings.pruner]()
    return study


def startup(settings: TuneSettings) -> int:
    """Trials after the defaults that lie near them, before the sampler takes over."""
    return max(3, min(10, settings.trials // 4))


def prepare(study: Any, settings: TuneSettings, worker: int) -> None:
    """Make ready for the next `ask`: a sampler with a seed of its own, and a point near the defaults at the beginning.

    All that is drawn depends on the number of trials, without those that were interrupted: they are queued again. So a
    search of one process that was stopped tries the points that it would have tried. (Hyperband goes by the number of
    a trial, and may end others early.)
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get(REASON) != ABANDONED]
    study.sampler = optuna().samplers.TPESampler(
        seed=random.Random(f"{settings.seed}-{worker}-{len(trials)}").getrandbits(31),
        n_startup_trials=startup(settings) + 1,
        constant_liar=settings.jobs > 1,
    )
    if len(trials) <= startup(settings) and not any(t.state.name == "WAITING" for t in trials):
        _queue_neighbour(study, settings, len(trials))


def _queue_neighbour(study: Any, settings: TuneSettings, k: int) -> None:
    """Queue the k-th point near the defaults.

    Random points of the whole space are mostly bad, and a short search has no trials to waste. Each setting is drawn
    between half-way to the low and half-way to the high end of its range, on the range's scale.
    """
    rng = random.Random(f"{settings.seed}-{k}")
    point = {}
    for name, (low, high, log) in settings.ranges().items():
        ends = (low, settings.defaults()[name], high)
        a, x, b = map(math.log, ends) if log else ends
        value = rng.uniform((a + x) / 2, (x + b) / 2)
        point[name] = min(high, max(low, math.exp(value) if log else value))
    study.enqueue_trial(point)


def recover(study: Any) -> int:
    """Queue again what a killed process left running; the number of such trials."""
    running = study.get_trials(deepcopy=False, states=(optuna().trial.TrialState.RUNNING,))
    for trial in running:
        abandon(study, trial)
    return len(running)


def abandon(study: Any, trial: Any) -> None:
    """Mark an unfinished trial failed, with the reason, and queue its parameters again."""
    package = optuna()
    number, params = trial.number, dict(trial.params)
    attributes = {DEFAULTS: True} if trial.user_attrs.get(DEFAULTS) else {}
    study._storage.set_trial_user_attr(trial._trial_id, REASON, ABANDONED)
    study.tell(number, state=package.trial.TrialState.FAIL, skip_if_finished=True)
    if params or attributes:
        fixed = params or study.user_attrs["identity"]["defaults"]
        study.enqueue_trial(fixed, user_attrs={**attributes, "again": number})


def finished(study: Any) -> list[Any]:
    """Trials that count: complete, pruned, diverged; not those that were interrupted."""
    state = optuna().trial.TrialState
    return [
        t
        for t in study.get_trials(deepcopy=False)
        # earlier versions marked those that diverged as failed
        if t.state in (state.COMPLETE, state.PRUNED) or (t.state == state.FAIL and t.user_attrs.get(REASON) == DIVERGED)
    ]
