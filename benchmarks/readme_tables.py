"""The README's benchmark figures and picture, from the committed result.

    python benchmarks/readme_tables.py           rewrites README.md between its marks, and the picture beside the result
    python benchmarks/readme_tables.py --check   writes nothing; exit 1 when they are not what the result gives
    python benchmarks/readme_tables.py --smoke   the same as --check

A picture is compared where the installed matplotlib is the one that drew it; another draws the same with other bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from tiedkl.bench.store import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "bench_cpu.json"
BEGIN = "<!-- figures: python benchmarks/readme_tables.py, from benchmarks/results/cpu/bench_cpu.json -->"
END = "<!-- end of figures -->"
OURS, FALLBACK = "tiedkl cpp", "tiedkl torch"
BASELINES = ("eager CE+KL", "torch.compile CE+KL", "eager CE")
DRAWN = {OURS: "#137a4b", FALLBACK: "#5fae86", "torch.compile CE+KL": "#b3540b", "eager CE": "#1769aa"}
MIB = 1 << 20


def best_peer(rows: dict[str, Any], kl: bool) -> float | None:
    """Seconds of the fastest library that is not tiedkl; of the accurate ones, where the result says which are."""
    kinds = {name: row.get("kl", name.endswith("CE+KL")) for name, row in rows.items()}
    times = [
        row["seconds"]
        for name, row in rows.items()
        if kinds[name] == kl and not name.startswith("tiedkl") and row.get("status", "ok") == "ok" and "seconds" in row
    ]
    return min(times, default=None)


def table(report: dict[str, Any]) -> str:
    """One line a shape."""
    head = ["N, V, D", "dtype", "ρ", *(f"time / {b}" for b in BASELINES)]
    head += ["time / fastest CE+KL peer", "time / fastest CE peer", "GEMM floor / time", "extra memory, MiB (eager)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in report["results"]:
        rows = result["rows"]
        ours, eager = rows[OURS], rows["eager CE+KL"]
        others = [rows.get(b, {}).get("seconds") for b in BASELINES] + [best_peer(rows, kl) for kl in (True, False)]
        ratios = [f"{ours['seconds'] / seconds:.2f}" if seconds else "-" for seconds in others]
        memory = f"{ours['peak_bytes'] / MIB:.0f} ({eager['peak_bytes'] / MIB:.0f})"
        shape = f"{result['N']}, {result['V']}, {result['D']}"
        cells = [shape, result["dtype"], f"{result['rho']:.2f}", *ratios, f"{ours['floor_fraction']:.2f}", memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(report: dict[str, Any]) -> str:
    """What stands between the marks."""
    s = report["stamp"]
    rows = [result["rows"] for result in report["results"]]
    fallback = [r[FALLBACK]["seconds"] / r["eager CE+KL"]["seconds"] for r in rows if "seconds" in r.get(FALLBACK, {})]
    peers = sorted(
        {name for r in rows for name, row in r.items() if "seconds" in row and not name.startswith("tiedkl")}
    )
    caption = (
        f"{s['cpu']}, {s['threads']} threads, torch {s['torch']}, commit {s['commit'][:7]}, `{s['command'].strip()}`. "
        f"Measured beside it: {', '.join(peers)}."
    )
    without = (
        f'`impl="torch"`, the fallback without a compiler, takes {min(fallback):.2g} to {max(fallback):.2g} times as '
        "long as eager CE+KL in that run."
    )
    picture = f"![Time of a step in matrix products, by shape]({picture_file().relative_to(ROOT)})"
    return "\n\n".join([BEGIN, table(report), picture, caption, without, END])


def picture_file() -> Path:
    """Beside the result."""
    return RESULT.with_suffix(".svg")


def picture(report: dict[str, Any]) -> str:
    """Bars for every shape: time in matrix products of the same run, with the floor."""
    import matplotlib

    from tiedkl.page import figure

    results = report["results"]

    def paint(axes: Any) -> None:
        width = 0.8 / len(DRAWN)
        for i, (name, colour) in enumerate(DRAWN.items()):
            units = [r["rows"].get(name, {}).get("gemm_units", float("nan")) for r in results]
            axes.bar([x + (i - 1.5) * width for x in range(len(results))], units, width, color=colour, label=name)
        for x, result in enumerate(results):
            floor = 3 + result["rho"]
            axes.hlines(floor, x - 0.45, x + 0.45, color="#1d2329", linestyle=":", label="3 + ρ" if not x else None)
        labels = [f"{r['N']}\n{r['V']}\n{r['D']}" + ("" if r["dtype"] == "float32" else "\nbf16") for r in results]
        axes.set_xticks(range(len(results)), labels, fontsize=9)
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.grid(axis="x", visible=False)
        axes.set(ylabel="matrix products N x V x D", xlabel="tokens N, vocabulary V, width D")
        axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))

    svg = figure("readme", "Time of a step in matrix products, by shape", paint, (8.0, 4.0))
    return f"{svg.rstrip()}\n<!-- matplotlib {matplotlib.__version__} -->\n"


def drawn_by(svg: str) -> str | None:
    """The version of matplotlib that a picture names."""
    found = re.search(r"<!-- matplotlib (\S+) -->", svg)
    return found[1] if found else None


def replaced(readme: str, new: str) -> str:
    """`readme` with `new` between the marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks a mark: {BEGIN if not begin else END}")
    return before + new + after


def stale(readme: str, report: dict[str, Any]) -> list[str]:
    """Names of what is not as the result gives it."""
    found = [] if replaced(readme, text(report)) == readme else ["README.md"]
    old = picture_file().read_text("utf-8") if picture_file().exists() else ""
    try:
        new = picture(report)
    except ImportError as error:
        print(f"{picture_file().name} is not compared: {error}")
        return found
    if old and drawn_by(old) != drawn_by(new):
        print(f"{picture_file().name} is not compared: matplotlib {drawn_by(old)} drew it, this is {drawn_by(new)}")
    elif old != new:
        found.append(str(picture_file().relative_to(ROOT)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--smoke", action="store_true", help="the same")
    args = parser.parse_args()
    report, file = read_json(RESULT), ROOT / "README.md"
    readme = file.read_text("utf-8")
    if args.check or args.smoke:
        names = stale(readme, report)
        for name in names:
            print(f"{name} is not what {RESULT.relative_to(ROOT)} gives: run python benchmarks/readme_tables.py")
        return int(bool(names))
    file.write_text(replaced(readme, text(report)), "utf-8")
    picture_file().write_text(picture(report), "utf-8")
    print(f"wrote README.md and {picture_file().relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
