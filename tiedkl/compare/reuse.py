"""Runs taken over from another comparison (`--reuse DIR`), where the same training was done already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..environment import stamp
from .budget import PLANNED, planned
from .settings import OWN, CompareError, Settings, Variant, of_variant
from .store import LATER, PLAN, REPORTS, Store, checkpoint_name, differences
from .training import ADDED

SHOWN = 4  # reasons in a message
ALIKE = ("tiedkl", "torch", "triton", "cpu", "device")  # of `environment.stamp`: what can change a figure, or its speed
PARTS = {"model", "optimizer", "generator", "epoch", "curves", "best"}  # of a checkpoint of any version
Wanted = list[tuple[int, Variant]]  # runs: seed and variant of each


def trained(state: dict[str, Any] | None, epochs: int) -> bool:
    """Whether a checkpoint is of a training with nothing left to do but, in one of an earlier version, the test."""
    if state is None:
        return False
    state = ADDED | state
    return state["test_losses"] is not None or state["diverged"] or state["epoch"] >= epochs


def untrained(store: Store, runs: Wanted, config: dict[str, Any]) -> Wanted:
    """Those of the runs of a comparison that have not been trained to their end. config: with what was planned."""

    def state(seed: int, variant: Variant) -> dict[str, Any] | None:
        return store.load(checkpoint_name(variant.name, seed, config["seed"]), torch.device("cpu"))

    return [run for run in runs if not trained(state(*run), config["epochs"])]


class Source:
    """The comparison in the directory `path`, which is only read, for one in `out`.

    Raises CompareError where there is none, or it is damaged.
    """

    def __init__(self, path: str, out: Store) -> None:
        self.name, self.out = f"--reuse {path}", out
        try:
            self.path = Path(path).expanduser().resolve()
            self.store = Store(str(self.path))
            if self.path == out.path.resolve():
                raise CompareError(f"{self.name} is the directory of this comparison: it needs an --out of its own")
            self.config = self._read()
            self.planned = planned(self.config, self.config.get(PLAN))
        except (OSError, RuntimeError) as error:  # no permission; links in a circle
            raise CompareError(f"{self.name}: cannot be read ({error})") from None

    def _read(self) -> dict[str, Any]:
        try:
            config = self.store.config()
        except CompareError:
            config = {}
        if config is None:
            raise CompareError(f"{self.name}: no comparison is there")
        if not isinstance(config.get("overrides") or {}, dict) or not isinstance(config.get("seed"), int):
            raise CompareError(f"{self.name}: what is there is not a comparison, or damaged")
        return LATER | config

    def plan(self, settings: Settings) -> dict[str, Any] | None:
        """What was planned there for a budget, for a comparison that has no plan yet; None where nothing was.

        The user's number of seeds goes first. Raises CompareError where the request does not agree with the plan.
        """
        plan: dict[str, Any] | None = self.config.get(PLAN)
        budget = self.config.get("budget")
        if settings.budget is not None and settings.budget != budget:
            raise CompareError(f"{self.name}: it has budget={budget}, now {settings.budget}")
        if plan is None:
            return None
        for name in PLANNED:
            value = getattr(settings, name)
            if value is not None and value != plan.get(name):
                raise CompareError(f"{self.name}: {name}={plan.get(name)} was planned there, now {value}")
        return plan | {"seeds": settings.seeds or plan["seeds"], "estimated_seconds": None, "of": str(self.path)}

    def check(self, config: dict[str, Any], device: torch.device) -> None:
        """Raise CompareError unless all but the settings in `OWN` agree, versions and the machine too.

        config: of a comparison (`Store.begin`), with what was planned.
        """
        free = {name: config[name] for name in (*OWN, "overrides", "budget")}  # plans are compared, not their budgets
        if what := differences(self.planned | free, config):
            raise CompareError(f"{self.name}: its runs have other settings ({what})")
        try:
            there = json.loads((self.path / REPORTS[0]).read_text("utf-8"))["environment"]
            before = {name: there[name] for name in ALIKE}
        except (OSError, ValueError, KeyError, TypeError):
            return  # no report was written: nothing is known
        if what := differences(LATER | before, LATER | {name: stamp(device)[name] for name in ALIKE}):
            raise CompareError(f"{self.name}: its runs were trained elsewhere ({what})")

    def matching(self, wanted: Wanted, config: dict[str, Any]) -> tuple[Wanted, list[str]]:
        """Those of the wanted runs that have ended there with the same settings, and why others are left out."""
        found, why = [], []
        for seed, variant in wanted:
            mine, other = of_variant(self.config, variant.name), of_variant(config, variant.name)
            used = {name: mine.get(name) for name in OWN if name not in variant.unused}
            if what := differences(other | used, other):
                why.append(f"{variant.label}: {what}")
            elif not self.store.has(self._checkpoint(seed, variant)):
                why.append(f"{variant.label} seed {seed}: not there")
            elif not trained(self._load(seed, variant), config["epochs"]):
                why.append(f"{variant.label} seed {seed}: not trained to its end")
            else:
                found.append((seed, variant))
        return found, list(dict.fromkeys(why))

    def require(self, found: Wanted, why: list[str]) -> None:
        """Raise CompareError, with the reasons, where `matching` has found nothing."""
        if not found:
            shown = [*why[:SHOWN], *(["..."] if len(why) > SHOWN else [])]
            raise CompareError(f"{self.name}: it has none of these runs ({'; '.join(shown)})")

    def hand_over(self, runs: Wanted) -> None:
        """Copy these runs to `out`. A copy says where it was trained: in the first of several comparisons."""
        here = str(self.out.path.resolve())
        for seed, variant in runs:
            state = self._load(seed, variant)
            # a comparison that begins anew there removes all runs before it writes its settings
            if self._read() != self.config or not trained(state, self.planned["epochs"]):
                raise CompareError(f"{self.name}: it was begun anew while its runs were taken over")
            place = state.get("taken_from") or str(self.path)
            state["taken_from"] = None if place == here else place
            self.out.save(self._checkpoint(seed, variant), state)

    def _checkpoint(self, seed: int, variant: Variant) -> str:
        return checkpoint_name(variant.name, seed, self.config["seed"])

    def _load(self, seed: int, variant: Variant) -> dict[str, Any]:
        name = self._checkpoint(seed, variant)
        try:
            state = self.store.load(name, torch.device("cpu"))
        except CompareError:
            state = {}
        if not isinstance(state, dict) or not state.keys() >= PARTS:
            raise CompareError(f"{self.name}: its {name}.pt is damaged, or was removed")
        return state
