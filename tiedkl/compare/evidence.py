"""The variants' runs put together: means over seeds, and each variant against the baseline.

Pairs are compared, never averages: the same seed gives two variants the same initial parameters, order of the text
and dropout masks, and the same test token asks both the same question, so most of the chance cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .statistics import (
    CONFIDENCE,
    Interval,
    holm,
    length_of_blocks,
    over_both,
    over_seeds,
    over_text,
    percent,
    perplexity,
)

SAYS = {
    "seeds": "would another random seed say the same about this test text? (Student's t over the seeds)",
    "text": "would another text of the same kind say the same about these trained models? "
    "(paired test, token by token, in blocks of consecutive tokens)",
    "both": "would another seed and another text of the same kind say the same? (both sources of chance together)",
}


@dataclass(frozen=True)
class Run:
    """One variant trained with one seed: `Trainer.result`, and the test losses (n_tokens,) once it is done."""

    seed: int
    result: dict[str, Any]
    losses: Tensor | None

    @property
    def done(self) -> bool:
        return self.losses is not None


def finished(runs: list[Run]) -> dict[int, Run]:
    return {run.seed: run for run in runs if run.done}


def mean_ce(run: Run) -> float:
    """Mean test cross-entropy in nats."""
    if run.losses is None:
        raise ValueError(f"seed {run.seed}: not evaluated yet")
    return float(run.losses.double().mean())


def perplexity_interval(runs: list[Run]) -> tuple[float, float] | None:
    """Student's interval of the test perplexity over seeds, None with fewer than two."""
    interval = over_seeds([mean_ce(run) for run in finished(runs).values()])
    return interval and (perplexity(interval.low), perplexity(interval.high))


def against(baseline: list[Run], variant: list[Run], *, means: bool = False) -> dict[str, Any] | None:
    """What is known of the change of the test loss, over the seeds that both have finished; None without one.

    means: the losses are not those of tokens but means over blocks of them (`block_means`).
    """
    old, new = finished(baseline), finished(variant)
    seeds = [seed for seed in new if seed in old]
    if not seeds:
        return None
    pairs = [(new[s].losses, old[s].losses) for s in seeds]
    per_token = torch.stack([a.double() - b.double() for a, b in pairs if a is not None and b is not None])
    differences = per_token.mean(0)
    block = length_of_blocks(differences, means=means)
    text = over_text(differences, length=block)
    seed_interval = over_seeds(per_token.mean(1).tolist())
    ppl = [perplexity(sum(mean_ce(part[s]) for s in seeds) / len(seeds)) for part in (new, old)]
    return {
        "seeds": seeds,
        "test_ppl": ppl,
        "nats": text.mean,
        "percent": percent(text.mean),
        "confidence": CONFIDENCE,
        "tokens": per_token.shape[1],
        "block": block,
        "over_text": _entry(text),
        "over_seeds": None if seed_interval is None else _entry(seed_interval),
        "over_both": None if seed_interval is None else _entry(over_both(seed_interval, text)),
    }


def widest(evidence: dict[str, Any]) -> dict[str, Any]:
    """The interval of `against` that covers most: seeds and text where there are seeds, else the text alone."""
    found: dict[str, Any] = evidence["over_both"] or evidence["over_text"]
    return found


def _entry(interval: Interval) -> dict[str, Any]:
    return {
        "nats": [interval.low, interval.high],
        "percent": [percent(interval.low), percent(interval.high)],
        "standard_error": interval.error,
        "p": interval.p,
        "p_holm": interval.p,
    }


def adjust(changes: dict[str, dict[str, Any] | None]) -> None:
    """Replace each `p_holm` by Holm's, over the variants that were compared with the baseline, or with their controls.

    Those of one kind of interval are a family, and last the `widest` of every variant, whatever their numbers of seeds.
    """
    found = {name: change for name, change in changes.items() if change is not None}
    kinds = ("over_text", "over_seeds", "over_both")
    families = [{name: c[kind] for name, c in found.items() if c[kind] is not None} for kind in kinds]
    for entries in (*families, {name: widest(c) for name, c in found.items()}):
        for name, p in holm({name: entry["p"] for name, entry in entries.items()}).items():
            entries[name]["p_holm"] = p


def mean_curves(runs: list[Run]) -> list[dict[str, Any]]:
    """The epochs averaged over the seeds that have them; `valid_low` and `valid_high` are the extremes."""
    longest: list[dict[str, Any]] = max((run.result["curves"] for run in runs), key=len, default=[])
    rows = []
    for k, first in enumerate(longest):
        same = [run.result["curves"][k] for run in runs if len(run.result["curves"]) > k]
        row = dict(first)
        for key in ("train_ce", "train_kl", "valid_ce", "tokens_per_second"):
            if first[key] is not None:
                row[key] = math.fsum(r[key] for r in same) / len(same)
        ppl = [r["valid_ppl"] for r in same]
        row |= {"valid_low": min(ppl), "valid_high": max(ppl), "seeds": len(same)}
        if len(same) > 1:
            row["valid_ppl"] = perplexity(row["valid_ce"])
        rows.append(row)
    return rows


def kl_share(curves: list[dict[str, Any]], settings: dict[str, Any]) -> float | None:
    """alpha * KL on the training text in the last epoch of `curves`, in per cent of its cross-entropy.

    How strong the augmented loss is beside it; None without that loss, an epoch, or a cross-entropy above 0. settings:
    with the gamma and temperature of the training.
    """
    if not curves or curves[-1]["train_kl"] is None or not curves[-1]["train_ce"] > 0:
        return None
    alpha = settings["gamma"] * settings["temperature"]
    return float(100.0 * alpha * curves[-1]["train_kl"] / curves[-1]["train_ce"])
