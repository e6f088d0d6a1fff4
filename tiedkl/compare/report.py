"""The result of a comparison: one dictionary, the table made from it, and the verdict in plain words.

The dictionary (`SCHEMA` 1) holds `status` (complete | partial), `config`, `corpus`, `environment`, `variants`
(name -> result, see `Trainer.result`, with `label`, `summary`, `change` and `loss_memory`) and `verdict`.
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from typing import Any

from ..environment import finite
from .settings import VARIANTS

SCHEMA = 1
MIB = 1 << 20
DRAW = 2.0  # per cent of perplexity within which one seed decides nothing
LIMITS = (
    "One training run a variant, with one random seed: differences of a few per cent can change with the seed.",
    "A small model and a short training; larger models and longer training can change the order of the variants.",
    "The settings are common to all four variants, not tuned for each.",
    "Words outside the vocabulary count as the one word <unk>, so perplexities of different texts or vocabularies "
    "cannot be compared.",
    "Speed is that of the whole training step on this machine, including the network around the loss.",
)


def build(
    config: dict[str, Any],
    corpus: dict[str, Any],
    environment: dict[str, Any],
    results: dict[str, dict[str, Any] | None],
) -> dict[str, Any]:
    """The report of `results`, variant name -> result or None for one that has not begun."""
    variants: dict[str, Any] = {}
    reference = results.get("baseline") or {}
    for name, result in results.items():
        variant = VARIANTS[name]
        entry = result or {"status": "not started"}
        variants[name] = {
            "label": variant.label,
            "summary": variant.summary,
            "tied": variant.tied,
            "augmented": variant.augmented,
            **entry,
            "change": {key: _change(entry, reference, key) for key in ("valid_ppl", "test_ppl", "parameters")},
        }
    complete = all(v["status"] == "done" for v in variants.values())
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "status": "complete" if complete else "partial",
        "verdict": verdict(variants),
        "limits": list(LIMITS),
        "config": config,
        "corpus": corpus,
        "environment": environment,
        "variants": variants,
    }


def _change(entry: dict[str, Any], reference: dict[str, Any], key: str) -> float | None:
    """Change against the baseline in per cent; None for itself, without both figures, or while either is unfinished."""
    new, old = entry.get(key), reference.get(key)
    if (
        entry is reference
        or new is None
        or old is None
        or (key != "parameters" and {entry["status"], reference["status"]} != {"done"})
    ):
        return None
    return 100.0 * (new / old - 1.0)


def verdict(variants: dict[str, Any]) -> list[str]:
    """Sentences for a reader who knows nothing of language models; the first is the answer."""
    done = {name: v for name, v in variants.items() if v["status"] == "done"}
    missing = [v["label"] for v in variants.values() if v["status"] != "done"]
    sentences = []
    if len(done) >= 2 and "baseline" in done:
        sentences += _against_baseline(done)
    elif len(done) >= 2:
        best = min(done.values(), key=lambda v: v["test_ppl"])
        sentences.append(
            f"{best['label']} predicts unseen text best (test perplexity {best['test_ppl']:.1f}); "
            "the baseline was not part of this test."
        )
    else:
        sentences.append("There is nothing to compare yet: fewer than two variants have been trained to the end.")
    if missing:
        sentences.append(f"The test is incomplete: {_list(missing)} not finished. The same command continues it.")
    return sentences


def _against_baseline(done: dict[str, Any]) -> list[str]:
    base = done["baseline"]
    others = {name: v for name, v in done.items() if name != "baseline"}
    best = min(others.values(), key=lambda v: v["test_ppl"])
    change = best["change"]["test_ppl"]
    figures = f"test perplexity {best['test_ppl']:.1f} instead of {base['test_ppl']:.1f}"
    if change <= -DRAW:
        first = f"Yes: {best['label']} predicts unseen text {-change:.1f}% better than the baseline ({figures})."
    elif change < DRAW:
        first = f"A draw: the best variant, {best['label']}, is within {DRAW:.0f}% of the baseline ({figures})."
    else:
        first = (
            f"No: nothing beats the baseline on this text; {best['label']} is nearest, {change:.1f}% worse ({figures})."
        )
    sentences = [first]
    if best["tied"]:
        sentences.append(
            f"It does so with {-best['change']['parameters']:.0f}% fewer parameters "
            f"({best['parameters']:,} instead of {base['parameters']:,})."
        )
    rest = [f"{v['label']} {_number(v['change']['test_ppl'], '+.1f', '%')}" for v in others.values() if v is not best]
    if rest:
        sentences.append(f"The others against the baseline: {', '.join(rest)} (less is better).")
    sentences.append("Perplexity: among how many equally likely words the model hesitates on average. Less is better.")
    return sentences


def _list(names: list[str]) -> str:
    return names[0] + " is" if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]} are"


MEASURES = ("valid ppl", "test ppl", "change", "parameters", "loss layer MiB", "eager MiB", "tokens/s", "seconds")
COLUMNS = ("variant", *MEASURES)


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells under `COLUMNS`, a row for each variant; change is in test perplexity against the baseline."""
    return [_row(v) for v in report["variants"].values()]


def _row(v: dict[str, Any]) -> tuple[str, ...]:
    label = v["label"]
    if v["status"] == "not started":
        return (f"{label} (not started)", *["-"] * (len(COLUMNS) - 1))
    if v["status"] == "partial":
        label += f" (stopped in epoch {math.floor(v['epochs_done']) + 1} of {v['epochs_planned']})"
    memory = v["loss_memory"]
    return (
        label,
        _number(v["valid_ppl"], ",.2f"),
        _number(v["test_ppl"], ",.2f"),
        _number(v["change"]["test_ppl"], "+.1f", "%"),
        f"{v['parameters']:,}",
        f"{memory['total_bytes'] / MIB:,.1f}",
        f"{memory['eager_bytes'] / MIB:,.1f}",
        _number(v["tokens_per_second"], ",.0f"),
        f"{v['seconds']:,.1f}",
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{form}}{unit}".replace("-0.0%", "0.0%").replace("+0.0%", "0.0%")


def table(report: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    lines = [COLUMNS, *rows(report)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(COLUMNS))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def to_json(report: dict[str, Any]) -> str:
    """Strict JSON: what is not a finite number becomes null."""

    return json.dumps(finite(report), indent=1, allow_nan=False) + "\n"
