"""The runs of a comparison: where their checkpoints are, how far they have come, and the report on them."""

from __future__ import annotations

from typing import Any

import torch

from ..environment import stamp
from .evidence import Run
from .inference import measure
from .markdown import markdown
from .memory import loss_memory, training_memory
from .page import render
from .report import build, to_json
from .settings import VARIANTS, Settings, Variant, ordered
from .store import Store, checkpoint_name
from .training import Data, Trainer


class Runs:
    """One run for each seed and variant of `wanted`, and whatever else has ended in the directory of `store`.

    config: the settings of every run but for its seed; config["seed"] is the first.
    """

    def __init__(
        self, store: Store, config: dict[str, Any], data: Data, device: torch.device, wanted: list[tuple[int, Variant]]
    ) -> None:
        self.store, self.config, self.data, self.device = store, config, data, device
        self.wanted = wanted
        self._grid = list(wanted)
        self._runs: dict[tuple[int, str], Run] = {}
        self.steps_done = 0  # of all runs, when they were read
        for seed, variant in wanted:
            self._read(seed, variant)
        for seed, name in store.checkpoints(config["seed"]):
            variant = VARIANTS[name]
            if (seed, variant) not in wanted and self.trainer(seed, variant).ended:
                self._grid.append((seed, variant))
                self._read(seed, variant)

    def _read(self, seed: int, variant: Variant) -> None:
        if self.store.has(self.name(seed, variant)):
            trainer = self.trainer(seed, variant)
            self.note(trainer)
            self.steps_done += trainer.steps_done

    def __len__(self) -> int:
        return len(self._grid)

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for seed, _ in self._grid})

    @property
    def begun(self) -> bool:
        return bool(self._runs)

    def ended(self, seed: int, variant: Variant) -> bool:
        run = self._runs.get((seed, variant.name))
        return run is not None and run.result["status"] in ("done", "diverged")

    def name(self, seed: int, variant: Variant) -> str:
        """Of the run's checkpoint."""
        return checkpoint_name(variant.name, seed, self.config["seed"])

    def trainer(self, seed: int, variant: Variant) -> Trainer:
        """A trainer where the run's checkpoint was taken, or at its start."""
        trainer = Trainer(variant, self.config | {"seed": seed}, self.data, self.device)
        state = self.store.load(self.name(seed, variant), self.device)
        if state is not None:
            trainer.load_state_dict(state)
        return trainer

    def note(self, trainer: Trainer) -> None:
        """Remember how far a run is."""
        seed, name = trainer.settings["seed"], trainer.variant.name
        if trainer.steps_done:
            self._runs[seed, name] = Run(seed, trainer.result(), trainer.test_losses)

    def report(self, settings: Settings, facts: dict[str, Any], plan: dict[str, Any] | None) -> dict[str, Any]:
        """Write `report.json`, `report.html` and `report.md` on what has been noted; return the report.

        facts: `Corpus.facts`. plan: what was planned for a budget, for the report.
        """
        variants = ordered({v.name for _, v in self._grid})
        grid = {v.name: [seed for seed in self.seeds if (seed, v) in self._grid] for v in variants}
        runs = {n: [self._runs[s, n] for s in part if (s, n) in self._runs] for n, part in grid.items()}
        trained = {v.name: self.trainer(s, v) for v in variants for s in grid[v.name][:1]}
        use = measure(trained) if all(self.ended(*run) for run in self._grid) else {}
        built = build(
            self.config | {"seeds": self.seeds},
            facts,
            stamp(self.device),
            runs,
            wanted={name: len(part) for name, part in grid.items()},
            memory={name: memory_of(trainer) for name, trainer in trained.items()},
            inference=use,
            plan=plan,
            price_per_hour=settings.price_per_hour,
            request=settings,
        )
        self.store.write("report.json", to_json(built))
        self.store.write("report.html", render(built))
        self.store.write("report.md", markdown(built))
        return built


def memory_of(trainer: Trainer) -> dict[str, Any]:
    """The report's `loss_memory` and `training_memory` of a variant."""
    layer = loss_memory(trainer.model, trainer.loss, trainer.settings["batch"] * trainer.settings["bptt"])
    memory = training_memory(trainer.model, trainer.optimizer, layer)
    return {"loss_memory": layer, "training_memory": memory}
