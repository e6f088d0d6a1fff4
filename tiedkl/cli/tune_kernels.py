"""`tiedkl tune-kernels`: which tiles of the Triton kernels are fastest on this GPU, as a row of kernels/config.py."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops
from ..problem import Options, Problem

DTYPES = ("bfloat16", "float16", "float32")
PASSES = ("statistics", "gradient", "similarity")
SHARED_BYTES = 227 << 10  # of one block on Hopper; what a device refuses is skipped when it says so
ACCUMULATORS = 128  # registers of a thread for the logits tile, where it can have all that there are
STAGES = {128: (2, 3), 64: (3, 4), 32: (4, 5)}  # of each depth: about as much in flight
BLOCKS = 4  # vocabulary blocks that a measurement of the gradient pass takes


def add_parser(subparsers: Any) -> None:
    """Add `tune-kernels` to the command line."""
    parser = subparsers.add_parser(
        "tune-kernels",
        help="measure tile sizes of the Triton kernels on this GPU",
        description="Measures tiles of the product kernels for one problem and prints the best as "
        "a row of TILES in kernels/config.py. A tile that does not compile, spills registers or gives other results "
        "is skipped. It takes minutes: every tile is compiled. Interrupt it to keep what was found.",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the inputs (default %(default)s)")
    parser.add_argument("--width", type=_positive, default=2048, metavar="D", help="(default %(default)s)")
    parser.add_argument("--vocab", type=_positive, default=128256, metavar="V", help="(default %(default)s)")
    parser.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="(default %(default)s)")
    parser.add_argument(
        "--tile", action="append", type=_tile, metavar="ROWSxCOLSxDEPTHxWARPSxSTAGES[xRESIDENT]",
        help="measure these instead of the built-in candidates; repeatable",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive, default=5, help="per tile (default %(default)s)")
    parser.add_argument("--device", default="cuda", help="torch device (default %(default)s)")
    parser.set_defaults(func=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _tile(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in text.split("x"))
    rows, cols, depth, warps, *_ = (*sizes, 0, 0, 0, 0)
    powers = all(n > 0 and n & (n - 1) == 0 for n in (rows, cols, depth, warps))
    if len(sizes) not in (5, 6) or not powers or min(sizes[4:]) < 1 or min(rows, depth) < 16 or cols < 64:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ROWSxCOLSxDEPTHxWARPSxSTAGES such as 128x128x64x8x4, or with the programs that share a "
            "multiprocessor, 128x128x64x8x3x2: powers of two but for the last, rows and depth at least 16, columns at "
            "least 64"
        )
    return (*sizes, 1)[:6]


def candidates(element_size: int) -> list[tuple[int, ...]]:
    """Tiles whose operands fit shared memory and whose accumulators fit the registers, largest first."""
    found: list[tuple[int, ...]] = []
    for rows, cols, depth, warps in itertools.product((256, 128, 64), (256, 128, 64), STAGES, (4, 8)):
        for stages, resident in itertools.product(STAGES[depth], (1, 2)):
            shared = stages * (rows + cols) * depth * element_size
            registers = rows * cols / (32 * warps)
            fits = resident * shared <= SHARED_BYTES and resident * warps * registers <= 8 * ACCUMULATORS
            if fits and resident * warps >= 8 and 32 <= registers <= ACCUMULATORS:
                found.append((rows, cols, depth, warps, stages, resident))
    return found


class _Recorder:
    """A kernel that remembers what it was compiled to."""

    def __init__(self, kernel: Any):
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.compiled = self.kernel[grid](*args, **kwargs)
            return self.compiled

        return launch

    @property
    def spills(self) -> int:
        return getattr(self.compiled, "n_spills", 0) or 0


KERNELS = {  # of each pass: module and name
    "statistics": (("stats", "token_stats_kernel"),),
    "gradient": (("grads", "gradient_kernel"),),
    "similarity": (("stats", "target_stats_kernel"), ("grads", "similarity_kernel")),
}


class Tuner:
    """One problem, and the time of either pass over it with any tile."""

    def __init__(self, n: int, v: int, d: int, dtype: torch.dtype, device: torch.device):
        from ..kernels import config, grads, launch, stats

        self.config, self.launch, self.modules = config, launch, {"stats": stats, "grads": grads}
        g = torch.Generator().manual_seed(0)
        rank = torch.arange(v, dtype=torch.float64)
        y = torch.multinomial(1 / (rank + 2.7), n, replacement=True, generator=g).to(device)  # as in natural text
        h, w = (torch.randn(k, d, generator=g).to(device, dtype) for k in (n, v))
        self.p = p = Problem(h, w * d**-0.5, y, None, None, Options())
        self.inv_t = 1 / p.options.temperature
        self.key = (launch.architecture(p.h.device), p.h.element_size())
        self.targets = launch.distinct(y, v)
        self.g = torch.full((n,), 1 / n, device=device)
        self.plan = ops.plan_for(p, "triton", None, True)
        self.sums = stats.target_stats(p.teacher, self.targets, self.inv_t)
        self.terms, self.rows = stats.token_stats(p, self.g, self.targets, self.sums, self.inv_t)
        self.n_targets = int(self.targets.count)
        self.s = p.h.new_empty(self.targets.capacity, self.plan.vocab_block, dtype=torch.float32)
        self.similarity()

    def statistics(self) -> Tensor:
        terms, _ = self.modules["stats"].token_stats(self.p, self.g, self.targets, self.sums, self.inv_t)
        found: Tensor = terms[2]  # l1
        return found

    def similarity(self) -> Tensor:
        """Statistics of all similarities, and the first block of them."""
        sums = self.modules["stats"].target_stats(self.p.teacher, self.targets, self.inv_t).sums
        width = min(self.plan.vocab_block, len(self.p.w))
        self.modules["grads"].similarities(self.p.teacher, self.targets, slice(0, width), self.s)
        return torch.cat([sums[1, : self.n_targets].log().float(), self.s[: self.n_targets, width - 1]])

    def gradient(self) -> Tensor:
        """Of some blocks, each with the similarities of the first."""
        grads, p = self.modules["grads"], self.p
        tile = self.launch.launch(p.h, "gradient").tile
        b = self.launch.programs(tile, p.h.device).filling(len(p.y), self.plan.vocab_block)
        grad = p.h.new_empty(len(p.y), b)
        kl = p.h.new_zeros(grads.column_tiles(p.h, b), len(p.y), dtype=torch.float32)
        for begin in range(0, min(len(p.w), BLOCKS * b), b):
            columns = slice(begin, min(begin + b, len(p.w)))
            grads.gradient_block(
                p, self.rows, self.targets.which, self.s, columns, self.inv_t, kl=kl, grad=grad, delta=None,
                terms=self.terms,
            )  # fmt: skip
        return kl.sum(0)

    @contextmanager
    def using(self, which: str, tile: tuple[int, ...]) -> Iterator[list[_Recorder]]:
        """`tile` in the place of the table's, and the kernels of one pass."""
        entry = self.config.TILES.get(self.key)
        kernels = {(self.modules[m], name): getattr(self.modules[m], name) for m, name in KERNELS[which]}
        recorders = {place: _Recorder(kernel) for place, kernel in kernels.items()}
        try:
            self.config.TILES[self.key] = self.config.tiles(*self.key)._replace(**{which: self.config.Tile(*tile)})
            for (module, name), recorder in recorders.items():
                setattr(module, name, recorder)
            yield list(recorders.values())
        finally:
            for (module, name), kernel in kernels.items():
                setattr(module, name, kernel)
            if entry is None:
                del self.config.TILES[self.key]
            else:
                self.config.TILES[self.key] = entry

    def measure(self, which: str, tile: tuple[int, ...], right: Tensor, repeats: int) -> float | str:
        """Seconds (the median), or why the tile is skipped."""
        work = getattr(self, which)
        with self.using(which, tile) as kernels:
            try:
                found = work()
                self.wait()
            except Exception as error:  # out of shared memory or registers, or the compiler gave up
                return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            spills = sum(kernel.spills for kernel in kernels)
            if spills:
                return f"spills {spills} registers"
            off = float((found - right).abs().max())
            if not off <= 1e-3 * float(1 + right.abs().max()):
                return f"gives other results, off by {off:.2g}"
            times = []
            for _ in range(repeats):
                self.wait()
                start = time.perf_counter()
                work()
                self.wait()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.p.h.device.type == "cuda":
            torch.cuda.synchronize(self.p.h.device)


def format_row(key: tuple[str, int], best: dict[str, tuple[int, ...]], gpu: str) -> str:
    """A row of TILES in kernels/config.py."""
    tiles = ", ".join(f"Tile({', '.join(map(str, best[which]))})" for which in PASSES)
    return f'("{key[0]}", {key[1]}): Row({tiles}, "{gpu}", "{date.today().isoformat()}"),'


def run(args: argparse.Namespace) -> int:
    """0 with a row printed, 1 when no tile works, 2 when the kernels cannot run here, 130 when interrupted."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    why = backends.load("triton").unsupported(device, dtype)
    if why is None and device.type == "cuda" and not torch.cuda.is_available():
        why = "torch finds no CUDA device"
    if why:
        print(f"tiedkl tune-kernels: the Triton kernels cannot run on {device}: {why}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    tuner = Tuner(args.tokens, args.vocab, args.width, dtype, device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    tiles = args.tile or candidates(dtype.itemsize)
    print(f"{gpu}, {tuner.key[0]}, {args.dtype}, N={args.tokens} V={args.vocab} D={args.width}, {len(tiles)} tiles")
    best: dict[str, tuple[float, tuple[int, ...]]] = {}
    interrupted = False
    try:
        for which in PASSES:
            right = getattr(tuner, which)()
            for i, tile in enumerate(tiles):
                found = tuner.measure(which, tile, right, args.repeats)
                name = f"{which:<10} {i + 1:3}/{len(tiles)}  {'x'.join(map(str, tile)):<19}"
                if isinstance(found, str):
                    print(f"{name} skipped: {found}"[:140], flush=True)
                    continue
                first = which not in best or found < best[which][0]
                print(f"{name} {found * 1e3:9.3f} ms{'  best so far' if first else ''}", flush=True)
                if first:
                    best[which] = (found, tile)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    if not all(which in best for which in PASSES):
        print("no tile works for " + " and ".join(w for w in PASSES if w not in best), file=sys.stderr)
        return 130 if interrupted else 1
    print("\nfor TILES in kernels/config.py:")
    print(format_row(tuner.key, {which: tile for which, (_, tile) in best.items()}, gpu))
    return 130 if interrupted else 0
