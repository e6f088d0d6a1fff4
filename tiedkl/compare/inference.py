"""What a trained variant costs to use: memory, time a generated token, tokens a second when scoring text.

All variants are measured in turn, round after round, so that a machine that is busy for a moment slows all of them;
the figures are medians over the rounds, with the quartiles beside them: where those of two variants overlap, this does
not tell which is faster.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from .lstm import State
from .training import Trainer

ROUNDS, FEWEST = 15, 3
SECONDS = 3.0  # about what the rounds may take together
TOKENS = 8  # generated a round


def measure(trainers: dict[str, Trainer]) -> dict[str, Any]:
    """Variant name -> `parameter_bytes`, `ms_per_token` (batch 1), `tokens_per_second` (scoring, whole batch).

    The last two with `_quartiles` after the name: [25%, 75%] of the rounds.
    """
    generated: dict[str, list[float]] = {name: [] for name in trainers}
    scored: dict[str, list[float]] = {name: [] for name in trainers}
    began = time.perf_counter()
    _round(trainers)  # warms up
    rounds = int(SECONDS / (time.perf_counter() - began))
    for _ in range(min(ROUNDS, max(FEWEST, rounds))):
        for name, (one, many) in _round(trainers).items():
            generated[name].append(one)
            scored[name].append(many)
    return {
        name: {
            "parameter_bytes": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
            **_summary("ms_per_token", [1e3 * seconds for seconds in generated[name]]),
            **_summary("tokens_per_second", [1.0 / seconds for seconds in scored[name]]),
        }
        for name, trainer in trainers.items()
    }


def _summary(name: str, values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_quartiles": [low, high]}


def _round(trainers: dict[str, Trainer]) -> dict[str, tuple[float, float]]:
    return {name: (generate(trainer), score(trainer)) for name, trainer in trainers.items()}


@torch.no_grad()
def generate(trainer: Trainer) -> float:
    """Seconds a token of greedy generation, batch 1.

    LSTM: the state is carried. Transformer: one whole window a token, since this small one caches no keys and values.
    """
    model = trainer.model.eval()
    inputs = trainer.data.test[0][:, :1]
    is_lstm, bptt = trainer.is_lstm, trainer.settings["bptt"]
    state: State = model.body.start(1)
    tokens = inputs[:1] if is_lstm else inputs[:bptt]
    _wait(tokens)
    began = time.perf_counter()
    for _ in range(TOKENS):
        hidden, state = model(tokens, state, trainer.generator)
        logits = torch.nn.functional.linear(hidden[-1], model.weight, model.bias)  # (1, V)
        best = logits.argmax(-1, keepdim=True)
        tokens = best if is_lstm else torch.cat([tokens[1:], best])
    _wait(tokens)
    return (time.perf_counter() - began) / TOKENS


@torch.no_grad()
def score(trainer: Trainer) -> float:
    """Seconds a token of evaluation, as for perplexity: one window of the whole batch, plain cross-entropy."""
    part = tuple(t[: trainer.settings["bptt"]] for t in trainer.data.test)
    n_tokens = int((part[1] >= 0).sum())
    began = time.perf_counter()
    trainer.evaluate((part[0], part[1]))  # ends with a number on the host
    return (time.perf_counter() - began) / max(1, n_tokens)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
