"""Runs taken over from another comparison (`--reuse DIR`), where the same training was done already."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

from .settings import OWN, CompareError, Variant, of_variant
from .store import LATER, PLAN, Store, checkpoint_name, differences
from .training import ended

PLANNED = ("batch", "epochs", "decay_after", "max_tokens")  # settings of a run that a plan decides
SHOWN = 4  # differences in a message


def planned(config: dict[str, Any], plan: dict[str, Any] | None) -> dict[str, Any]:
    """`config` with what a plan (`budget.fit`) decided."""
    return config | {name: plan[name] for name in PLANNED if plan and plan.get(name) is not None}


class Source:
    """The comparison in `path`, for one with the settings `identity`, as `Store.begin` writes them.

    All but the settings in `OWN` have to agree; of those each variant needs the ones it uses. Raises CompareError where
    there is no comparison, or one whose runs cannot be used.
    """

    def __init__(self, path: str, out: Store, identity: dict[str, Any]) -> None:
        self.store = Store(path)
        if self.store.path.resolve() == out.path.resolve():
            raise CompareError(f"--reuse {path} is the directory of this comparison: it needs an --out of its own")
        config = self.store.config()
        if config is None:
            raise CompareError(f"--reuse {path}: no comparison is there")
        self.config = LATER | config
        self.plan: dict[str, Any] | None = config.get(PLAN)
        if self.plan and identity["budget"] is None:
            identity = identity | {"budget": config["budget"]}
        self._check(self.config | {name: identity[name] for name in (*OWN, "overrides")}, identity)

    def check_plan(self, plan: dict[str, Any] | None) -> None:
        """Raise CompareError unless this comparison has that plan."""
        self._check(planned(self.config, self.plan), planned(self.config, plan))

    def _check(self, mine: dict[str, Any], other: dict[str, Any]) -> None:
        if what := differences(mine, other):
            raise CompareError(f"--reuse {self.store.path}: its runs cannot be used, with other settings ({what})")

    def matching(self, wanted: Collection[tuple[int, Variant]], config: dict[str, Any]) -> list[tuple[int, Variant]]:
        """Those of the wanted runs, seed and variant, that have ended here. Raises CompareError where none has."""
        why: dict[str, None] = {}  # in order, once each
        found = []
        for seed, variant in wanted:
            mine, other = of_variant(self.config, variant.name), of_variant(config, variant.name)
            used = {name: mine[name] for name in OWN if name not in variant.unused}
            if what := differences(other | used, other):
                why[f"{variant.name}: {what}"] = None
            elif not ended(self.store.load(self._name(seed, variant), torch.device("cpu"))):
                why[f"{self._name(seed, variant)}: not trained to its end"] = None
            else:
                found.append((seed, variant))
        if not found:
            shown = [*list(why)[:SHOWN], *(["..."] if len(why) > SHOWN else [])]
            raise CompareError(f"--reuse {self.store.path}: it has none of these runs ({'; '.join(shown)})")
        return found

    def hand_over(self, runs: Iterable[tuple[int, Variant]], out: Store) -> list[str]:
        """Copy these runs to `out`, where they have not ended yet; the names of their checkpoints.

        A copy says where it was trained: the first comparison, where this one has it from another.
        """
        done = []
        for seed, variant in runs:
            name, cpu = self._name(seed, variant), torch.device("cpu")
            state = self.store.load(name, cpu)
            if state is not None and not ended(out.load(name, cpu)):
                out.save(name, state | {"taken_from": state.get("taken_from") or str(self.store.path)})
                done.append(name)
        return done

    def _name(self, seed: int, variant: Variant) -> str:
        return checkpoint_name(variant.name, seed, self.config["seed"])
