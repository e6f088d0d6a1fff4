"""CE + KL forward and backward on a CPU: tiedkl against eager PyTorch, torch.compile and F.linear_cross_entropy.

    python benchmarks/bench_cpu.py              every shape; table on the terminal, JSON under benchmarks/results/
    python benchmarks/bench_cpu.py --shapes 64,1000,64 --dtype bfloat16 --rounds 9
    python benchmarks/bench_cpu.py --markdown   the README's table from the JSON; measures nothing
    python benchmarks/bench_cpu.py --smoke      toy size, for continuous integration

Every candidate is checked against the float64 specification before it is timed. Candidates are timed in interleaved
rounds in one process and compared by medians; times are also given in units of one N x V x D matrix product into a
ready buffer, timed in the same rounds. Peak memory is the resident set beyond inputs and gradients (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _candidates import ALPHA, TAU, Loss, eager_ce, eager_cekl
from _steps import zipf_targets
from torch import Tensor

import tiedkl
from tiedkl import reference
from tiedkl.problem import Needs, Options, Problem

SHAPES = [
    (64, 1000, 64, "float32"),
    (256, 5000, 128, "float32"),
    (700, 10000, 200, "float32"),
    (8192, 10000, 200, "float32"),
    (2048, 32000, 512, "float32"),
    (2048, 50257, 768, "float32"),
    (1024, 50257, 768, "bfloat16"),
]
STRICT_BYTES = 8 << 20
LARGE = 2e10  # N V D
RESULT = Path(__file__).parent / "results" / "cpu" / "bench_cpu.json"


def linear_ce(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, w, y)


def ours(impl: str, workspace_bytes: int | None = None) -> Loss:
    loss = tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA, impl=impl, workspace_bytes=workspace_bytes)
    return lambda h, w, y: loss(h, w, y)


def candidates(smoke: bool) -> dict[str, tuple[Loss, bool]]:
    """Name -> (loss, whether it includes KL)."""
    table: dict[str, tuple[Loss, bool]] = {
        "tiedkl cpp": (ours("cpp"), True),
        "tiedkl cpp strict": (ours("cpp", STRICT_BYTES), True),
        "tiedkl torch": (ours("torch"), True),
        "tiedkl torch strict": (ours("torch", STRICT_BYTES), True),
        "eager CE+KL": (eager_cekl, True),
        "eager CE": (eager_ce, False),
    }
    if hasattr(F, "linear_cross_entropy"):
        table["F.linear_cross_entropy CE"] = (linear_ce, False)
    if not smoke:
        table["torch.compile CE+KL"] = (torch.compile(eager_cekl), True)
    return table


def inputs(n: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + v + d)
    h = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(v, d, generator=g) * d**-0.5).to(dtype).requires_grad_()
    return h, w, zipf_targets(n, v, g)


def step(loss: Loss, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    h.grad = w.grad = None
    value = loss(h, w, y)
    value.backward()
    return value.detach()


def relative_errors(loss: Loss, kl: bool, v: int, d: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of loss, dh, dw relative to the largest true value, on 96 tokens with the full vocabulary."""
    h, w, y = inputs(96, v, d, dtype)
    problem = Problem(h.detach().double(), w.detach().double(), y, None, None, Options(TAU, ALPHA if kl else 0.0))
    terms, grads = reference.backward(problem, torch.full((96,), 1 / 96, dtype=torch.float64), Needs(h=True, w=True))
    truth = {"loss": (terms.ce + problem.options.alpha * terms.kl).mean(), "dh": grads.h, "dw": grads.w}
    value = step(loss, h, w, y)
    got = {"loss": value, "dh": h.grad, "dw": w.grad}
    return {k: float((got[k].double() - t).abs().max() / t.abs().max()) for k, t in truth.items()}  # type: ignore[union-attr]


def peak_bytes(loss: Loss, h: Tensor, w: Tensor, y: Tensor) -> int | None:
    """Growth of the resident set in one step, less the two gradients. None where the kernel cannot reset its mark."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    h.grad = w.grad = None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the heap that earlier steps left behind would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        step(loss, h, w, y)
        grads = h.numel() * h.element_size() + w.numel() * w.element_size()
        return max(0, status("VmHWM") - before - grads)
    except (OSError, AttributeError):
        return None


def peaks(table: dict[str, tuple[Loss, bool]], h: Tensor, w: Tensor, y: Tensor) -> dict[str, int | None]:
    """`peak_bytes` of every candidate, each run once before, so that what it loads or compiles does not count."""
    small = slice(0, 32)
    for name, (loss, _) in table.items():
        part = slice(None) if "compile" in name else small
        step(loss, h.detach()[part].requires_grad_(), w, y[part])
    return {name: peak_bytes(loss, h, w, y) for name, (loss, _) in table.items()}


def measure(n: int, v: int, d: int, dtype: torch.dtype, rounds: int, smoke: bool) -> dict:
    h, w, y = inputs(n, v, d, dtype)
    rho = len(y.unique()) / n
    h32, w32, z = h.detach().float(), w.detach().float(), torch.empty(n, v)
    table = candidates(smoke)
    errors = {name: relative_errors(loss, kl, v, d, dtype) for name, (loss, kl) in table.items()}
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    for name, error in errors.items():
        if max(error.values()) > bound:
            raise SystemExit(f"{name} is wrong at {(n, v, d)}: {error}, bound {bound}")
    if n * v * d > LARGE:
        del table["tiedkl torch strict"]  # half a minute a round
    memory = peaks(table, h, w, y)
    times: dict[str, list[float]] = {name: [] for name in ("GEMM unit", *table)}
    units = max(1, int(2e8 / (2 * n * v * d)))  # repeat tiny products
    repeats = max(1, int(2e9 / (8 * n * v * d)))
    for r in range(rounds):
        print(f"\r  round {r + 1}/{rounds}", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        for _ in range(units):
            torch.mm(h32, w32.T, out=z)
        times["GEMM unit"].append((time.perf_counter() - start) / units)
        for name, (loss, _) in table.items():
            start = time.perf_counter()
            for _ in range(min(repeats, 20)):
                step(loss, h, w, y)
            times[name].append((time.perf_counter() - start) / min(repeats, 20))
    print("\r" + " " * 20 + "\r", end="", file=sys.stderr)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    unit = seconds.pop("GEMM unit")
    rows = {
        name: {
            "seconds": s,
            "spread": (max(times[name]) - min(times[name])) / s,
            "gemm_units": s / unit,
            "floor_fraction": (3 + (rho if table[name][1] else 0)) * unit / s,
            "peak_bytes": memory[name],
            "errors": errors[name],
        }
        for name, s in seconds.items()
    }
    plan = tiedkl.explain(h, w, y, temperature=TAU, alpha=ALPHA)
    return {
        "N": n,
        "V": v,
        "D": d,
        "dtype": str(dtype)[6:],
        "rho": rho,
        "unit_seconds": unit,
        "plan": str(plan),
        "rows": rows,
    }


BASELINES = ("eager CE+KL", "torch.compile CE+KL", "eager CE")


def show(result: dict) -> None:
    """Print one shape's table."""
    rows, unit = result["rows"], result["unit_seconds"]
    n, v, d = result["N"], result["V"], result["D"]
    gflops = 2 * n * v * d / unit / 1e9
    print(
        f"\nN={n} V={v} D={d} {result['dtype']}, rho={result['rho']:.2f}; "
        f"one GEMM {unit * 1e3:.2f} ms, {gflops:.0f} GFLOP/s"
    )
    baselines = [b for b in BASELINES if b in rows]
    columns = "".join(f"{'/ ' + b:>22}" for b in baselines)
    print(f"  {'':28}{'ms':>9}{'GEMMs':>8}{'floor':>7}{columns}{'extra MiB':>11}{'err dh':>9}")
    for name, row in rows.items():
        seconds, peak = row["seconds"], row["peak_bytes"]
        ratios = "".join(f"{seconds / rows[b]['seconds']:22.3f}" for b in baselines)
        mib = "?" if peak is None else f"{peak / 2**20:.1f}"
        line = f"  {name:28}{seconds * 1e3:9.2f}{row['gemm_units']:8.2f}{row['floor_fraction']:7.2f}"
        print(f"{line}{ratios}{mib:>11}{row['errors']['dh']:9.1e}")


def markdown(report: dict) -> str:
    """The README's table."""
    head = [
        "N, V, D",
        "dtype",
        "ρ",
        *(f"time / {b}" for b in BASELINES),
        "GEMM floor / time",
        "extra memory, MiB (eager)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in report["results"]:
        rows = result["rows"]
        ours, eager = rows["tiedkl cpp"], rows["eager CE+KL"]
        ratios = [f"{ours['seconds'] / rows[b]['seconds']:.2f}" if b in rows else "-" for b in BASELINES]
        memory = f"{ours['peak_bytes'] / 2**20:.0f} ({eager['peak_bytes'] / 2**20:.0f})"
        shape = f"{result['N']}, {result['V']}, {result['D']}"
        cells = [shape, result["dtype"], f"{result['rho']:.2f}", *ratios, f"{ours['floor_fraction']:.2f}", memory]
        lines.append("| " + " | ".join(cells) + " |")
    s = report["stamp"]
    caption = f"{s['cpu']}, {s['threads']} threads, torch {s['torch']}, commit {s['commit']}, `{s['command'].strip()}`."
    return "\n".join([*lines, "", caption])


def stamp() -> dict:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "command": "python benchmarks/bench_cpu.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="N,V,D", help="instead of the built-in list")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="for --shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write; default benchmarks/results/cpu/, none for --smoke")
    parser.add_argument("--smoke", action="store_true", help="toy size")
    parser.add_argument("--memory", action="store_true", help="measure only peak memory, again, into the existing JSON")
    parser.add_argument("--markdown", action="store_true", help="print the README's table from the JSON and stop")
    args = parser.parse_args()
    shapes = [(*map(int, s.split(",")), args.dtype) for s in args.shapes] if args.shapes else SHAPES
    if args.smoke:
        shapes, args.rounds = [(48, 500, 32, "float32"), (48, 500, 32, "bfloat16")], 1
    out = args.json or (None if args.smoke else RESULT)
    if args.memory:
        report = json.loads(RESULT.read_text())
        for result in report["results"]:
            h, w, y = inputs(result["N"], result["V"], result["D"], getattr(torch, result["dtype"]))
            table = {k: c for k, c in candidates(smoke=True).items() if k in result["rows"]}
            for name, peak in peaks(table, h, w, y).items():
                result["rows"][name]["peak_bytes"] = peak
            show(result)
        report["memory_stamp"] = stamp()
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
        return
    if args.markdown:
        print(markdown(json.loads((out or RESULT).read_text())))
        return
    report: dict = {"stamp": stamp(), "results": []}
    try:
        for n, v, d, dtype in shapes:
            report["results"].append(measure(n, v, d, getattr(torch, dtype), args.rounds, args.smoke))
            show(report["results"][-1])
    except KeyboardInterrupt:
        print("\ninterrupted: keeping what was measured", file=sys.stderr)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
