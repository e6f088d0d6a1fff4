"""A new result beside an older one: what has become slower, measured in matrix products of the same run.

Machines and their neighbours change between two runs. The time of a row divided by that of the matrix product in the
same rounds changes much less, so that is what is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARGIN = 0.15
KEYS = ("N", "V", "D", "dtype")
LATER = {"loss": "cekl", "mode": "fwd+bwd", "ignored": 0.0, "temperature": 20.0, "workspace_bytes": None}


@dataclass(frozen=True)
class Change:
    """One row in both results."""

    name: str
    size: str
    before: float  # in matrix products
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return (*(result[k] for k in KEYS), *(result.get(k, default) for k, default in LATER.items()))


def changes(old: dict[str, Any], new: dict[str, Any], only: str = "") -> list[Change]:
    """Rows timed in both results of the same workload, those whose name starts with `only`."""
    before = {_key(result): result["rows"] for result in old["results"]}
    found = []
    for result in new["results"]:
        size = f"N={result['N']} V={result['V']} D={result['D']} {result['dtype']}"
        for name, row in result["rows"].items():
            units = before.get(_key(result), {}).get(name, {}).get("gemm_units")
            if name.startswith(only) and units and row.get("gemm_units"):
                found.append(Change(name, size, units, row["gemm_units"]))
    return found


def compare(old: dict[str, Any], new: dict[str, Any], margin: float = MARGIN) -> tuple[str, bool]:
    """A table of tiedkl's rows, and whether one is slower by more than `margin` or none could be compared."""
    found = changes(old, new, "tiedkl")
    if not found:
        return "Nothing to compare: the older result has no row of the same workload, options and name.", True
    slower = [c for c in found if c.ratio > 1 + margin]
    width = max(len(c.name) for c in found)
    sizes = max(len(c.size) for c in found)
    lines = [
        "Time in matrix products N x V x D of the same run, before and now:",
        *(
            f"  {c.size:{sizes}}  {c.name:{width}}  {c.before:8.2f} {c.after:8.2f}  {c.ratio - 1:+7.1%}"
            + ("  SLOWER" if c in slower else "")
            for c in found
        ),
        f"{len(slower)} of {len(found)} rows are slower by more than {margin:.0%}.",
    ]
    return "\n".join(lines), bool(slower)
