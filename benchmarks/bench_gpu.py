"""The GPU figures: tiedkl's backends and every peer, forward and backward.

    python benchmarks/bench_gpu.py --out DIR          every shape; table, and in DIR JSON, CSV and a page
    python benchmarks/bench_gpu.py --shapes 8192,32000,768 --dtype float16 --rounds 15
    python benchmarks/bench_gpu.py --smoke            toy size, on a CPU where there is no GPU

Steps are timed with CUDA events in interleaved rounds, the L2 cache emptied before each. What does not fit is a row
that says so. The JSON is written as the rows come: a run may be interrupted, and --budget-seconds stops it in time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _script import arguments, run

from tiedkl.bench.shapes import MIB, Workload

# V, D; what says most first, should the time run out.
SHAPES = (
    (32000, 768), (128256, 2048), (256000, 4096), (256000, 768), (32000, 4096), (32000, 2048), (128256, 768),
    (128256, 4096), (256000, 2048),
)  # fmt: skip
SMOKE = ((48, 500, 32, "float32"), (40, 300, 24, "bfloat16"))
TOKENS = 8192
EAGER_BYTES = 40  # of eager CE + KL for each logit
WORKSPACES = (32 * MIB, 512 * MIB, 4096 * MIB)
TARGETS = "zipf"
LONG_SECONDS = 4.0  # of one row at one shape, after which it is not timed again


def shapes(dtype: str) -> list[tuple[int, int, int, str]]:
    """Half the tokens where eager would not fit."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return [(TOKENS if EAGER_BYTES * TOKENS * v < memory else TOKENS // 2, v, d, dtype) for v, d in SHAPES]


def main() -> int:
    args = arguments(__doc__, Path(__file__).parent / "results" / "gpu" / "bench_gpu.json", rounds=9, dtype="bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        args.error("there is no CUDA device; --smoke runs at toy size on the CPU")
    chosen = SMOKE if args.smoke else args.shapes or shapes(args.dtype)
    workloads = [Workload(n, v, d, dtype, device, targets=TARGETS) for n, v, d, dtype in chosen]
    return run(args, workloads, workspaces=WORKSPACES, graph=True, long_seconds=LONG_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
