"""Curves of a report as inline SVG."""

from __future__ import annotations

from typing import Any

from ..page import figure

COLOURS = {
    "baseline": "#5b6470", "al": "#b3540b", "re": "#1769aa", "real": "#137a4b", "ls": "#8a6d00", "re-ls": "#7b3fa0",
}  # fmt: skip
MARKERS = {"baseline": "o", "al": "s", "re": "^", "real": "D", "ls": "v", "re-ls": "P"}


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
            rows = [r for r in report["variants"][name]["curves"] if r[key] is not None]
            if key == "valid_ppl" and any(r["seeds"] > 1 for r in rows):
                low, high = ([r[end] for r in rows] for end in ("valid_low", "valid_high"))
                axes.fill_between([r["epoch"] for r in rows], low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
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
        axes.set_xlim(0.5, 0.5 + max(points[-1][0] for points in series.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend(frameon=False)

    return figure(key, title, paint)


def changes(
    report: dict[str, Any], title: str, *, colours: dict[str, str] = COLOURS, linear_to: float | None = None
) -> str:
    """Each variant's change of test perplexity with its intervals as an `<svg>` element; "" without a comparison.

    linear_to: per cent on either side beyond which the axis is logarithmic, where some changes dwarf the others.
    """
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    found = [(name, v) for name, v in report["variants"].items() if v["evidence"]]
    if not found:
        return ""
    kinds = [
        (kind, shade)
        for kind, shade in (("text", 0.35), ("seeds", 0.6), ("both", 1.0))
        if any(v["evidence"][f"over_{kind}"] for _, v in found)
    ]

    def paint(axes: Any) -> None:
        for k, (name, v) in enumerate(reversed(found)):
            evidence = v["evidence"]
            for j, (kind, shade) in enumerate(kinds):
                if evidence[f"over_{kind}"]:
                    y = k + 0.22 * ((len(kinds) - 1) / 2 - j)
                    axes.plot(
                        evidence[f"over_{kind}"]["percent"], [y, y], color=colours[name], alpha=shade, linewidth=3
                    )
                    axes.plot([evidence["percent"]], [y], marker="o", color=colours[name], markersize=5)
                    axes.annotate(kind, (max(evidence[f"over_{kind}"]["percent"]), y), xytext=(5, 0),
                                  textcoords="offset points", va="center", fontsize=9, color="#5b6470")  # fmt: skip
        axes.axvline(0.0, color="#1d2329", linewidth=1)
        axes.set_yticks(range(len(found)), [v["label"] for _, v in reversed(found)])
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.margins(x=0.12)
        if linear_to is not None:
            axes.set_xscale("symlog", linthresh=linear_to)
            axes.xaxis.set_major_locator(
                FixedLocator([*range(-5, 6), *(sign * k for sign in (-1, 1) for k in (10, 20))])
            )
            axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("change of test perplexity, %")

    return figure("changes", title, paint)
