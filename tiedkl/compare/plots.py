"""Curves of a report as inline SVG."""

from __future__ import annotations

import io
import re
from typing import Any

COLOURS = {"baseline": "#5b6470", "al": "#b3540b", "re": "#1769aa", "real": "#137a4b"}
MARKERS = {"baseline": "o", "al": "s", "re": "^", "real": "D"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a929c",
}


def curve(report: dict[str, Any], key: str, title: str, label: str, *, log: bool = False) -> str:
    """`key` of every epoch, one line a variant, as an `<svg>` element; "" when no variant has the figure."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    series = {
        name: points
        for name, v in report["variants"].items()
        if (points := [(row["epoch"], row[key]) for row in v.get("curves", []) if row[key] is not None])
    }
    if not series:
        return ""
    style: Any = {**STYLE, "svg.hashsalt": key}  # ids differ between the figures of a page
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, points in series.items():
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[name],
                marker=MARKERS[name],
                markersize=5,
                linewidth=2,
                label=report["variants"][name]["label"],
            )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    tag, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)  # the page decides
    return tag.replace("<svg", f'<svg role="img" aria-label="{title}"') + rest
