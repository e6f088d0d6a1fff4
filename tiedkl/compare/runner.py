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

from ..environment import stamp
from . import corpus as corpora
from .budget import FIXED, SHARE, describe, fit
from .budget import measure as measure_speed
from .evidence import Run
from .inference import measure
from .markdown import markdown
from .memory import loss_memory, training_memory
from .page import render
from .progress import Progress
from .report import build, to_json
from .settings import CompareError, Settings, Variant, ordered, parse_duration
from .store import PLAN, Store, checkpoint_name
from .training import Data, Trainer

DEFAULT_SEEDS = 1
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

    An earlier run in `settings.out` with the same settings is continued. `should_stop` is asked after every training
    step; when it says yes, the state is saved, the reports are written and Interrupted is raised. Raises CompareError
    for anything the user has to change.
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
    text = _load(settings, settings.max_tokens)
    facts = text.facts()
    config = settings.resolved(facts["tokens"]["train"]) | {"threads": torch.get_num_threads()}
    check_length(facts["tokens"], config["batch"], config["bptt"])
    variants = ordered(settings.variants)
    identity = config | {"corpus": facts["sha256"]}
    store = Store(settings.out)
    plan = None if settings.budget is None or settings.fresh else store.planned(identity)
    try:
        data = Data.of(text, config["batch"], device)
        trainers = [Trainer(v, config, data, device) for v in variants]
        if settings.budget is not None:
            plan = plan or _plan(settings, trainers, facts["tokens"], config, began)
            config |= {name: plan[name] for name in ("epochs", "decay_after", "max_tokens")}
            if plan["max_tokens"] is not None:
                text = _load(settings, plan["max_tokens"])
                facts, data = text.facts(), Data.of(text, config["batch"], device)
            trainers = [Trainer(v, config, data, device) for v in variants]
        n_tokens = config["batch"] * config["bptt"]
        memory = {}
        for t in trainers:
            layer = loss_memory(t.model, t.loss, n_tokens)
            memory[t.variant.name] = {
                "loss_memory": layer,
                "training_memory": training_memory(t.model, t.optimizer, layer),
            }
    except (RuntimeError, ValueError) as error:  # a backend of the loss that cannot run here says why
        raise CompareError(str(error).splitlines()[0]) from None
    n_steps = trainers[0].steps_per_epoch * config["epochs"]
    del trainers
    resumed = store.open(identity | ({PLAN: plan} if plan else {}), fresh=settings.fresh)
    n_seeds = settings.seeds or (plan["seeds"] if plan else DEFAULT_SEEDS)  # seeds can be added to a plan too
    grid = [(seed, v) for seed in range(settings.seed, settings.seed + n_seeds) for v in variants]

    def trainer_of(seed: int, variant: Variant) -> Trainer:
        trainer = Trainer(variant, config | {"seed": seed}, data, device)
        state = store.load(checkpoint_name(variant.name, seed, settings.seed), device)
        if state is not None:
            trainer.load_state_dict(state)
        return trainer

    runs: dict[tuple[int, str], Run] = {}

    def note(seed: int, trainer: Trainer) -> int:
        if trainer.steps_done:
            runs[seed, trainer.variant.name] = Run(seed, trainer.result(), trainer.test_losses)
        return trainer.steps_done

    def report() -> dict[str, Any]:
        by_variant = {v.name: [runs[s, v.name] for s, w in grid if w is v and (s, v.name) in runs] for v in variants}
        complete = len(runs) == len(grid) and all(run.done for run in runs.values())
        use = measure({v.name: trainer_of(settings.seed, v) for v in variants}) if complete else {}
        seeds = sorted({seed for seed, _ in grid})
        built = build(
            config | {"seeds": seeds},
            facts,
            stamp(device),
            by_variant,
            memory=memory,
            inference=use,
            plan=plan and plan | {"budget": settings.budget, "text": describe(plan, str(settings.budget))},
            price_per_hour=settings.price_per_hour,
            request=settings,
        )
        store.write("report.json", to_json(built))
        store.write("report.html", render(built))
        store.write("report.md", markdown(built))
        return built

    done = 0
    for seed, variant in grid:
        if store.has(checkpoint_name(variant.name, seed, settings.seed)):
            done += note(seed, trainer_of(seed, variant))
    progress = Progress(n_steps * len(grid), done, quiet=settings.quiet)
    try:
        if plan:
            progress.say(describe(plan, str(settings.budget)))
        if resumed and runs:
            progress.say(f"continuing the comparison in {store.path}")
        for seed, variant in grid:
            if (seed, variant.name) in runs and runs[seed, variant.name].done:
                continue
            trainer = trainer_of(seed, variant)
            label = variant.label if n_seeds == 1 else f"{variant.label} seed {seed}"
            save = partial(store.save, checkpoint_name(variant.name, seed, settings.seed))
            finished = _train(trainer, label, save, progress, settings.checkpoint_every, should_stop)
            note(seed, trainer)
            if not finished:
                raise Interrupted(report())
    finally:
        progress.close()
    return report()


def _load(settings: Settings, max_tokens: int | None) -> corpora.Corpus:
    return corpora.load(
        settings.data,
        vocab_size=settings.vocab_size,
        min_count=settings.min_count,
        max_tokens=max_tokens,
        tokenizer=settings.tokenizer,
    )


def _plan(
    settings: Settings, trainers: list[Trainer], tokens: dict[str, int], config: dict[str, Any], began: float
) -> dict[str, Any]:
    """What fits into the budget, less the time since `began`."""
    budget = parse_duration(str(settings.budget))
    speed = measure_speed(trainers, budget)
    seconds = SHARE * (budget - FIXED - (time.monotonic() - began))
    return fit(
        speed,
        tokens,
        seconds,
        config,
        seeds=settings.seeds,
        epochs=settings.epochs,
        decay_after=settings.decay_after,
    )


def check_length(tokens: dict[str, int], batch: int, bptt: int) -> None:
    """Raise CompareError unless the text fills the batch: a window of training, two steps of validation and test."""
    for split, low in (("train", batch * bptt), ("valid", 2 * batch), ("test", 2 * batch)):
        if tokens[split] < low:
            raise CompareError(
                f"the text is too short: its {split} split has {tokens[split]} tokens, at least {low} are needed; "
                "give more text, or a smaller --batch or --bptt"
            )


def _train(
    trainer: Trainer,
    label: str,
    save: Callable[[dict[str, Any]], None],
    progress: Progress,
    every: float,
    should_stop: Callable[[], bool],
) -> bool:
    """Train one variant, saving every `every` seconds, after each epoch and when told to stop; False if stopped."""
    epochs = trainer.settings["epochs"]
    saved = time.monotonic()
    for event in trainer.run():
        if event == "step":
            progress.step(label, trainer.epoch + 1, epochs)
        elif event == "epoch":
            progress.epoch(label, trainer.curves[-1], epochs)
        stop = should_stop() and not trainer.done
        if stop or event != "step" or time.monotonic() - saved >= every:
            save(trainer.state_dict())
            saved = time.monotonic()
        if stop:
            return False
    return True


def report_paths(out: str) -> tuple[Path, Path, Path]:
    """Where the reports of a comparison in `out` lie: HTML, Markdown, JSON."""
    path = Store(out).path
    return path / "report.html", path / "report.md", path / "report.json"
