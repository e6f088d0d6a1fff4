"""Stamp, table, CSV and plots of bench_gpu.py."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

BASELINES = ("eager CE+KL", "torch.compile CE+KL", "eager CE")
COLUMNS = (
    "name", "status", "kl", "seconds", "spread", "gemm_units", "floor_fraction", "own_floor_fraction", "peak_bytes",
    "plan", "note",
)  # fmt: skip
ERRORS = ("loss", "dh", "dw", "dh_full")


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def stamp(device: torch.device) -> dict[str, Any]:
    """What the figures depend on. TIEDKL_COMMIT stands in for git where there is none."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/bench_gpu.py " + " ".join(sys.argv[1:]),
        "commit": os.environ.get("TIEDKL_COMMIT") or _said("git", "describe", "--always", "--dirty") or "unknown",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "driver": None,
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "device": p.name,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "processors": p.multi_processor_count,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        }
    return found


def show(result: dict[str, Any]) -> None:
    """Print one shape's table."""
    n, v, d, rows = result["N"], result["V"], result["D"], result["rows"]
    unit = result["unit_seconds"]
    speed = "" if not unit else f"one GEMM {unit * 1e3:.3f} ms, {2 * n * v * d / unit / 1e12:.1f} TFLOP/s"
    print(f"\nN={n} V={v} D={d} {result['dtype']}, rho={result['rho']:.3f}; {speed}")
    baselines = [b for b in BASELINES if "seconds" in rows.get(b, {})]
    ratios = "".join(f"{'/ ' + b:>22}" for b in baselines)
    print(f"  {'':34}{'ms':>9}{'+-':>6}{'GEMMs':>7}{'floor':>7}{'own':>6}{ratios}{'extra MiB':>11}{'dh':>6}{'dw':>6}")
    for name, row in rows.items():
        if "seconds" not in row:
            print(f"  {name:34}{row['status']}: {row['note']}"[:150])
            continue
        s = row["seconds"]
        relative = "".join(f"{s / rows[b]['seconds']:22.3f}" for b in baselines)
        own, mark = row.get("own_floor_fraction"), "!" if row["status"] == "inaccurate" else " "
        mib = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        errors = "".join(f"{row['errors_vs_eager'].get(k, float('nan')):6.2f}" for k in ("dh", "dw"))
        print(
            f"{mark} {name:34}{s * 1e3:9.3f}{row['spread']:6.2f}{row['gemm_units']:7.2f}{row['floor_fraction']:7.2f}"
            f"{'' if own is None else f'{own:.2f}':>6}{relative}{mib:>11}{errors}",
            flush=True,
        )
    for name, row in rows.items():
        if row["status"] in ("inaccurate", "wrong"):
            print(f"! {name}: {row['note']}")


def write_csv(report: dict[str, Any], file: Path) -> None:
    """One line for each shape and candidate."""
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        head = ["N", "V", "D", "dtype", "rho", "unit_seconds", *COLUMNS]
        table.writerow(head + [f"error_{e}" for e in ERRORS] + [f"error_vs_eager_{e}" for e in ERRORS])
        for r in report["results"]:
            for name, row in r["rows"].items():
                cells = [name, *(row.get(c) for c in COLUMNS[1:])]
                errors = [row.get(kind, {}).get(e) for kind in ("errors", "errors_vs_eager") for e in ERRORS]
                table.writerow([r["N"], r["V"], r["D"], r["dtype"], r["rho"], r["unit_seconds"], *cells, *errors])


def write_plots(report: dict[str, Any], folder: Path) -> None:
    """time.png in GEMMs, memory.png in MiB; a bar is missing where a candidate did not finish."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return
    results = report["results"]
    names = list(dict.fromkeys(n for r in results for n, row in r["rows"].items() if "seconds" in row))
    if not names:
        return
    labels = [f"D={r['D']}\nV={r['V']}\nN={r['N']}" for r in results]
    colours = plt.get_cmap("tab20")

    def mib(row: dict[str, Any]) -> float:
        return (row.get("peak_bytes") or 0) / 2**20

    for file, title, value in (
        ("time.png", "forward + backward, N x V x D products of the same run", lambda row: row.get("gemm_units")),
        ("memory.png", "peak memory beyond inputs and gradients, MiB", mib),
    ):
        figure, axes = plt.subplots(figsize=(max(8, 2.2 * len(results)), 5), layout="constrained")
        for i, name in enumerate(names):
            bars = [value(r["rows"].get(name, {})) or float("nan") for r in results]
            places = [x + (i + 0.5) / (len(names) + 2) for x in range(len(results))]
            axes.bar(places, bars, 1 / (len(names) + 2), label=name, color=colours(i % 20))
        axes.set_xticks([x + 0.45 for x in range(len(results))], labels)
        axes.set_title(f"{title}; {report['stamp']['device']}")
        if file == "memory.png":
            axes.set_yscale("symlog", linthresh=1)
        else:
            axes.set_yscale("log")
        figure.legend(fontsize=7, loc="outside right upper")
        figure.savefig(folder / file, dpi=110)
        plt.close(figure)
