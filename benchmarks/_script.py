"""What bench_cpu.py and bench_gpu.py share: their options, and a run of tiedkl.bench that keeps its results."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiedkl.bench import against, store, table
from tiedkl.bench.errors import BenchError
from tiedkl.bench.runner import Settings, problems
from tiedkl.bench.runner import run as measure
from tiedkl.bench.shapes import DTYPES, Workload


def arguments(doc: str | None, result: Path, *, rounds: int, dtype: str) -> argparse.Namespace:
    """The options. `json` is where the result goes, `shapes` a list of (N, V, D, dtype) or None."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="N,V,D", help="instead of the built-in list")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="for --shapes; default %(default)s")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start nothing that would end later")
    parser.add_argument(
        "--out", type=Path, help="folder for the files; default benchmarks/results/, with --against build/bench"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile compiles")
    parser.add_argument("--smoke", action="store_true", help="toy size")
    parser.add_argument(
        "--against", type=Path, nargs="?", const=result, metavar="JSON", help="an older result; default the committed"
    )
    parser.add_argument("--margin", type=float, default=against.MARGIN, help="for --against; default %(default)s")
    args = parser.parse_args()
    try:
        sizes = [tuple(map(int, text.split(","))) for text in args.shapes or ()]
    except ValueError:
        sizes = [()]
    if any(len(size) != 3 or min(size) < 1 for size in sizes):
        parser.error(f"argument --shapes: expected N,V,D, got {' '.join(args.shapes)}")
    args.shapes = [(*size, args.dtype) for size in sizes] or None
    args.rounds = 1 if args.smoke else max(1, args.rounds)
    # A comparison with the committed result leaves that as it is.
    default = Path(__file__).resolve().parents[1] / "build" / "bench" if args.against else result.parent
    args.folder, args.name, args.error = args.out or default, result.name, parser.error
    args.keep = args.out is not None or not args.smoke
    return args


def run(args: argparse.Namespace, workloads: Sequence[Workload], **options: Any) -> int:
    """Measure, show and keep; 1 for a wrong result, a failure of tiedkl or eager, a slow-down, or no result at all."""
    if args.keep:
        args.folder.mkdir(parents=True, exist_ok=True)
        return _run(args, workloads, args.folder, options)
    with tempfile.TemporaryDirectory() as folder:
        return _run(args, workloads, Path(folder), options)


def _run(args: argparse.Namespace, workloads: Sequence[Workload], folder: Path, options: dict[str, Any]) -> int:
    older = None
    if args.against:  # read first: it may be the file that is written
        try:
            older = store.read_json(args.against)
        except BenchError as error:
            args.error(str(error))
    file = folder / args.name
    settings = Settings(
        command=shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        rounds=args.rounds,
        budget_seconds=args.budget_seconds,
        compiled=not (args.smoke or args.no_compile),
        fresh_caches=False,  # what the tests compiled before need not be compiled again
        json=file,
        **options,
    )
    report = measure(workloads, settings, show=lambda result: print(table.render(result) + "\n", flush=True))
    store.write_csv(file.with_suffix(".csv"), report)
    write_page(file.with_suffix(".html"), report)
    print(table.LEGEND)
    if args.keep:
        print(f"\nwrote {folder}")
    for size in report["too_large"]:
        print(f"the inputs of {size} alone do not fit the memory", file=sys.stderr)
    for size in report["left_out"]:
        print(f"out of time before {size}", file=sys.stderr)
    if report["interrupted"]:
        print("interrupted: what was measured is kept", file=sys.stderr)
    wrong = problems(report)
    for text in wrong:
        print(f"WRONG: {text}", file=sys.stderr)
    slower = False
    if older is not None:
        text, slower = against.compare(older, report, args.margin)
        print("\n" + text)
    measured = any("seconds" in row for result in report["results"] for row in result["rows"].values())
    if not measured:
        print("nothing was measured", file=sys.stderr)
    return int(bool(wrong) or slower or not measured)


def write_page(file: Path, report: dict[str, Any]) -> None:
    """The page, where matplotlib and jinja2 are installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"no {file.name}: {error}", file=sys.stderr)
        return
    from tiedkl.bench.page import render

    store.write(file, render(report))
