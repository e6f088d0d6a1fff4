"""Curves of a report as inline SVG."""

from __future__ import annotations

from typing import Any

from ..page import figure

COLOURS = {"baseline": "#5b6470", "al": "#b3540b", "re": "#1769aa", "real": "#137a4b"}
MARKERS = {"baseline": "o", "al": "s", "re": "^", "real": "D"}


def curve(report: dict[str, Any], key: str, title: str, label: str, *, log: bool = False) -> str:
    """`key` of every epoch, one line a variant, as an `<svg>` element; "" when no variant has the figure."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    series = {
        name: points
        for name, v in report["variants"].items()
        if (points := [(row["epoch"], row[key]) for row in v.get("curves", []) if row[key] is not None])
    }
    if not series:
        return ""

    def paint(axes: Any) -> None:
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

    return figure(key, title, paint)
