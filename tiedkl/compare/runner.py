"""The comparison from start to end: corpus, variants one after the other, checkpoints, reports."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..environment import stamp
from . import corpus as corpora
from .memory import loss_memory
from .page import render
from .progress import Progress
from .report import build, to_json
from .settings import CompareError, Settings, ordered
from .store import Store
from .training import Data, Trainer

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
    """Train and evaluate the chosen variants; write `report.json` and `report.html`; return the report.

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
    text = corpora.load(
        settings.data, vocab_size=settings.vocab_size, min_count=settings.min_count, max_tokens=settings.max_tokens
    )
    facts = text.facts()
    config = settings.resolved(facts["tokens"]["train"]) | {"threads": torch.get_num_threads()}
    check_length(facts["tokens"], config["batch"], config["bptt"])
    data = Data.of(text, config["batch"], device)
    variants = ordered(settings.variants)
    try:
        trainers = [Trainer(v, config, data, device) for v in variants]
        n_tokens = config["batch"] * config["bptt"]
        memory = {t.variant.name: loss_memory(t.model, t.loss, n_tokens) for t in trainers}
    except (RuntimeError, ValueError) as error:  # a backend of the loss that cannot run here says why
        raise CompareError(str(error).splitlines()[0]) from None
    store = Store(settings.out)
    resumed = store.open(config | {"corpus": facts["sha256"]}, fresh=settings.fresh)
    for trainer in trainers:
        state = store.load(trainer.variant.name, device)
        if state is not None:
            trainer.load_state_dict(state)

    def report() -> dict[str, Any]:
        results = {
            t.variant.name: t.result() | {"loss_memory": memory[t.variant.name]} for t in trainers if t.steps_done
        }
        built = build(config, facts, stamp(device), {v.name: results.get(v.name) for v in variants})
        store.write("report.json", to_json(built))
        store.write("report.html", render(built))
        return built

    n_steps = trainers[0].steps_per_epoch * config["epochs"]
    progress = Progress(n_steps * len(trainers), sum(t.steps_done for t in trainers), quiet=settings.quiet)
    try:
        if resumed and any(t.steps_done for t in trainers):
            progress.say(f"continuing the comparison in {store.path}")
        for trainer in trainers:
            if not _train(trainer, store, progress, settings.checkpoint_every, should_stop):
                raise Interrupted(report())
    finally:
        progress.close()
    return report()


def check_length(tokens: dict[str, int], batch: int, bptt: int) -> None:
    """Raise CompareError unless the text fills the batch: a window of training, two steps of validation and test."""
    for split, low in (("train", batch * bptt), ("valid", 2 * batch), ("test", 2 * batch)):
        if tokens[split] < low:
            raise CompareError(
                f"the text is too short: its {split} split has {tokens[split]} tokens, at least {low} are needed; "
                "give more text, or a smaller --batch or --bptt"
            )


def _train(trainer: Trainer, store: Store, progress: Progress, every: float, should_stop: Callable[[], bool]) -> bool:
    """Train one variant, saving every `every` seconds, after each epoch and when told to stop; False if stopped."""
    variant, epochs = trainer.variant, trainer.settings["epochs"]
    saved = time.monotonic()
    for event in trainer.run():
        if event == "step":
            progress.step(variant, trainer.epoch + 1, epochs)
        elif event == "epoch":
            progress.epoch(variant, trainer.curves[-1], epochs)
        stop = should_stop() and not trainer.done
        if stop or event != "step" or time.monotonic() - saved >= every:
            store.save(variant.name, trainer.state_dict())
            saved = time.monotonic()
        if stop:
            return False
    return True


def report_paths(out: str) -> tuple[Path, Path]:
    """Where the reports of a comparison in `out` lie: HTML, JSON."""
    path = Store(out).path
    return path / "report.html", path / "report.json"
