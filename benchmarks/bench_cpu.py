"""The CPU figures of the README: tiedkl's backends and every peer, at the shapes that docs/design.md talks about.

    python benchmarks/bench_cpu.py              every shape; table on the terminal, JSON under benchmarks/results/cpu/
    python benchmarks/bench_cpu.py --against    and beside the committed result: exit 1 when something became slower
    python benchmarks/bench_cpu.py --shapes 64,1000,64 --dtype bfloat16 --rounds 9
    python benchmarks/bench_cpu.py --smoke      toy size, for continuous integration; keeps nothing

`python benchmarks/readme_tables.py` puts the figures into the README. Other shapes, sweeps, pages: `tiedkl bench`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _script import arguments, run

from tiedkl.bench.shapes import MIB, Workload

SHAPES = (
    (64, 1000, 64, "float32"),
    (256, 5000, 128, "float32"),
    (700, 10000, 200, "float32"),
    (8192, 10000, 200, "float32"),
    (2048, 32000, 512, "float32"),
    (2048, 50257, 768, "float32"),
    (1024, 50257, 768, "bfloat16"),
)
SMOKE = ((48, 500, 32, "float32"), (40, 300, 24, "bfloat16"))
STRICT_BYTES = 8 * MIB
TARGETS = "zipf"
LONG_SECONDS = 120.0  # of one row at one shape, after which it is not timed again


def main() -> int:
    args = arguments(__doc__, Path(__file__).parent / "results" / "cpu" / "bench_cpu.json", rounds=5, dtype="float32")
    workloads = [Workload(n, v, d, dtype, targets=TARGETS) for n, v, d, dtype in args.shapes or SHAPES]
    if args.smoke:
        workloads = [Workload(n, v, d, dtype, targets=TARGETS) for n, v, d, dtype in SMOKE]
    return run(args, workloads, workspaces=(STRICT_BYTES,), long_seconds=LONG_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
