"""The comparison from start to end: corpus, plan, runs one after the other, checkpoints, reports.

A run is one variant with one seed. All variants are trained with a seed before the next one begins, so that whatever
is there after an interruption can be compared.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import corpus as corpora
from .budget import FIXED, SHARE, describe, fit, planned
from .budget import measure as measure_speed
from .lock import locked
from .progress import Progress
from .reuse import Source, untrained
from .runs import Runs, memory_of
from .settings import SMALL, CompareError, Settings, Variant, ordered, parse_duration
from .store import LOCK, PLAN, Store
from .training import Data, Diverged, Trainer

DEFAULT_SEEDS = 1
SAVING = 0.02  # of a training's time for checkpoints after epochs
NEEDED = ("tqdm", "matplotlib", "jinja2")


class Interrupted(Exception):
    """The comparison was asked to stop; the state is saved, the reports are written, and `report` holds them."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.report = report


def require_packages() -> None:
    """Raise CompareError, with the command that installs them, when a package of the extras group is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise CompareError(f"{' and '.join(missing)} {verb} not installed: pip install 'tiedkl[compare]'")


def compare(settings: Settings, *, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train and evaluate the chosen variants; write `report.html`, `.md` and `.json`; return the report.

    An earlier run in `settings.out` with the same settings is continued; runs that ended in `settings.reuse` are taken
    over where every setting they use is the same. `should_stop` is asked after every training step; when it says yes,
    the state is saved, the reports are written and Interrupted is raised. Raises CompareError for anything the user has
    to change.
    """
    require_packages()
    device = pick_device(settings.device)
    threads_before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        return _compare(settings, device, should_stop)
    finally:
        torch.set_num_threads(threads_before)


def pick_device(name: str) -> torch.device:
    """The torch device called `name`. Raises CompareError when this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CompareError(f"unknown device {name!r}: expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise CompareError(f"device {name!r} is not supported: expected cpu or cuda")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise CompareError(f"device {name!r}: this PyTorch sees no such GPU; use --device cpu")
    return device


def _compare(settings: Settings, device: torch.device, should_stop: Callable[[], bool]) -> dict[str, Any]:
    began = time.monotonic()
    shortened = _read(settings)
    text = shortened(settings.max_tokens)
    facts = text.facts()
    config = settings.resolved(facts["tokens"]["train"]) | {"threads": torch.get_num_threads()}
    check_length(facts["tokens"], config["batch"], config["bptt"])
    variants = ordered(settings.variants)
    store = Store(settings.out)
    with locked(store.path, LOCK, "tiedkl compare"):
        identity = config | {"corpus": facts["sha256"]}
        kept = store.earlier(identity, fresh=settings.fresh)
        source = Source(settings.reuse, store) if settings.reuse is not None and not kept else None
        plan = kept.get(PLAN) if kept else source.plan(settings) if source else None
        planner = kept or (source.config if source else {})
        if plan:
            config["budget"] = planner["budget"]
        try:
            if config["budget"] is not None:
                plan = plan or _plan(settings, shortened, text, config, device, began)
                config = planned(config, plan)
                if plan["max_tokens"] is not None:
                    text = shortened(plan["max_tokens"])
                    facts = text.facts()
            data = Data.of(text, config["batch"], device)
            trainers = [Trainer(v, config, data, device) for v in variants]
            for trainer in trainers:
                memory_of(trainer)
        except (RuntimeError, ValueError) as error:  # a backend of the loss that cannot run here says why
            raise CompareError(str(error).splitlines()[0]) from None
        n_steps = trainers[0].steps_per_epoch * config["epochs"]
        del trainers
        n_seeds = max(plan["seeds"], settings.seeds or 0) if plan else settings.seeds or DEFAULT_SEEDS
        wanted = [(seed, v) for seed in range(settings.seed, settings.seed + n_seeds) for v in variants]
        reusable: list[tuple[int, Variant]] = []
        missing = untrained(store, wanted, config) if kept and settings.reuse is not None else wanted
        if settings.reuse is not None and missing:
            source = source or Source(settings.reuse, store)
            source.check(config | {"corpus": identity["corpus"]}, device)
            reusable, why = source.matching(missing, config)
            if not kept:
                source.require(reusable, why)
        if not kept:
            store.begin(identity | {"budget": config["budget"]} | ({PLAN: plan} if plan else {}))
        if source:
            source.hand_over(reusable)
        runs = Runs(store, config, data, device, wanted)
        if plan:
            said = describe(plan, config, facts["tokens"]["train"], len(runs.seeds))
            plan = plan | {"budget": config["budget"], "text": said}
        progress = Progress(n_steps * len(runs), runs.steps_done, quiet=settings.quiet)
        try:
            if plan:
                progress.say(plan["text"])
            if reusable:
                what = ", ".join(_label(seed, variant, n_seeds) for seed, variant in reusable)
                progress.say(f"taken over from {settings.reuse}: {what}")
            if kept and runs.begun:
                progress.say(f"continuing the comparison in {store.path}")
            for seed, variant in wanted:
                if runs.ended(seed, variant):
                    continue
                trainer, name = runs.trainer(seed, variant), runs.name(seed, variant)
                save, label = partial(store.save, name), _label(seed, variant, n_seeds)
                finished = train(trainer, label, save, progress, settings.checkpoint_every, should_stop)
                runs.note(trainer)
                if not finished:
                    raise Interrupted(runs.report(settings, facts, plan))
        finally:
            progress.close()
        return runs.report(settings, facts, plan)


def _label(seed: int, variant: Variant, n_seeds: int) -> str:
    """What a run is called on the screen."""
    return variant.label if n_seeds == 1 else f"{variant.label} seed {seed}"


def _read(settings: Settings) -> Callable[[int | None], corpora.Corpus]:
    return corpora.read(
        settings.data, vocab_size=settings.vocab_size, min_count=settings.min_count, tokenizer=settings.tokenizer
    )


def _plan(
    settings: Settings,
    shortened: Callable[[int | None], corpora.Corpus],
    text: corpora.Corpus,
    config: dict[str, Any],
    device: torch.device,
    began: float,
) -> dict[str, Any]:
    """What fits into the budget, less the time since `began`: the plan of `fit`, and the batch.

    shortened: gives `text` as long as one wants it (`corpus.read`).
    A long text of which little is left gets the batch and the number of epochs of a short one.
    """
    data, budget = Data.of(text, config["batch"], device), parse_duration(str(settings.budget))
    speed = measure_speed([Trainer(v, config, data, device) for v in ordered(settings.variants)], budget)
    tokens, spent = text.facts()["tokens"], time.monotonic() - began
    plan = fit(
        speed,
        tokens,
        SHARE * (budget - FIXED - spent),
        config,
        seeds=settings.seeds,
        epochs=settings.epochs,
        decay_after=settings.decay_after,
        spent=spent,
    ) | {"batch": config["batch"]}
    longest = SMALL - 1
    short = settings.resolved(longest) | {"threads": config["threads"]}
    if (plan["max_tokens"] or tokens["train"]) <= longest < tokens["train"] and short != config:
        plan = _plan(settings, shortened, shortened(longest), short, device, began)
        plan["max_tokens"] = plan["max_tokens"] or longest
    return plan


def check_length(tokens: dict[str, int], batch: int, bptt: int) -> None:
    """Raise CompareError unless the text fills the batch: a window of training, two steps of validation and test."""
    for split, low in (("train", batch * bptt), ("valid", 2 * batch), ("test", 2 * batch)):
        if tokens[split] < low:
            raise CompareError(
                f"the text is too short: its {split} split has {tokens[split]} tokens, at least {low} are needed; "
                "give more text, or a smaller --batch or --bptt"
            )


def train(
    trainer: Trainer,
    label: str,
    save: Callable[[dict[str, Any]], None],
    progress: Progress,
    every: float,
    should_stop: Callable[[], bool],
) -> bool:
    """Train one variant to its end, saving every `every` seconds, after an epoch, at the end and when told to stop.

    Where epochs are short and weights are large, not after each epoch, so that saving takes no more than `SAVING` of
    the time; but `every` goes first. False when it was stopped; a training that diverges has ended too.
    """
    epochs = trainer.settings["epochs"]
    saved, took = time.monotonic(), 0.0
    try:
        for event in trainer.run():
            if event == "step":
                progress.step(label, trainer.epoch + 1, epochs)
            elif event == "epoch":
                progress.epoch(label, trainer.curves[-1], epochs)
            stop = should_stop() and not trainer.done
            due = every if event == "step" else min(every, took / SAVING)
            if stop or event == "done" or time.monotonic() - saved >= due:
                state = trainer.state_dict()  # waits for the steps that a GPU was given
                began = time.monotonic()
                save(state)
                saved = time.monotonic()
                took = saved - began
            if stop:
                return False
    except Diverged as error:
        save(trainer.state_dict())
        progress.say(str(error))
    return True


def report_paths(out: str) -> tuple[Path, Path, Path]:
    """Where the reports of a comparison in `out` lie: HTML, Markdown, JSON."""
    path = Store(out).path
    return path / "report.html", path / "report.md", path / "report.json"
