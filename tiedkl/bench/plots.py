"""Pictures of a report, each an SVG: curves where one quantity was varied, bars for a single workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..page import figure
from .shapes import MIB
from .store import write

TIEDKL = ("#137a4b", "#5fae86", "#0b4a2d", "#8fcbb0", "#2f9e6c", "#3c6e57")
PEERS = (
    "#b3540b", "#1769aa", "#7a3fa0", "#c2185b", "#00838f", "#8d6e00", "#5d4037", "#c62828", "#3949ab", "#6a7f00",
    "#ad1457", "#00695c", "#ef6c00", "#455a64",
)  # fmt: skip
MARKERS = "os^Dv<>ph*XPd"
FLOOR = "#5b6470"
CURVES = (5.4, 5.0)  # inches; the legend below takes a third
AXES = {
    "N": "tokens N",
    "V": "vocabulary V",
    "D": "width D",
    "temperature": "temperature",
    "workspace_bytes": "workspace, MiB",
}
SAME = (*AXES, "dtype", "device", "loss", "mode", "ignored", "targets")
FLOOR_UNITS = {"fwd": "1 + \u03c1", "bwd": "2", "fwd+bwd": "3 + \u03c1"}


@dataclass(frozen=True)
class Picture:
    """A figure with what a reader needs to know."""

    name: str  # of the file
    title: str
    caption: str
    svg: str


def pictures(report: dict[str, Any]) -> list[Picture]:
    """Everything the report has the figures for."""
    results = [r for r in report["results"] if any("seconds" in row for row in r["rows"].values())]
    colours = _colours(results)
    found: list[Picture] = []
    swept: set[int] = set()
    for axis in AXES:
        for points in _series(results, axis):
            swept |= {id(point) for point in points}
            found += _curves(axis, points, colours, len(found))
    for result in results:
        if id(result) not in swept:
            found += _bars(result, colours, len(found))
    for result in _largest(results, swept):
        found.append(_errors(result, colours, len(found)))
    return found


def write_plots(folder: Path, report: dict[str, Any]) -> list[str]:
    """Every picture as a file of `folder`; their paths."""
    files = []
    for picture in pictures(report):
        file = folder / f"{picture.name}.svg"
        write(file, picture.svg)
        files.append(str(file))
    return files


def _colours(results: list[dict[str, Any]]) -> dict[str, str]:
    """A colour for every name: greens for tiedkl, others for the peers."""
    names = list(dict.fromkeys(name for r in results for name, row in r["rows"].items() if "seconds" in row))
    own = [name for name in names if name.startswith("tiedkl")]
    others = [name for name in names if name not in own]
    return {name: TIEDKL[i % len(TIEDKL)] for i, name in enumerate(own)} | {
        name: PEERS[i % len(PEERS)] for i, name in enumerate(others)
    }


def _series(results: list[dict[str, Any]], axis: str) -> list[list[dict[str, Any]]]:
    """Results that differ in `axis` only, at least three of them."""
    groups: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for result in results:
        if result[axis] is not None:
            key = tuple(result[k] for k in SAME if k not in (axis, "targets"))
            groups.setdefault(key, {})[result[axis]] = result
    return [[points[x] for x in sorted(points)] for points in groups.values() if len(points) >= 3]


def _largest(results: list[dict[str, Any]], swept: set[int]) -> list[dict[str, Any]]:
    """One result for an error picture: each that stands alone, and of the swept ones the largest."""
    alone = [r for r in results if id(r) not in swept]
    rest = [r for r in results if id(r) in swept]
    return [*alone, max(rest, key=lambda r: r["N"] * r["V"] * r["D"])] if rest else alone


def _title(result: dict[str, Any], without: str = "") -> str:
    sizes = ", ".join(f"{k}={result[k]:,}" for k in ("N", "V", "D") if k != without)
    return f"{sizes}, {result['dtype']}"


def _floor(result: dict[str, Any]) -> float | None:
    """Seconds of the unavoidable products, from any row with KL, or else without."""
    rows = [row for row in result["rows"].values() if row.get("floor_fraction")]
    rows.sort(key=lambda row: not row["kl"])
    return rows[0]["floor_fraction"] * rows[0]["seconds"] if rows else None


def _log(axes: Any, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 300 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any) -> None:
    axes.figure.legend(frameon=False, fontsize=9, loc="outside lower left", ncols=2)


def _curves(axis: str, points: list[dict[str, Any]], colours: dict[str, str], number: int) -> list[Picture]:
    """Time and memory against `axis`."""
    scale = MIB if axis == "workspace_bytes" else 1
    label, first = AXES[axis], points[-1]
    fixed = _title(first, axis)

    def lines(axes: Any, value: Callable[[dict[str, Any]], float | None]) -> None:
        for i, (name, colour) in enumerate(colours.items()):
            found = [(p[axis] / scale, value(p["rows"][name])) for p in points if name in p["rows"]]
            found = [(x, y) for x, y in found if y]
            if found:
                kl = any(p["rows"][name]["kl"] for p in points if name in p["rows"])
                axes.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=5,
                    linewidth=2.4 if name.startswith("tiedkl") else 1.4,
                    linestyle="-" if kl else "--",
                    label=name,
                )

    def time(axes: Any) -> None:
        lines(axes, lambda row: row["seconds"] * 1e3 if "seconds" in row else None)
        floor = [(p[axis] / scale, seconds * 1e3) for p in points if (seconds := _floor(p))]
        if floor:
            axes.plot(*zip(*floor, strict=True), color=FLOOR, linewidth=1.2, linestyle=":", label="GEMM floor")
        _finish(axes, label, "milliseconds")

    def memory(axes: Any) -> None:
        lines(axes, lambda row: max(row["peak_bytes"], MIB / 16) / MIB if row.get("peak_bytes") is not None else None)
        logits = [(p[axis] / scale, p["N"] * p["V"] * 4 / MIB) for p in points]
        axes.plot(*zip(*logits, strict=True), color=FLOOR, linewidth=1.2, linestyle=":", label="one N x V float32")
        _finish(axes, label, "MiB beyond inputs and gradients")

    units = FLOOR_UNITS[first["mode"]]
    kinds = "Solid: CE + KL, dashed: CE alone" if first["loss"] == "cekl" else "CE alone"
    stem = axis.removesuffix("_bytes")
    return [
        Picture(
            f"{number:02}-time-{stem}",
            f"Time against {label}",
            f"{fixed}. Lower is faster. {kinds}. Dotted: the {units} matrix products that cannot be avoided.",
            figure(f"time-{number}", f"Time against {label}", time, CURVES),
        ),
        Picture(
            f"{number + 1:02}-memory-{stem}",
            f"Memory against {label}",
            f"{fixed}. Lower is less. {kinds}. Dotted: what one matrix of all logits takes.",
            figure(f"memory-{number}", f"Memory against {label}", memory, CURVES),
        ),
    ]


def _finish(axes: Any, x: str, y: str) -> None:
    _log(axes, "x")
    _log(axes, "y")
    axes.set(xlabel=x, ylabel=y)
    _legend(axes)


def _bars(result: dict[str, Any], colours: dict[str, str], number: int) -> list[Picture]:
    """Time and memory of every row, the shortest on top."""
    rows = {name: row for name, row in result["rows"].items() if "seconds" in row}
    title, floor = _title(result), _floor(result)
    units = FLOOR_UNITS[result["mode"]]

    def bars(axes: Any, values: dict[str, float], form: str, label: str) -> None:
        order = sorted(values, key=lambda name: -values[name])
        axes.barh(order, [values[name] for name in order], color=[colours[name] for name in order], height=0.7)
        for i, name in enumerate(order):
            axes.annotate(
                format(values[name], form),
                (values[name], i),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelsize=9)
        axes.set(xlabel=label)
        axes.margins(x=0.12)

    def time(axes: Any) -> None:
        bars(axes, {name: row["seconds"] * 1e3 for name, row in rows.items()}, ",.3g", "milliseconds")
        if floor:
            axes.axvline(floor * 1e3, color="black", linestyle=":", linewidth=1.6, zorder=3)

    def memory(axes: Any) -> None:
        known = {n: max(r["peak_bytes"] / MIB, 0.05) for n, r in rows.items() if r.get("peak_bytes") is not None}
        bars(axes, known, ",.1f", "MiB beyond inputs and gradients")

    size = (5.4, 1.0 + 0.27 * len(rows))
    found = [
        Picture(
            f"{number:02}-time",
            "Time",
            f"{title}. Shorter is faster. Green: tiedkl. Dotted: the {units} matrix products that cannot be avoided.",
            figure(f"time-{number}", "Time", time, size),
        )
    ]
    if any(row.get("peak_bytes") is not None for row in rows.values()):
        found.append(
            Picture(
                f"{number + 1:02}-memory",
                "Memory",
                f"{title}. Shorter is less. Green: tiedkl.",
                figure(f"memory-{number}", "Memory", memory, size),
            )
        )
    return found


def _worst(row: dict[str, Any]) -> float:
    return float(max(row["errors"].values()))


def _errors(result: dict[str, Any], colours: dict[str, str], number: int) -> Picture:
    """The worst error of loss and gradients against time."""
    rows = {n: r for n, r in result["rows"].items() if "seconds" in r and any(r["errors"].values())}

    def paint(axes: Any) -> None:
        for i, (name, row) in enumerate(rows.items()):
            axes.plot(
                [row["seconds"] * 1e3],
                [_worst(row)],
                marker=MARKERS[i % len(MARKERS)],
                color=colours[name],
                markersize=8,
                linestyle="",
                label=name,
                markerfacecolor=colours[name] if row["kl"] else "none",
            )
        from matplotlib.ticker import LogFormatterSciNotation

        axes.set_ylim(min(map(_worst, rows.values())) / 5, max(map(_worst, rows.values())) * 5)
        _finish(axes, "milliseconds", "relative error against float64")
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())

    return Picture(
        f"{number:02}-error",
        "Error against time",
        f"{_title(result)}. The largest relative RMS error of loss, dh and dw. Lower left is better. Filled: CE + KL, "
        "hollow: CE alone.",
        figure(f"error-{number}", "Error against time", paint, CURVES),
    )
