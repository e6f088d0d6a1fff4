"""Runs and reports made of numbers, without training."""

from __future__ import annotations

import math
from typing import Any

import torch

from tiedkl.compare import Settings, report
from tiedkl.compare.evidence import Run

N_TOKENS = 600
MEMORY = {
    "loss_memory": {"total_bytes": 3 << 20, "eager_bytes": 9 << 20, "scratch_bytes": 2 << 20},
    "training_memory": {"total_bytes": 5 << 20, "eager_bytes": 11 << 20, "parameter_bytes": 1 << 20},
}


def run(
    valid: float,
    test: float | None,
    *,
    seed: int = 1,
    parameters: int = 1000,
    status: str = "done",
    noise: float = 0.02,
) -> Run:
    """A run whose losses have the mean log(test) and share most of their noise with every other run."""
    row = {"epoch": 1, "lr": 1.0, "train_ce": 5.0, "train_kl": 0.1, "valid_ce": math.log(valid), "valid_ppl": valid}
    losses = None
    if test is not None:
        shared, own = (
            torch.randn(N_TOKENS, generator=torch.Generator().manual_seed(k)) for k in (0, seed + parameters)
        )
        losses = math.log(test) + (shared - shared.mean()) + noise * (own - own.mean())
    found = {
        "status": status, "epochs_done": 1.5, "epochs_planned": 3, "parameters": parameters, "best_epoch": 1,
        "valid_ppl": valid, "test_ppl": test, "tokens_per_second": 1234.5, "seconds": 6.0,
        "taken_from": None,
        "curves": [row | {"tokens_per_second": 1234.5}],
    }  # fmt: skip
    return Run(seed, found, losses)


def built(
    n_seeds: int = 1,
    request: Settings | None = None,
    corpus: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    tied_bias: bool = True,
    **runs: Run | list[Run] | None,
) -> dict[str, Any]:
    """The report of runs, one a variant or a list.

    `n_seeds` were planned; `corpus` replaces some of its facts; `overrides` are the variants' own settings.
    """
    facts = {
        "name": "<b>toy</b>",
        "split": "blocks",
        "vocabulary": 50,
        "tokens": {"train": 1000, "valid": 9, "test": 9},
        "oov_rate": {"train": 0.01, "valid": 0.02, "test": 0.03},
        "unknown_words": [["<i>odd</i>", 3]],
        "vocabulary_facts": {},
    } | (corpus or {})
    config = {"model": "lstm", "layers": 2, "hidden": 8, "epochs": 3, "temperature": 20.0, "gamma": 0.5,
              "target_grad": False, "label_smoothing": 0.1, "tied_bias": tied_bias,
              "seeds": list(range(1, n_seeds + 1)), "overrides": overrides}  # fmt: skip
    lists = {name: r if isinstance(r, list) else [] if r is None else [r] for name, r in runs.items()}
    return report.build(config, facts, {"torch": "2"}, lists, memory=dict.fromkeys(runs, MEMORY), request=request)


def three(test: float, *, spread: float = 0.001, parameters: int = 1000) -> list[Run]:
    """Seeds 1 to 3 of a variant whose test perplexity is `test`, the middle one exactly."""
    return [run(test, test * math.exp(spread * (s - 2)), seed=s, parameters=parameters) for s in (1, 2, 3)]
