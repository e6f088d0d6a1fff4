"""CE + KL forward and backward on a GPU: tiedkl's kernels against PyTorch and other libraries' fused losses.

    python benchmarks/bench_gpu.py --out DIR          every shape; table, and in DIR JSON, CSV and plots
    python benchmarks/bench_gpu.py --shapes 8192,32000,768 --dtype float16 --rounds 15
    python benchmarks/bench_gpu.py --smoke            toy size, on a CPU where there is no GPU

Every candidate is checked before it is timed, and its errors stand in the row of its time: loss, d_h and d_w of some
tokens against float64, and those tokens' d_h in the full call, as RMS relative to the true RMS and to eager's own.
Steps are timed with CUDA events in interleaved rounds, the L2 cache emptied before each, and compared by medians.
`floor` is the time of the (3 + rho) matrix products N x V x D (3 for cross-entropy alone) that the loss cannot do
without, as cuBLAS takes in the same rounds; `own` counts the products the plan asks for. Peak memory is what the
allocator hands out beyond inputs and gradients. What does not fit becomes a row that says so. The JSON is written after
every shape: a run may be interrupted, and --budget-seconds stops it in time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _candidates import ALPHA, TAU, candidates
from _report import show, stamp, write_csv, write_plots
from _steps import Step, clean, inputs, once, prepare, relative, truth
from torch import Tensor

import tiedkl

# V, D; what says most first, should the time run out.
SHAPES = [
    (32000, 768), (128256, 2048), (256000, 4096), (256000, 768), (32000, 4096), (32000, 2048), (128256, 768),
    (128256, 4096), (256000, 2048),
]  # fmt: skip
TOKENS, CHECKED = 8192, 128
EAGER_BYTES = 40  # of eager CE + KL for each logit
BOUND = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
LONG = 4.0  # seconds in one shape after which a candidate is not timed again


class Shape:
    """The rows of one shape."""

    def __init__(self, n: int, v: int, d: int, dtype: torch.dtype, device: torch.device, smoke: bool):
        self.n, self.v, self.d, self.dtype, self.device = n, v, d, dtype, device
        self.h, self.w, self.y = inputs(n, v, d, dtype, device)
        self.rho = len(self.y.unique()) / n
        self.table = candidates(device, dtype, smoke)
        self.rows: dict[str, dict[str, Any]] = {}
        for name, c in self.table.items():
            row = {"status": "ok" if c.loss else "absent", "kl": c.kl, "note": c.note, "errors": {}}
            self.rows[name] = row
            if c.loss and c.impl:
                options = {"temperature": TAU, "alpha": ALPHA, "impl": c.impl, "workspace_bytes": c.workspace_bytes}
                row["plan"] = str(tiedkl.explain(self.h, self.w, self.y, **options)).split("\nnot ")[0]
        self.unit: float | None = None

    @property
    def alive(self) -> list[str]:
        return [name for name, row in self.rows.items() if row["status"] in ("ok", "inaccurate")]

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """work(), or a row that says why there is no result."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            self.rows[name] |= {"status": "out of memory", "note": str(error).split(". ")[0]}
        except Exception as error:  # a peer's failure must not end the run
            self.rows[name] |= {"status": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
        clean(self.device)
        return None

    def check(self) -> None:
        """Errors of a few tokens with the whole vocabulary."""
        few = min(CHECKED, self.n)
        y = self.y[:few]
        self.d_h = {}
        for kl in (True, False):
            right = truth(self.h[:few], self.w, y, kl)
            self.d_h[kl] = right["dh"] * few / self.n  # of the same tokens in the mean over all
            # Compiled ones would be compiled for this size too: the full call has to do.
            for name in [n for n in self.alive if self.table[n].kl == kl and not self.table[n].compiled]:
                h = self.h.detach()[:few].clone().requires_grad_()

                def errors(name: str = name, h: Tensor = h, right: dict[str, Tensor] = right) -> dict[str, float]:
                    found = prepare(self.table[name], h, self.w, y)()
                    return {k: relative(a, right[k]) for k, a in zip(("loss", "dh", "dw"), found, strict=True)}

                self.rows[name]["errors"] = self.attempt(name, errors) or {}
            del right
            clean(self.device)

    def first_run(self) -> None:
        """The full call: those tokens' d_h, and the peak memory."""
        for name in self.alive:

            def run(name: str = name) -> int | None:
                c = self.table[name]
                if not c.graph:
                    prepare(c, self.h, self.w, self.y)()  # compiles, tunes
                clean(self.device)
                before = 0
                if self.device.type == "cuda":
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                found = prepare(c, self.h, self.w, self.y)()
                gradients = sum(x.numel() * x.element_size() for x in found[1:])
                right = self.d_h[c.kl]
                self.rows[name]["errors"]["dh_full"] = relative(found[1][: len(right)], right)
                if self.device.type != "cuda":
                    return None
                return max(0, torch.cuda.max_memory_allocated() - before - gradients)

            self.rows[name]["peak_bytes"] = self.attempt(name, run)
            clean(self.device)

    def judge(self) -> list[str]:
        """Names of tiedkl's candidates that are wrong: they are not timed. An inaccurate peer is timed and says so."""
        wrong = []
        for name in self.alive:
            row, kl = self.rows[name], self.table[name].kl
            eager = self.rows["eager CE+KL" if kl else "eager CE"]["errors"]
            row["errors_vs_eager"] = {k: e / eager[k] for k, e in row["errors"].items() if eager.get(k)}
            over = {k: e for k, e in row["errors"].items() if not e <= BOUND[str(self.dtype)[6:]]}
            if over:
                row["status"] = "inaccurate"
                row["note"] += "; errors over the bound: " + ", ".join(f"{k} {e:.2g}" for k, e in over.items())
                if self.table[name].impl:
                    row["status"] = "wrong"
                    wrong.append(name)
        return wrong

    def products(self) -> Step:
        """The three products of a cross-entropy, into buffers that are ready."""
        h, w = self.h.detach(), self.w.detach()
        z, d_h, d_w = h.new_empty(self.n, self.v), torch.empty_like(h), torch.empty_like(w)

        def step() -> tuple[Tensor, Tensor, Tensor]:
            return torch.mm(h, w.T, out=z), torch.mm(z, w, out=d_h), torch.mm(z.T, h, out=d_w)

        return step

    def time(self, rounds: int, deadline: float) -> None:
        """Rounds of one step of everything; captured ones apart, for they hold on to their memory."""
        flush = torch.empty(1 << 28 if self.device.type == "cuda" else 1, dtype=torch.int8, device=self.device)
        tensors = self.h, self.w, self.y
        for captured in (False, True):
            names = [name for name in self.alive if self.table[name].graph == captured]
            steps = {name: self.attempt(name, lambda n=name: prepare(self.table[n], *tensors)) for name in names}
            steps = {name: step for name, step in steps.items() if step}
            if not captured:
                product = self.products()
                product()
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            units: list[float] = []
            for turn in range(rounds):
                if turn >= 3 and time.monotonic() > deadline:
                    break
                if not captured:
                    units.append(once(product, flush) / 3)
                for name in [n for n in steps if sum(seconds[n]) < LONG]:
                    took = self.attempt(name, lambda step=steps[name]: once(step, flush))
                    if took is None:
                        del steps[name]
                    else:
                        seconds[name].append(took)
            if not captured:
                self.unit = statistics.median(units)
                del product
            self.fill(names, seconds)
            del steps
            clean(self.device)

    def fill(self, names: list[str], seconds: dict[str, list[float]]) -> None:
        for name in names:
            times, c, row = seconds.get(name), self.table[name], self.rows[name]
            if not times or row["status"] not in ("ok", "inaccurate"):
                continue
            s = statistics.median(times)
            assert self.unit is not None
            row |= {
                "seconds": s,
                "samples": len(times),
                "spread": (max(times) - min(times)) / s,
                "gemm_units": s / self.unit,
                "floor_fraction": (3 + (self.rho if c.kl else 0)) * self.unit / s,
            }
            if c.impl:  # "4 + 2 rho GEMMs", or "6 GEMMs"
                whole, rho, share = re.search(r"(\d+)( \+ (?:(\d+) )?rho)? GEMMs", row["plan"]).groups()
                row["own_floor_fraction"] = (int(whole) + (int(share or 1) * self.rho if rho else 0)) * self.unit / s

    def failures(self) -> list[str]:
        """Names of what must run: tiedkl and eager. Running out of memory is a result."""
        own = [name for name, c in self.table.items() if c.impl or name.startswith("eager")]
        return [name for name in own if self.rows[name]["status"] == "failed"]

    def result(self) -> dict[str, Any]:
        shape = {"N": self.n, "V": self.v, "D": self.d, "dtype": str(self.dtype)[6:], "rho": self.rho}
        return {**shape, "unit_seconds": self.unit, "rows": self.rows}


def shapes(args: argparse.Namespace, device: torch.device) -> list[tuple[int, int, int, str]]:
    if args.smoke:
        return [(48, 500, 32, "float32"), (40, 300, 24, "bfloat16")]
    if args.shapes:
        return [(*map(int, s.split(",")), args.dtype) for s in args.shapes]  # type: ignore[misc]
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 35
    return [(TOKENS if EAGER_BYTES * TOKENS * v < memory else TOKENS // 2, v, d, args.dtype) for v, d in SHAPES]


def run(args: argparse.Namespace, folder: Path, device: torch.device) -> int:
    report: dict[str, Any] = {"stamp": stamp(device), "finished": False, "wrong": [], "failed": [], "results": []}
    start = time.monotonic()
    try:
        for n, v, d, dtype in shapes(args, device):
            if time.monotonic() - start > args.budget_seconds:
                print(f"out of time before N={n} V={v} D={d}", file=sys.stderr)
                break
            torch._dynamo.reset()
            shape = Shape(n, v, d, getattr(torch, dtype), device, args.smoke)
            shape.check()
            shape.first_run()
            report["wrong"] += [f"{name} at N={n} V={v} D={d}" for name in shape.judge()]
            shape.time(args.rounds, start + args.budget_seconds)
            report["failed"] += [f"{name} at N={n} V={v} D={d}" for name in shape.failures()]
            report["results"].append(shape.result())
            (folder / "bench_gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            show(report["results"][-1])
            del shape
            clean(device)
        else:
            report["finished"] = True
    except KeyboardInterrupt:
        print("\ninterrupted: keeping what was measured", file=sys.stderr)
    (folder / "bench_gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    write_csv(report, folder / "bench_gpu.csv")
    write_plots(report, folder)
    for kind in ("wrong", "failed"):
        for name in report[kind]:
            print(f"{kind.upper()}: {name}", file=sys.stderr)
    if not report["results"]:
        print("nothing was measured", file=sys.stderr)
    return int(bool(report["wrong"] or report["failed"]) or not report["results"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and plots; default benchmarks/results/gpu")
    parser.add_argument("--shapes", nargs="+", metavar="N,V,D", help="instead of the built-in list")
    parser.add_argument("--dtype", choices=tuple(BOUND), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget-seconds", type=float, default=3600.0, help="start no shape after this")
    parser.add_argument("--smoke", action="store_true", help="toy size; without --out nothing is kept")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.smoke:
        parser.error("there is no CUDA device; --smoke runs at toy size on the CPU")
    args.rounds = 1 if args.smoke else max(1, args.rounds)
    if args.out is None and args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            return run(args, Path(folder), device)
    folder = args.out or Path(__file__).parent / "results" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    status = run(args, folder, device)
    print(f"\nwrote {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())
