"""What the parts of results/README.md have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table. What is in the cells is Markdown already, unlike in those of tiedkl.compare.markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commit(stamp: dict[str, Any]) -> str:
    """The first digits of the commit that was measured, with + where files had changed."""
    full = str(stamp["git_commit"])
    return full[:7] + "+" * full.endswith("+")


def source(command: str, stamps: Iterable[dict[str, Any]]) -> str:
    """Command, machines, versions and commits of figures, of which each has a stamp (`tiedkl.environment.stamp`)."""
    stamps = list(stamps)
    machines = sorted({f"{s['cpu'] if s['device'] == 'cpu' else s['device']}, torch {s['torch']}" for s in stamps})
    commits = sorted({commit(s) for s in stamps})
    return f"`python examples/ptb/{command} --data DIR`; {'; '.join(machines)}; commit {', '.join(commits)}."


def as_file(svg: str) -> str:
    """An `<svg>` element as a file that has a size of its own and can be seen on a dark page."""
    return svg.replace("<svg", '<svg width="540" height="350" style="background:#fff"', 1)
