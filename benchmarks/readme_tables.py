"""The measured figures in README.md and docs/design.md, and the README's picture, from the committed results.

    python benchmarks/readme_tables.py           rewrites the pages between their marks, and the picture
    python benchmarks/readme_tables.py --check   writes nothing; exit 1 when they are not what the results give
    python benchmarks/readme_tables.py --smoke   the same as --check

A picture is compared where the installed matplotlib is the one that drew it; another draws the same with other bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tiedkl.bench.store import read_json
from tiedkl.testing import ALL_DTYPES

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "bench_cpu.json"
ACCURACY = ROOT / "benchmarks" / "results" / "cpu" / "accuracy.json"
H200 = ROOT / "benchmarks" / "results" / "h200"
GPU_RESULTS = [H200 / name for name in ("bench_gpu.json", "bench_gpu-2.json")]
GPU_AGAIN = H200 / "bench_gpu-f7d1e1e.json"  # tiedkl and eager alone, after a change
GPU_ROWS = {
    "tiedkl triton": "default",
    "tiedkl triton, CUDA graph": "CUDA graph",
    "tiedkl triton, 512 MiB": "512 MiB",
    "tiedkl triton, 4 GiB": "4 GiB",
}
OURS, FALLBACK = "tiedkl cpp", "tiedkl torch"
BASELINES = ("eager CE+KL", "torch.compile CE+KL", "eager CE")
DRAWN = {OURS: "#137a4b", FALLBACK: "#5fae86", "torch.compile CE+KL": "#b3540b", "eager CE": "#1769aa"}
MIB = 1 << 20
GOALS = {  # N, V, D, dtype -> at most, of eager CE+KL, torch.compile CE+KL, eager CE; at least, of the GEMM floor
    (8192, 10000, 200, "float32"): (0.18, 0.45, 0.70, 0.80),
    (2048, 32000, 512, "float32"): (0.22, 0.68, 0.85, 0.85),
    (2048, 50257, 768, "float32"): (0.28, 0.68, 0.95, 0.88),
    (1024, 50257, 768, "bfloat16"): (0.25, None, None, None),
}
QUANTITIES = {"loss": "loss", "ce": "CE", "kl": "KL", "dh": "d_h", "dw": "d_w", "db": "d_b", "dt": "d_t"}


def fastest_peer(rows: dict[str, Any], kl: bool) -> str | None:
    """The fastest library that is not tiedkl; of the accurate ones, where the result says which are."""
    kinds = {name: row.get("kl", name.endswith("CE+KL")) for name, row in rows.items()}
    times = {
        name: row["seconds"]
        for name, row in rows.items()
        if kinds[name] == kl and not name.startswith("tiedkl") and row.get("status", "ok") == "ok" and "seconds" in row
    }
    return min(times, key=times.__getitem__, default=None)


def best_peer(rows: dict[str, Any], kl: bool) -> float | None:
    """Its seconds."""
    name = fastest_peer(rows, kl)
    return None if name is None else rows[name]["seconds"]


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


def source(stamp: dict[str, Any]) -> str:
    """Machine, versions, commit, command."""
    where = f"{stamp['cpu']}, {stamp['threads']} threads, torch {stamp['torch']}"
    return f"{where}, commit {stamp['commit'][:7]}, `{stamp['command'].strip()}`."


def again(report: dict[str, Any]) -> str:
    """Shapes that were measured again by a command of their own, on the same machine and commit."""
    found = [r for r in report["results"] if "command" in r]
    return "".join(f" Again, as neighbours were loud: {r['N']}, {r['V']}, {r['D']}, `{r['command']}`." for r in found)


def speed(report: dict[str, Any]) -> str:
    """The README's table of times, its picture and what was beside it."""
    rows = [result["rows"] for result in report["results"]]
    fallback = [r[FALLBACK]["seconds"] / r["eager CE+KL"]["seconds"] for r in rows if "seconds" in r.get(FALLBACK, {})]
    peers = sorted(
        {name for r in rows for name, row in r.items() if "seconds" in row and not name.startswith("tiedkl")}
    )
    caption = f"{source(report['stamp'])}{again(report)} Measured beside it: {', '.join(peers)}."
    without = (
        f'`impl="torch"`, the fallback without a compiler, takes {min(fallback):.2g} to {max(fallback):.2g} times as '
        "long as eager CE+KL in that run."
    )
    picture = f"![Time of a step in matrix products, by shape]({picture_file().relative_to(ROOT)})"
    return "\n\n".join([table(report), picture, caption, without])


def timed(result: dict[str, Any]) -> dict[str, Any]:
    """The rows that have a time."""
    return {name: row for name, row in result["rows"].items() if "seconds" in row}


def gpu_speed(reports: list[dict[str, Any]], again: dict[str, Any]) -> str:
    """The README's table of a GPU: ways to run tiedkl, and the fastest libraries, at each shape.

    tiedkl's rows are those of `again`, a later report, where that has the shape, beside its own eager.
    """
    later = {(r["N"], r["V"], r["D"]): timed(r) for r in again["results"]}
    head = ["N, V, D", "", "ms", "/ eager CE+KL", "/ eager CE", "GEMM floor / time", "extra memory, MiB"]
    lines, measured = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)], []
    for stamp, result in ((report["stamp"], result) for report in reports for result in report["results"]):
        rows = timed(result)
        newer = later.get((result["N"], result["V"], result["D"]), {})
        names = {name: f"tiedkl, {how}" for name, how in GPU_ROWS.items() if name in rows}
        for kl in (True, False):
            if peer := fastest_peer(rows, kl):
                names[peer] = f"{peer}, the fastest peer"
        shape = f"{result['N']}, {result['V']}, {result['D']}"
        run = {name: newer if name in GPU_ROWS and name in newer else rows for name in names}
        for name in sorted(names, key=lambda n: run[n][n]["seconds"]):
            row = run[name][name]
            ratios = [row["seconds"] / run[name][b]["seconds"] for b in ("eager CE+KL", "eager CE")]
            cells = [shape, names[name], f"{1e3 * row['seconds']:.1f}", *(f"{r:.2f}" for r in ratios)]
            cells += [f"{row['floor_fraction']:.2f}" if row["kl"] else "", f"{row['peak_bytes'] / MIB:,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        peers = ", ".join(sorted(name for name in rows if not name.startswith("tiedkl")))
        measured.append(f"{shape} ({rounds(rows, stamp)}): {peers}")
        if newer:
            measured[-1] += f" (tiedkl itself later, beside eager: {rounds(newer, again['stamp'])})"
    stamp = reports[0]["stamp"]
    where = f"{stamp['device']}, torch {stamp['torch']}, Triton {stamp['triton']}"
    caption = f"{where}, bfloat16, times of forward and backward. Measured beside it at {'; at '.join(measured)}."
    return "\n\n".join(["\n".join(lines), caption])


def rounds(rows: dict[str, Any], stamp: dict[str, Any]) -> str:
    """How often the rows were timed, and the commit."""
    n = max(row.get("samples", 0) for row in rows.values())
    return f"{n} round{'s' * (n != 1)}, commit {stamp['commit'][:7]}"


def goals(report: dict[str, Any]) -> str:
    """Measured ratios beside the goals of the design; what is missed is bold."""
    lines = ["| N, V, D | of eager CE+KL | of torch.compile | of eager CE | GEMM floor / time |", "|" + "---|" * 5]
    for result in report["results"]:
        goal = GOALS.get(tuple(result[k] for k in ("N", "V", "D", "dtype")))
        if goal is None:
            continue
        ours = result["rows"][OURS]
        values = [ours["seconds"] / result["rows"].get(b, {}).get("seconds", float("nan")) for b in BASELINES]
        cells = [f"{result['N']}, {result['V']}, {result['D']}" + (" bf16" if result["dtype"] != "float32" else "")]
        for value, wanted, low in zip([*values, ours["floor_fraction"]], goal, (False,) * 3 + (True,), strict=True):
            cell = f"{value:.2f}" + ("" if wanted is None else f" ({wanted:.2f})")
            missed = wanted is not None and (value < wanted if low else value > wanted)
            cells.append(f"**{cell}**" if missed else cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", source(report["stamp"]) + again(report) + " The goal stands in brackets; bold is missed."]
    )


def accuracy(report: dict[str, Any]) -> str:
    """Errors of the backends in units of eager's, and KL as it becomes small."""
    suite = {(r["impl"], r["dtype"], r["quantity"]): r for r in report["verify"]["suite"]}
    impls = [impl for impl in ("cpp", "torch", "triton", "reference") if any(key[0] == impl for key in suite)]
    lines = ["| backend | dtype | " + " | ".join(QUANTITIES.values()) + " |", "|" + "---|" * (2 + len(QUANTITIES))]
    for impl in impls:
        for dtype in ALL_DTYPES:
            found = [suite.get((impl, dtype, quantity)) for quantity in QUANTITIES]
            if any(found):
                cells = ["-" if not r else "<0.01" if r["value"] < 0.005 else f"{r['value']:.2f}" for r in found]
                lines.append(f"| {impl} | {dtype} | " + " | ".join(cells) + " |")
    breaches = report["verify"]["breaches"]
    bounds = sum(report["verify"]["bounds"].values())
    missed = f"{len(breaches)} of {bounds} bounds are missed" if breaches else f"all of {bounds} bounds hold"
    first = f"`{report['verify']['command']}`: {report['verify']['problems']} problems, {missed}."
    parts = ["\n".join(lines), f"RMS error in units of eager PyTorch's own. {first}"]
    suites = report["float32_suites"]
    if suites:
        counts = {impl: sum(f" {impl} " in b for s in suites for b in s["breaches"]) for impl in suites[0]["bounds"]}
        total = {impl: sum(s["bounds"][impl] for s in suites) for impl in counts}
        parts.append(
            f"In {len(suites)} suites of float32 alone (`{suites[0]['command']}` and the next seeds): "
            + "; ".join(f"{impl} misses {n} of {total[impl]:,} bounds" for impl, n in counts.items())
            + "."
        )
    head = ["| mean KL | " + " | ".join(f"{r['mean_kl']:.1e}" for r in report["small_kl"]) + " |"]
    head += ["|" + "---|" * (1 + len(report["small_kl"]))]
    for name in ("eager", "tiedkl"):
        head.append(f"| {name} | " + " | ".join(f"{r[name]:.1e}" for r in report["small_kl"]) + " |")
    parts.append("Largest relative error of a token's KL in float32, as the prediction comes near its target:")
    return "\n\n".join([*parts, "\n".join(head), source(report["stamp"])])


def blocks() -> dict[tuple[str, str], str]:
    """(page, name of the block) -> what stands between its marks."""
    bench, errors = read_json(RESULT), json.loads(ACCURACY.read_text("utf-8"))
    return {
        ("README.md", "speed"): speed(bench),
        ("README.md", "speed on a GPU"): gpu_speed([read_json(file) for file in GPU_RESULTS], read_json(GPU_AGAIN)),
        ("README.md", "accuracy"): accuracy(errors),
        ("docs/design.md", "goals"): goals(bench),
    }


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


def replaced(page: str, name: str, new: str) -> str:
    """`page` with `new` between the marks of block `name`."""
    begin, end = f"<!-- {name}: python benchmarks/readme_tables.py -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"a page lacks a mark: {end if found else begin}")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def pages(new: dict[tuple[str, str], str]) -> dict[str, str]:
    """Every page with its blocks as they should be."""
    texts: dict[str, str] = {}
    for (page, name), block in new.items():
        texts[page] = replaced(texts.get(page) or (ROOT / page).read_text("utf-8"), name, block)
    return texts


def stale(new: dict[tuple[str, str], str], drawing: dict[str, Any]) -> list[str]:
    """Names of what is not as the results give it."""
    found = [page for page, text in pages(new).items() if text != (ROOT / page).read_text("utf-8")]
    old = picture_file().read_text("utf-8") if picture_file().exists() else ""
    try:
        drawn = picture(drawing)
    except ImportError as error:
        print(f"{picture_file().name} is not compared: {error}")
        return found
    if old and drawn_by(old) != drawn_by(drawn):
        print(f"{picture_file().name} is not compared: matplotlib {drawn_by(old)} drew it, this is {drawn_by(drawn)}")
    elif old != drawn:
        found.append(str(picture_file().relative_to(ROOT)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--smoke", action="store_true", help="the same")
    args = parser.parse_args()
    report, new = read_json(RESULT), blocks()
    if args.check or args.smoke:
        names = stale(new, report)
        for name in names:
            print(f"{name} is not what benchmarks/results/ gives: run python benchmarks/readme_tables.py")
        return int(bool(names))
    for page, text in pages(new).items():
        (ROOT / page).write_text(text, "utf-8")
    picture_file().write_text(picture(report), "utf-8")
    print(f"wrote {', '.join(pages(new))} and {picture_file().relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
