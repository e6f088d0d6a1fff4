"""`--budget 15m`: how many seeds, epochs and training tokens fit into a time, from the speed of the first steps.

The plan is made once, before training, and kept in config.json: a run that is resumed follows it, however fast the
machine is by then. So it must leave room: `SHARE` of what remains after start and report is planned for.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .settings import CompareError
from .training import Diverged, Trainer

SHARE = 0.7  # the rest is for a machine that becomes busy
FIXED = 8.0  # seconds for imports, reading, measuring inference, reports
GOOD_SEEDS, MOST_SEEDS = 3, 5
MEASURING = 0.05  # of the budget
EVALUATED = 3  # windows
PLANNED = ("batch", "epochs", "decay_after", "max_tokens")  # settings of a run that a plan decides
# The shortest text that is preferred to fewer epochs and seeds. The less text, the more the method seems to help in
# short trainings: +REAL of 100 units changed test perplexity on Python's help texts by -13.7% with 10,000 training
# tokens and 4 epochs, by -9.9% with 15,000, by -5.7% with 30,000, and by -4.7% with all 64,000 and the usual 7 epochs
# (one seed, batch 10).
LEAST_TOKENS = 30_000


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
            before, event = trainer.trained["seconds"], None
            with suppress(Diverged):  # a text of a few steps; the training itself will say so
                event = next(events, None)
            trainer.wait()
            if event == "step":
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
    spent: float = 0.0,
) -> dict[str, Any]:
    """The plan for `seconds` of training and evaluation: epochs, decay_after, seeds, max_tokens, estimated_seconds.

    tokens: of each split. config: `Settings.resolved`, whose epochs are the usual number. seeds, epochs, decay_after:
    what the user fixed. spent: seconds of the budget that are gone already, for the error. max_tokens is None where the
    plan leaves the text as it is. In this order: three to five seeds of the usual epochs; three seeds of at least half
    as many; three seeds of half as many on less text, down to `LEAST_TOKENS`; one seed of as many epochs as fit; one
    epoch on less text. Raises CompareError when even that does not fit.
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

    def most_text(n_epochs: int, n_seeds: int, low: int) -> int | None:
        """The longest training text from `low` tokens up that fits; None when `low` does not."""
        high = tokens["train"]
        if cost(n_epochs, n_seeds, low) > seconds:
            return None
        while high - low > window:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(n_epochs, n_seeds, middle) <= seconds else (low, middle)
        return low

    fewest, half = (1, -(-usual // 2)) if epochs is None else (epochs, epochs)
    several, single = seeds or GOOD_SEEDS, seeds or 1
    choices = [(usual, n) for n in range(MOST_SEEDS, GOOD_SEEDS, -1)] if seeds is None else []
    choices += [(e, several) for e in range(usual, half - 1, -1)]
    for n_epochs, n_seeds in choices:
        if cost(n_epochs, n_seeds) <= seconds:
            return plan(n_epochs, n_seeds)
    if tokens["train"] > LEAST_TOKENS and (n_train := most_text(half, several, LEAST_TOKENS)):
        return plan(half, several, n_train)
    for n_epochs in range(usual, fewest - 1, -1):
        if cost(n_epochs, single) <= seconds:
            return plan(n_epochs, single)
    low = min(max(window, 20 * config["batch"]), tokens["train"])  # check_length asks for so much
    n_train = most_text(fewest, single, low)
    if n_train is None:
        needed = math.ceil(spent + FIXED + cost(fewest, single, low) / SHARE)
        raise CompareError(
            f"the budget is too short: about {needed} s are needed for {_count(fewest, 'epoch')} of {low} tokens; "
            "give more time, or a smaller --hidden or --vocab-size"
        )
    return plan(fewest, single, n_train)


def planned(config: dict[str, Any], plan: dict[str, Any] | None) -> dict[str, Any]:
    """`config` with what the plan decided."""
    return config | {name: plan[name] for name in PLANNED if plan and plan.get(name) is not None}


def describe(plan: dict[str, Any], config: dict[str, Any], n_train: int, n_seeds: int) -> str:
    """The plan in words. config: with the plan in it. n_train: training tokens; n_seeds: with those added to it."""
    text = "all of the text" if config["max_tokens"] is None else f"{n_train:,} training tokens"
    added = f"; {_count(n_seeds, 'seed')} in all by --seeds" if n_seeds > plan["seeds"] else ""
    where = f" in {plan['of']}" if plan.get("of") else ""  # of whose variants the estimate is
    estimate = f", about {plan['estimated_seconds']:,.0f} s of training and evaluation" if not where else ""
    return (
        f"planned for a budget of {config['budget']}{where}: {_count(plan['seeds'], 'seed')}, "
        f"{_count(plan['epochs'], 'epoch')}, {text}{estimate}{added}"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
