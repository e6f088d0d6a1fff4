"""The report as Markdown: verdict, tables, vocabulary, checklist, limits."""

from __future__ import annotations

from typing import Any

from .evidence import SAYS
from .tables import Table, tables
from .vocabulary import vocabulary


def markdown(report: dict[str, Any]) -> str:
    """The report (see report.py) as Markdown, with the tables of the HTML page."""
    first, *rest = report["verdict"]
    lines = [
        f"# Does the tied-embedding loss help on {_text(report['corpus']['name'])}?",
        "",
        f"**{_text(first)}**",
        "",
    ]
    lines += [_text(s) for s in rest] + [""]
    if report["plan"]:
        lines += [f"As {report['plan']['text']}.", ""]
    for title, part in tables(report):
        lines += [f"## {title}", "", *rows(part), ""]
        if title.startswith("How sure"):
            lines += [*(f"- {kind}: {text}" for kind, text in SAYS.items()), ""]
            lines += ["p-values are Holm's, for several comparisons with the baseline, or with controls.", ""]
    facts, unknown = vocabulary(report["corpus"])
    lines += ["## Vocabulary", "", *(f"- {key}: {value}" for key, value in facts), ""]
    if unknown:
        lines += [f"Most frequent unknown words of validation and test: {', '.join(map(_text, unknown))}.", ""]
    if report["checklist"]:
        lines += ["## Roll-out checklist", ""]
    for k, stage in enumerate(report["checklist"], 1):
        lines += _stage(k, stage)
    lines += ["## What this test cannot tell", "", *(f"- {_text(limit)}" for limit in report["limits"]), ""]
    lines += [f"Made {report['created']}; the same figures, and more, are in report.json.", ""]
    return "\n".join(lines)


def rows(part: Table) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    columns, body = part
    rule = "|---|" + "---:|" * (len(columns) - 1)
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(map(_text, row))} |" for row in body)]


def _stage(k: int, stage: dict[str, Any]) -> list[str]:
    lines = [f"### {k}. {stage['stage']}", "", *(f"- [{'x' if k == 1 else ' '}] Seen: {s}" for s in stage["seen"])]
    for command in stage["commands"]:
        lines += [f"- [ ] Run: `{command}`"]
    if stage["note"]:
        lines.append(f"- {stage['note']}")
    lines.append(f"- [ ] Go on if: {stage['go_on_if']}")
    lines += [f"- [ ] Monitor: {_text(m)}" for m in stage["monitor"]]
    return [*lines, f"- Memory: {stage['memory']}", ""]


def _text(text: str) -> str:
    """Text with what Markdown or HTML would read as markup made harmless."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, "\\" + mark)
    return text
