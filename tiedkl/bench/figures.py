"""From times to the figures of a row: medians, matrix products, shares of the floor, ratios to the best peer.

Floors are counted in products of an N x V x D matrix multiplication that is timed in the same rounds. No implementation
can do without a logits product, two gradient products, and, for KL, a similarity product for each distinct target:
3 + rho together, 1 + rho of them in the forward call. `share` is that of the tokens that are not ignored.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any


def timings(times: Sequence[float], first_call: float) -> dict[str, Any]:
    """Median and spread of what was timed, and what the first call took longer."""
    s = statistics.median(times)
    return {
        "seconds": s,
        "samples": len(times),
        "spread": (max(times) - min(times)) / s,
        "cold_start_seconds": max(0.0, first_call - s),
    }


def floor_units(mode: str, share: float, rho: float, kl: bool) -> float:
    """Products without which there is no result."""
    similarity = rho if kl else 0.0
    return share * {"fwd": 1 + similarity, "bwd": 2.0, "fwd+bwd": 3 + similarity}[mode]


def units(row: dict[str, Any], unit: float, mode: str, share: float, rho: float) -> dict[str, Any]:
    """The row's time in products of `unit` seconds, and the floor's and the plan's products as shares of that."""
    s = row["seconds"]
    found = {"gemm_units": s / unit, "floor_fraction": floor_units(mode, share, rho, row["kl"]) * unit / s}
    products = re.search(r"(\d+)(?: \+ (?:(\d+) )?(rho))? GEMMs", row.get("plan", ""))
    if products and mode != "bwd":
        own = int(products[1]) + (int(products[2] or 1) * rho if products[3] else 0.0)
        found["own_floor_fraction"] = share * own * unit / s
    return found


def compare_with_peers(result: dict[str, Any]) -> None:
    """Name the fastest accurate peer of each kind, and give every row's time as a ratio to it."""
    timed = {name: row for name, row in result["rows"].items() if "seconds" in row}
    for key, kl in (("ce", False), ("cekl", True)):
        peers = [n for n, row in timed.items() if row["kl"] == kl and row["status"] == "ok"]
        peers = [n for n in peers if not n.startswith("tiedkl")]
        if not peers:
            continue
        best = min(peers, key=lambda n: float(timed[n]["seconds"]))
        result["best_peer"][key] = best
        for row in timed.values():
            row[f"vs_best_{key}"] = row["seconds"] / timed[best]["seconds"]
