"""A toy search that takes a second, and one without training."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiedkl.tune import TuneSettings, study, worker

# learning rate 0.002 is far too small, so the search has something to find
TOY = {"hidden": 8, "layers": 1, "batch": 4, "bptt": 20, "epochs": 2, "impl": "reference", "threads": 1, "check": 0,
       "lr": 0.002, "search": "lr=0.001:4,dropout", "trials": 4, "max_tokens": 800}  # fmt: skip


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    """Builds TuneSettings for a tiny search in tmp_path/out."""
    rng, words = random.Random(0), [f"{a}{b}" for a in "bdgklm" for b in "aeio"]
    lines = [" ".join(words[int(24 * rng.random() ** 4)] for _ in range(7)) for _ in range(250)]  # a few are frequent
    (tmp_path / "text.txt").write_text("\n".join(lines))

    def make(**changes: Any) -> TuneSettings:
        return TuneSettings(**{"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out"), **TOY, **changes})

    return make


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, float], int]]:
    """Nothing is trained: a higher learning rate is better by a formula. The list holds parameters and seed of each.

    The study is in memory; its database takes longer to open than such a search.
    """
    package = pytest.importorskip("optuna")
    stored: dict[str, Any] = {}
    memory = SimpleNamespace(RDBStorage=lambda u, **_: stored.setdefault(u, package.storages.InMemoryStorage()))
    monkeypatch.setattr(study, "optuna", lambda: SimpleNamespace(**{**vars(package), "storages": memory}))
    done: list[tuple[dict[str, float], int]] = []

    def train(
        self: worker.Task, params: dict[str, float], seed: int, epoch_done: Any, should_stop: Any, *, test: bool
    ) -> Any:
        done.append((params, seed))
        ce = 3.0 - math.log(params.get("lr", 1.0)) / 10 + params.get("dropout", 0.0) / 100
        for epoch in range(1, self.config["epochs"] + 1):
            if should_stop():
                raise worker.Stopped
            epoch_done(epoch, ce + 0.1 / epoch)
        noise = torch.randn(400, generator=torch.Generator().manual_seed(seed))
        return SimpleNamespace(best={"valid_ppl": math.exp(ce)}, test_losses=ce + noise)

    monkeypatch.setattr(worker.Task, "train", train)
    return done
