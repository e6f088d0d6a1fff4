"""`--budget 15m`: how many seeds, epochs and training tokens fit into a time, from the speed of the first steps.

The plan is made once, before training, and kept in config.json: a run that is resumed follows it, however fast the
machine is by then. So it must leave room: `SHARE` of what remains after start and report is planned for.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from .settings import CompareError
from .training import Trainer

SHARE = 0.7  # the rest is for a machine that becomes busy
FIXED = 8.0  # seconds for imports, reading, measuring inference, reports
GOOD_SEEDS, MOST_SEEDS = 3, 5
MEASURING = 0.05  # of the budget
EVALUATED = 3  # windows


@dataclass(frozen=True)
class Speed:
    """Seconds of a training step, and of evaluating one token, each summed over the variants."""

    step: float
    token: float


def measure(trainers: list[Trainer], budget: float) -> Speed:
    """Train a few steps with each in turn; the trainers are used up."""
    runs = [(trainer, trainer.run()) for trainer in trainers]
    steps: list[list[float]] = [[] for _ in trainers]
    scored: list[list[float]] = [[] for _ in trainers]
    began, k = time.perf_counter(), 0
    while k < 4 or (k < 24 and time.perf_counter() - began < MEASURING * budget):
        for i, (trainer, events) in enumerate(runs):
            before = trainer.trained["seconds"]
            next(events, None)
            if trainer.trained["seconds"] > before:
                steps[i].append(trainer.trained["seconds"] - before)
            if k % 4 == 1:
                scored[i].append(_scoring(trainer))
        k += 1
    # the first step warms up
    return Speed(sum(statistics.median(s[1:] or s) for s in steps), sum(statistics.median(s) for s in scored))


def _scoring(trainer: Trainer) -> float:
    n_steps = EVALUATED * trainer.settings["bptt"]
    inputs, targets = (t[:n_steps] for t in trainer.data.valid)
    began = time.perf_counter()
    trainer.evaluate((inputs, targets))
    return (time.perf_counter() - began) / max(1, int((targets >= 0).sum()))


def fit(
    speed: Speed,
    tokens: dict[str, int],
    seconds: float,
    config: dict[str, Any],
    *,
    seeds: int | None = None,
    epochs: int | None = None,
    decay_after: int | None = None,
) -> dict[str, Any]:
    """The plan for `seconds` of training and evaluation: epochs, decay_after, seeds, max_tokens, estimated_seconds.

    tokens: of each split. config: `Settings.resolved`, whose epochs are the usual number. seeds, epochs, decay_after:
    what the user fixed. In this order: three to five seeds of the usual epochs; three seeds of at least half as many;
    one seed of as many epochs as fit; one epoch on less text. Raises CompareError when even that does not fit.
    """
    window = config["batch"] * config["bptt"]
    usual = config["epochs"]

    def cost(n_epochs: int, n_seeds: int, n_train: int = tokens["train"]) -> float:
        valid, test = (
            tokens[s] if n_train == tokens["train"] else min(tokens[s], n_train // 10) for s in ("valid", "test")
        )
        epoch = -(-n_train // window) * speed.step + valid * speed.token
        return n_seeds * (n_epochs * epoch + test * speed.token)

    def plan(n_epochs: int, n_seeds: int, n_train: int | None = None) -> dict[str, Any]:
        decay = max(1, round(config["decay_after"] * n_epochs / usual)) if decay_after is None else decay_after
        return {
            "epochs": n_epochs,
            "decay_after": decay,
            "seeds": n_seeds,
            "max_tokens": n_train,
            "estimated_seconds": round(cost(n_epochs, n_seeds, n_train or tokens["train"]), 1),
        }

    fewest = 1 if epochs is None else epochs
    half = -(-usual // 2) if epochs is None else epochs
    choices = [(usual, n) for n in range(MOST_SEEDS, GOOD_SEEDS - 1, -1)] if seeds is None else []
    choices += [(e, GOOD_SEEDS) for e in range(usual - 1, half - 1, -1)] if seeds is None else []
    choices += [(e, seeds or 1) for e in range(usual, fewest - 1, -1)]
    for n_epochs, n_seeds in choices:
        if cost(n_epochs, n_seeds) <= seconds:
            return plan(n_epochs, n_seeds)
    low, high = max(window, 20 * config["batch"]), tokens["train"]  # check_length asks for so much
    needed = cost(fewest, seeds or 1, min(low, high))
    if needed > seconds:
        raise CompareError(
            f"the budget is too short: about {FIXED + needed / SHARE:.0f} s are needed for one epoch of {low} tokens; "
            "give more time, or a smaller --hidden or --vocab-size"
        )
    while high - low > window:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(fewest, seeds or 1, middle) <= seconds else (low, middle)
    return plan(fewest, seeds or 1, low)


def describe(plan: dict[str, Any], budget: str) -> str:
    """The plan in words."""
    text = "all of the text" if plan["max_tokens"] is None else f"{plan['max_tokens']:,} training tokens"
    return (
        f"planned for a budget of {budget}: {_count(plan['seeds'], 'seed')}, {_count(plan['epochs'], 'epoch')}, "
        f"{text}, about {plan['estimated_seconds']:,.0f} s of training and evaluation"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
