"""What the parts of results/README.md have in common."""

from __future__ import annotations

from typing import Any


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table. What is in the cells is Markdown already, unlike in those of tiedkl.compare.markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commit(stamp: dict[str, Any]) -> str:
    """The first digits of the commit that was measured, with + where files had changed."""
    full = str(stamp["git_commit"])
    return full[:7] + "+" * full.endswith("+")


def as_file(svg: str) -> str:
    """An `<svg>` element as a file that has a size of its own and can be seen on a dark page."""
    return svg.replace("<svg", '<svg width="540" height="350" style="background:#fff"', 1)
