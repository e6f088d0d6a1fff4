"""A report as one HTML page (template: report.html.j2) that needs nothing from outside."""

from __future__ import annotations

from typing import Any

from .. import page
from .plots import pictures
from .shapes import MIB
from .table import HEADS, LEGEND, MEASURED, cells, heading, reason

TEMPLATE = "report.html.j2"


def render(report: dict[str, Any]) -> str:
    """The report of runner.run as HTML."""
    return page.render(
        __package__,
        TEMPLATE,
        report=report,
        findings=findings(report),
        heads=[" ".join(head).strip() for head in _columns()],
        results=[_result(result) for result in report["results"]],
        pictures=pictures(report),
        legend=LEGEND.replace("\n", " "),
        record=page.facts({key: value for key, value in report["stamp"].items() if value is not None}),
    )


def _columns() -> list[tuple[str, str]]:
    """Titles that stand alone: on a page the columns of a group may be far apart."""
    titles = {7: ("error, loss", ""), 8: ("error, dh", ""), 9: ("error, dw", ""), 1: ("+-", "")}
    return [titles.get(i, head) for i, head in enumerate(HEADS)]


def _result(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    measured = {n: row for n, row in rows.items() if row["status"] in MEASURED}
    order = sorted(measured, key=lambda n: (not rows[n]["kl"], rows[n].get("seconds", float("inf"))))
    lines = heading(result)
    return {
        "title": lines[0],
        "text": lines[1:],
        "rows": [
            {
                "name": name,
                "own": name.startswith("tiedkl"),
                "kind": "CE + KL" if rows[name]["kl"] else "CE",
                "cells": cells(rows[name]),
                "inaccurate": rows[name]["status"] == "inaccurate",
            }
            for name in order
        ],
        "others": [(name, reason(row)) for name, row in rows.items() if name not in measured],
        "versions": [(name, rows[name]["note"]) for name in order],
    }


def findings(report: dict[str, Any]) -> list[str]:
    """Sentences for a reader in a hurry: tiedkl's fastest row beside the fastest peers, the largest workload first."""
    sentences = []
    for result in sorted(report["results"], key=lambda r: -r["N"] * r["V"] * r["D"]):
        rows = {n: r for n, r in result["rows"].items() if "seconds" in r}
        own = [n for n in rows if n.startswith("tiedkl")]
        if not own or not result["best_peer"]:
            continue
        name = min(own, key=lambda n: float(rows[n]["seconds"]))
        row, parts = rows[name], []
        for key, what in (("cekl", "the same loss"), ("ce", "cross-entropy alone")):
            if key in result["best_peer"]:
                parts.append(f"{row[f'vs_best_{key}']:.2f} of the time of {result['best_peer'][key]} ({what})")
        memory = "" if row.get("peak_bytes") is None else f", with {row['peak_bytes'] / MIB:,.1f} MiB of extra memory"
        size = f"N={result['N']:,}, V={result['V']:,}, D={result['D']:,}, {result['dtype']}"
        sentences.append(f"{size}: {name} takes {' and '.join(parts)}{memory}.")
    return sentences or ["Nothing was measured to compare."]
