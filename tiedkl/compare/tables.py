"""The tables of a report (see report.py), for the terminal, HTML and Markdown."""

from __future__ import annotations

import math
from typing import Any

from .evidence import widest
from .per_variant import settings_table

MIB = 1 << 20
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns, rows


def tables(report: dict[str, Any]) -> list[tuple[str, Table]]:
    """(title, (columns, rows)) of the tables of every report."""
    found = [("Quality", quality(report)), ("Memory", size(report)), ("Speed and cost", speed(report))]
    if compared(report):
        found.insert(1, ("How sure the change is", certainty(report)))
    if own := settings_table(report):
        found.append(("Settings that differ", own))
    return found


def quality(report: dict[str, Any]) -> Table:
    """Perplexities and the change against the baseline."""
    columns = ("variant", "change", "95% of change", "p", "test ppl", "95% (seeds)", "valid ppl", "seeds")
    rows = []
    for v in report["variants"].values():
        if v["status"] == "not started":
            rows.append((_label(v), *["-"] * (len(columns) - 1)))
            continue
        sure = v["evidence"] and widest(v["evidence"])
        rows.append(
            (
                _label(v),
                number(v["change"]["test_ppl"], "+.1f", "%"),
                span(sure and sure["percent"], "+.1f", "%"),
                p_value(sure and sure["p_holm"]),
                number(v["test_ppl"], ",.2f"),
                span(v["test_ppl_interval"], ",.2f"),
                number(v["valid_ppl"], ",.2f"),
                str(len(v["seeds_done"])),
            )
        )
    return columns, rows


def certainty(report: dict[str, Any]) -> Table:
    """The three intervals of each change against the baseline, and then against the controls."""
    columns = ("variant", "change", "seeds", "text", "both", "p seeds", "p text", "p both")
    rows = []
    for name, to in compared(report):
        v = report["variants"][name]
        label, evidence = (v["label"], v["evidence"]) if to == "baseline" else (_against(report, name), v["control"])
        kinds = [evidence[f"over_{kind}"] for kind in ("seeds", "text", "both")]
        intervals = [span(kind and kind["percent"], "+.1f", "%") for kind in kinds]
        p_values = [p_value(kind and kind["p_holm"]) for kind in kinds]
        rows.append((label, number(evidence["percent"], "+.1f", "%"), *intervals, *p_values))
    return columns, rows


def compared(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of variants of which it is known how sure the change is: (name, "baseline" or its control)."""
    variants = report["variants"]
    pairs = [(name, "baseline") for name, v in variants.items() if v["evidence"]]
    return pairs + [(name, v["control"]["name"]) for name, v in variants.items() if v["control"]]


def _against(report: dict[str, Any], name: str) -> str:
    """`+REAL vs +RE+LS`."""
    v = report["variants"][name]
    return f"{v['label']} vs {report['variants'][v['control']['name']]['label']}"


def size(report: dict[str, Any]) -> Table:
    """Parameters and memory."""
    columns = ("variant", "parameters", "loss MiB", "eager", "training MiB", "eager", "inference MiB")
    rows = []
    for v in report["variants"].values():
        if v["status"] == "not started":
            rows.append((v["label"], *["-"] * (len(columns) - 1)))
            continue
        layer, training = v["loss_memory"], v["training_memory"]
        sizes = (layer["total_bytes"], layer["eager_bytes"], training["total_bytes"], training["eager_bytes"])
        mib = (f"{n / MIB:,.1f}" for n in (*sizes, training["parameter_bytes"]))
        rows.append((v["label"], f"{v['parameters']:,}", *mib))
    return columns, rows


def speed(report: dict[str, Any]) -> Table:
    """Speed, time and money."""
    priced = any(c["price_per_million"] is not None for c in report["cost"].values())
    price = ("price/1M",) if priced else ()
    columns = ("variant", "ms/token", "scored/s", "trained/s", "s/1M tokens", *price, "seconds")
    rows = []
    for name, v in report["variants"].items():
        if v["status"] == "not started":
            rows.append((v["label"], *["-"] * (len(columns) - 1)))
            continue
        use, spent = report["inference"].get(name, {}), report["cost"].get(name, {})
        rows.append(
            (
                v["label"],
                _spread(use.get("ms_per_token"), use.get("ms_per_token_quartiles"), ".2g"),
                _spread(use.get("tokens_per_second"), use.get("tokens_per_second_quartiles"), ",.0f"),
                _spread(v["tokens_per_second"], v.get("tokens_per_second_range"), ",.0f"),
                number(spent.get("seconds_per_million"), ",.0f"),
                *([number(spent.get("price_per_million"), ".3g")] if priced else []),
                f"{v['seconds']:,.1f}",
            )
        )
    return columns, rows


def _label(v: dict[str, Any]) -> str:
    if v["status"] in ("not started", "diverged"):
        return f"{v['label']} ({v['status']})"
    if v["status"] == "partial" and float(v["epochs_done"]) != v["epochs_planned"]:
        return f"{v['label']} (stopped in epoch {math.floor(v['epochs_done']) + 1} of {v['epochs_planned']})"
    return f"{v['label']} (unfinished)" if v["status"] == "partial" else str(v["label"])


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure as text, "-" for None; what rounds to 0 has no sign."""
    if value is None:
        return "-"
    text = f"{value:{form}}"
    return (text if text.strip(" +-0.,") else text.replace("+", "").replace("-", "")) + unit


def span(ends: Any, form: str, unit: str = "") -> str:
    """An interval as text."""
    return "-" if not ends else f"{number(ends[0], form)} to {number(ends[1], form, unit)}"


def _spread(value: float | None, ends: Any, form: str) -> str:
    """A timing, and in brackets between what it lay."""
    return number(value, form) + (f" ({ends[0]:{form}}-{ends[1]:{form}})" if ends else "")


def p_value(p: Any) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def table(report: dict[str, Any]) -> str:
    """The comparison for a terminal: quality, memory, speed and cost."""
    return "\n\n".join(aligned(*part(report)) for part in (quality, size, speed))


def aligned(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
