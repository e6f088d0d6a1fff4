"""`tiedkl bench`: memory and throughput of the loss beside every peer that is installed."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import backends
from ..bench import against, shapes, store, table
from ..bench.errors import BenchError
from ..bench.runner import Settings, problems
from ..bench.runner import run as measure

DEFAULT_JSON = "tiedkl-bench.json"
DEFAULT_BUDGET = 100.0  # seconds, of a run that names no shapes: two minutes with what cannot be cut short
BAD_INPUT, INTERRUPTED = 2, 130


def add_parser(subparsers: Any) -> None:
    """Add the command `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="memory and throughput beside every peer",
        description="Times the loss and its gradients, measures their memory and their error against float64, and does "
        "the same with plain PyTorch and with every other library's fused loss that is installed.",
        epilog=f"Heads of models: {', '.join(shapes.HEADS)}. Without --shapes and --sweep a short run that ends within "
        "two minutes.",
    )
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="SHAPE", help="heads of models, NAME or NAME:TOKENS, or N,V,D")
    add("--dtype", action="append", choices=shapes.DTYPES, help="of the inputs; repeatable (default float32)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--impl", action="append", choices=backends.BACKENDS, help="backend of tiedkl; repeatable (default: all)")
    add("--mode", choices=shapes.MODES, default="fwd+bwd", help="what is timed (default %(default)s)")
    add("--loss", choices=shapes.LOSSES, default="cekl", help="ce leaves out KL (default %(default)s)")
    add(
        "--targets",
        default="text",
        metavar="KIND",
        help="text (default), zipf, uniform, or a FILE of text or token ids",
    )
    add("--ignored", type=float, default=0.0, metavar="SHARE", help="of the tokens, such as 0.3 (default 0)")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME",
        help=f"vary one of {', '.join(shapes.SWEEPS)} of every shape, or NAME=VALUE,VALUE,...; repeatable",
    )
    add("--json", type=Path, metavar="FILE", help=f"every figure, kept as it comes (default {DEFAULT_JSON})")
    add("--csv", type=Path, metavar="FILE", help="one line a row")
    add("--plot", type=Path, metavar="DIR", help="pictures as SVG files (needs tiedkl[bench])")
    add("--html", type=Path, metavar="FILE", help="one page with tables and pictures (needs tiedkl[bench])")
    add("--rounds", type=int, default=5, metavar="N", help="times each is timed (default %(default)s)")
    add("--budget-seconds", type=float, metavar="S", help="start nothing that would end later")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own choice)")
    add("--no-compile", action="store_true", help="leave out what torch.compile has to compile first")
    add("--against", type=Path, metavar="FILE", help="an older JSON: exit 1 when a row of tiedkl has become slower")
    add("--margin", type=float, default=against.MARGIN, metavar="X", help="for --against (default %(default)s)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """0 when all went well, 1 for a wrong result or a slow-down, 2 for bad options, 130 when interrupted."""
    try:
        return _run(args)
    except BenchError as error:
        print(f"tiedkl bench: {error}", file=sys.stderr)
        return BAD_INPUT


def _run(args: argparse.Namespace) -> int:
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise BenchError(f"--threads {args.threads}: expected at least 1")
        torch.set_num_threads(args.threads)
    workloads = _workloads(args)
    file = args.json or Path(DEFAULT_JSON)
    older = store.read_json(args.against) if args.against else None
    _check_outputs(args, file)
    budget = args.budget_seconds
    if budget is None:
        budget = math.inf if args.shapes or args.sweep else DEFAULT_BUDGET
    settings = Settings(
        command=shlex.join(["tiedkl", *sys.argv[1:]]),
        impls=args.impl,
        rounds=args.rounds,
        budget_seconds=budget,
        compiled=not args.no_compile,
        json=file,
    )
    # On a terminal the reader watches the counting; in a file the lines would be in the way.
    print(f"Results are kept in {file} as they come: Ctrl-C loses nothing that was measured.\n")
    progress = Progress()

    def show(result: dict[str, Any]) -> None:
        progress.clear()
        print(table.render(result) + "\n", flush=True)

    report = measure(workloads, settings, show=show, say=progress.say)
    progress.clear()
    print(table.LEGEND)
    return finish(report, older, args, file)


def finish(report: dict[str, Any], older: dict[str, Any] | None, args: argparse.Namespace, file: Path) -> int:
    """Write what else was asked for, say what went wrong, and return the exit status."""
    written = [str(file)]
    if args.csv:
        store.write_csv(args.csv, report)
        written.append(str(args.csv))
    if args.plot:
        from ..bench.plots import write_plots

        written += write_plots(args.plot, report)
    if args.html:
        from ..bench.page import render

        store.write(args.html, render(report))
        written.append(str(args.html))
    print("\nwrote " + ", ".join(written))
    for size in report["too_large"]:
        print(f"the inputs of {size} alone do not fit the memory")
    for size in report["left_out"]:
        print(f"no time was left for {size}; --budget-seconds gives more")
    status = 0
    for text in problems(report):
        print(f"tiedkl bench: {text}", file=sys.stderr)
        status = 1
    if older is not None:
        text, slower = against.compare(older, report, args.margin)
        print("\n" + text)
        status = max(status, int(slower))
    if report["interrupted"]:
        print("interrupted: what was measured is kept", file=sys.stderr)
        return INTERRUPTED
    return status


def _workloads(args: argparse.Namespace) -> list[shapes.Workload]:
    """Shapes x dtypes x sweeps. Raises BenchError for what cannot be."""
    import torch

    from ..bench.targets import make_targets

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise BenchError(f"--device {device}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise BenchError(f"--device {device}: torch finds {torch.cuda.device_count() or 'no'} CUDA devices")
    if not 0 <= args.ignored < 1:
        raise BenchError(f"--ignored {args.ignored:g}: expected a share in [0, 1)")
    if args.rounds < 1:
        raise BenchError(f"--rounds {args.rounds}: expected at least 1")
    if args.margin < 0:
        raise BenchError(f"--margin {args.margin:g}: expected a share, such as 0.15")
    names = args.shapes or shapes.DEFAULT[kind][: 1 if args.sweep else None]
    bases = [
        replace(
            shapes.parse_shape(name, device),
            dtype=dtype,
            loss=args.loss,
            mode=args.mode,
            targets=args.targets,
            ignored=args.ignored,
        )
        for name in names
        for dtype in args.dtype or ["bfloat16" if kind == "cuda" else "float32"]
    ]
    sweeps = [shapes.parse_sweep(text) for text in args.sweep]
    found = [w for base in bases for name, values in sweeps for w in shapes.sweep(base, name, values)] or bases
    found = list(dict.fromkeys(found))
    for impl in args.impl or ():
        reasons = {backends.load(impl).unsupported(torch.device(device), w.torch_dtype) for w in found}
        if None not in reasons:
            raise BenchError(f"--impl {impl} cannot run: {reasons.pop()}")
    for w in found:
        make_targets(w)  # a bad file is found before the first measurement
    return found


def _check_outputs(args: argparse.Namespace, file: Path) -> None:
    """What cannot be written, and what lacks a library, is found before the first measurement."""
    for option, path in (("--json", file), ("--csv", args.csv), ("--html", args.html)):
        if path is not None and not path.absolute().parent.is_dir():
            raise BenchError(f"{option} {path}: no such directory")
        if path is not None and path.is_dir():
            raise BenchError(f"{option} {path}: is a directory")
    if args.plot:
        try:
            args.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"--plot {args.plot}: {error.strerror}") from None
    if args.plot or args.html:
        import matplotlib  # noqa: F401  the command line says which extra has it
    if args.html:
        import jinja2  # noqa: F401


class Progress:
    """A line on a terminal's standard error; nothing elsewhere."""

    def __init__(self) -> None:
        self.on, self.start = sys.stderr.isatty(), time.monotonic()

    def say(self, text: str) -> None:
        """Replace the line."""
        if self.on:
            seconds = time.monotonic() - self.start
            print(f"\r\033[K{seconds:4.0f} s  {text[:100]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the line."""
        if self.on:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
