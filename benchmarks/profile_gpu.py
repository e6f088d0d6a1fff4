"""Where a step's time goes on a GPU: the kernels of forward and backward, by their time.

    python benchmarks/profile_gpu.py                                  the first shapes of bench_gpu.py, each strategy
    python benchmarks/profile_gpu.py --shapes 8192,32000,768 --impl cuda
    python benchmarks/profile_gpu.py --smoke                          toy size, on a CPU where there is no GPU

A unit is one product of hidden states and embedding (2 N V D operations) at the rate at which torch.mm runs it here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from bench_gpu import SHAPES, TOKENS, WORKSPACES
from torch.profiler import ProfilerActivity, profile

import tiedkl
from tiedkl.bench.shapes import MIB, Workload
from tiedkl.bench.steps import inputs
from tiedkl.environment import stamp

STEPS, ROUNDS = 4, 5
SHOWN = 12  # kernels of a step
SMOKE = "48,500,32"


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], None], device: str) -> float:
    """Of a call, which has run before."""
    found = []
    for _ in range(ROUNDS):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def kernels(work: Callable[[], None], device: str) -> list[tuple[float, float, str]]:
    """(seconds, calls, name) a step of every kernel, longest first."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        for _ in range(STEPS):
            work()
        wait(device)
    on_device = device == "cuda"
    rows = [
        ((e.self_device_time_total if on_device else e.self_cpu_time_total) / STEPS / 1e6, e.count / STEPS, e.key)
        for e in record.key_averages()
    ]
    return sorted((row for row in rows if row[0]), reverse=True)


def show(n: int, v: int, d: int, dtype: str, device: str, impl: str, workspace: int | None) -> None:
    """One shape with one budget."""
    workload = Workload(n, v, d, dtype, device, targets="zipf")
    h, w, y = inputs(workload)
    options = {"impl": impl, "workspace_bytes": workspace}
    loss = tiedkl.FusedTiedLoss(**options)

    def step() -> None:
        h.grad = w.grad = None
        loss(h, w, y).backward()

    def product() -> None:
        torch.mm(h.detach(), w.detach().T)

    for work in (step, step, product):
        work()
    unit, took = median_seconds(product, device), median_seconds(step, device)
    rows = kernels(step, device)
    plan = tiedkl.explain(h, w, y, **options)
    budget = "default" if workspace is None else f"{workspace // MIB} MiB"
    print(f"\n{workload.size}, {impl}, workspace {budget}: {took * 1e3:.3f} ms = {took / unit:.2f} units")
    print(str(plan).split("\nnot ")[0])
    print(f"   ms  units  calls  kernel      ({sum(row[0] for row in rows) * 1e3:.3f} ms in all)")
    for seconds, calls, name in rows[:SHOWN]:
        print(f"{seconds * 1e3:7.3f} {seconds / unit:5.2f} {calls:6.1f}  {name[:100]}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="N,V,D", help="instead of the built-in list")
    parser.add_argument("--dtype", default="bfloat16", help="default %(default)s")
    parser.add_argument("--impl", nargs="+", default=["triton", "cuda"], help="backends (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="toy size")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("there is no CUDA device; --smoke runs at toy size on the CPU")
    texts = args.shapes or ([SMOKE] if args.smoke else [f"{TOKENS},{v},{d}" for v, d in SHAPES[:3]])
    impls = ["torch"] if device == "cpu" else args.impl
    print({k: v for k, v in stamp(torch.device(device)).items() if k in ("gpu", "git_commit", "torch", "triton")})
    for text in texts:
        for impl, workspace in itertools.product(impls, (None, WORKSPACES[-1])):
            show(*map(int, text.split(",")), args.dtype, device, impl, workspace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
