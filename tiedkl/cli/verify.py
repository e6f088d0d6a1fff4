"""`tiedkl verify`: every runnable backend against float64, errors as ratios to eager PyTorch's; exit 1 on a breach.

The cases and the bounds are those of `tiedkl.testing`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..environment import finite, stamp
from ..testing import ALL_DTYPES, Case, Judgement, Ratio, cases, find_case, judge, suite_ratios

ENOUGH = 50  # cases of one dtype and quantity from which a suite's ratio is held to its bound
QUANTITIES = ("loss", "ce", "kl", "dh", "dw", "db", "dt")


def add_parser(subparsers: Any) -> None:
    """Add `verify` to the command line."""
    parser = subparsers.add_parser(
        "verify",
        help="every runnable backend against float64",
        description="Runs several hundred problems through every backend that can run here and through eager PyTorch, "
        "and compares both with float64. A ratio of 1 is an error as large as eager's own.",
    )
    parser.add_argument(
        "--impl", action="append", choices=backends.BACKENDS, help="backend; repeatable; default: all that run"
    )
    parser.add_argument("--dtype", action="append", choices=ALL_DTYPES, help="input dtype; repeatable; default: all")
    parser.add_argument(
        "--cases", type=_count, default=464, metavar="N", help="how many problems (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default %(default)s)")
    parser.add_argument("--case", action="append", type=_case, metavar="ID", help="only this problem; repeatable")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    parser.set_defaults(func=run)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _case(text: str) -> Case:
    try:
        return find_case(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Judge the chosen cases. 0 when every bound holds, 1 on a breach, 2 when nothing can run, 130 when interrupted."""
    device = _device(args.device)
    if device is None:
        return 2
    dtypes = tuple(args.dtype or ALL_DTYPES)
    chosen = args.case or list(cases(args.cases, args.seed, dtypes))
    if args.json is not None and not args.json.absolute().parent.is_dir():
        print(f"tiedkl verify: --json {args.json}: no such directory", file=sys.stderr)
        return 2
    impls = {dtype: _runnable(args.impl, device, dtype) for dtype in {case.dtype for case in chosen}}
    if not any(impls.values()):
        return 2
    done: list[Judgement] = []
    interrupted = False
    progress = _Progress(len(chosen))
    try:
        for case in chosen:
            if impls[case.dtype]:
                done += judge(case, impls[case.dtype], device)
            progress.step()
    except KeyboardInterrupt:
        interrupted = True
    progress.close()

    breaches = [
        f"{j.case.id} ({j.case.kind}) {j.impl} {text}\n    {_command(args, j.impl, j.case.id)}"
        for j in done
        for text in j.breaches
    ]
    ratios = suite_ratios(done)
    if not args.case:
        for (impl, dtype, quantity), ratio in ratios.items():
            if ratio.cases >= ENOUGH and ratio.broken:
                breaches.append(
                    f"suite {impl} {dtype} {quantity}: {ratio.value:.3f} +- {ratio.standard_error:.3f} x eager's RMS\n"
                    f"    {_suite_command(args, impl)}"
                )
    _table(args, done, ratios)
    finished = len({j.case.id for j in done})
    print(
        f"\n{finished} of {len(chosen)} problems, {progress.seconds:.0f} s" + (", interrupted" if interrupted else "")
    )
    worst = _worst(done)
    if worst is not None:
        used, name, j = worst
        print(f"The worst of all: {name} of {j.case.id} ({j.case.kind}), {used:.2f} of its bound:")
        print(f"    {_command(args, j.impl, j.case.id)}")
    print("\n".join(["", "BREACHES", *breaches]) if breaches else "Every bound holds.")
    if args.json is not None:
        report = finite(_report(args, device, done, ratios, breaches, interrupted))
        args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 130 if interrupted else int(bool(breaches))


def _runnable(impls: list[str] | None, device: torch.device, dtype: str) -> list[str]:
    """Backends to judge in `dtype`; says on standard error why others are left out."""
    found = []
    for name in impls or backends.BACKENDS:
        why = backends.load(name).unsupported(device, getattr(torch, dtype))
        if why is None:
            found.append(name)
        else:
            print(f"tiedkl verify: {name} in {dtype} is left out: {why}", file=sys.stderr)
    return found


def _device(text: str) -> torch.device | None:
    """The device of that name; says on standard error why there is none."""
    try:
        device = torch.device(text)
    except RuntimeError:
        print(f"tiedkl verify: --device {text}: expected cpu, cuda or cuda:N", file=sys.stderr)
        return None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        print(f"tiedkl verify: --device {device}: torch finds {found}", file=sys.stderr)
        return None
    return device


def _command(args: argparse.Namespace, impl: str, case: str) -> str:
    """What measures one problem again."""
    device = "" if args.device == "cpu" else f" --device {args.device}"
    return f"tiedkl verify --impl {impl} --case {case}{device}"


def _suite_command(args: argparse.Namespace, impl: str) -> str:
    """What measures one backend's suite again: the same problems, whose numbering depends on all of the dtypes."""
    dtypes = "".join(f" --dtype {dtype}" for dtype in args.dtype or ())
    device = "" if args.device == "cpu" else f" --device {args.device}"
    return f"tiedkl verify --impl {impl}{dtypes} --cases {args.cases} --seed {args.seed}{device}"


def _worst(done: list[Judgement]) -> tuple[float, str, Judgement] | None:
    """The measurement that came nearest to its bound, or went furthest beyond."""
    found = [(m.bound_used, name, j) for j in done for name, m in j.measured.items()]
    return max(found, key=lambda item: item[0], default=None)


def _table(args: argparse.Namespace, done: list[Judgement], ratios: dict[tuple[str, str, str], Ratio]) -> None:
    """One row per backend, dtype and quantity."""
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for j in done:
        for name, m in j.measured.items():
            key = (j.impl, j.case.dtype, name)
            worst[key] = max(worst.get(key, (-1.0, "")), (m.bound_used, j.case.id))
    print(
        "suite: RMS error / eager's RMS error, +- its standard error.  "
        "worst: largest share of its bound that one problem used.\n"
    )
    print(f"{'backend':<10} {'dtype':<9} {'':<5} {'suite':>15} {'worst':>7}  to reproduce the worst")
    order = sorted(worst, key=lambda k: (k[0], ALL_DTYPES.index(k[1]), QUANTITIES.index(k[2])))
    for key in order:
        impl, dtype, name = key
        used, case = worst[key]
        ratio = f"{ratios[key].value:6.3f} +- {ratios[key].standard_error:.3f}" if key in ratios else f"{'-':>15}"
        flag = " BREACH" if used > 1 else ""
        print(f"{impl:<10} {dtype:<9} {name:<5} {ratio} {used:7.2f}  {_command(args, impl, case)}{flag}")


def _report(
    args: argparse.Namespace,
    device: torch.device,
    done: list[Judgement],
    ratios: dict[tuple[str, str, str], Ratio],
    breaches: list[str],
    interrupted: bool,
) -> dict[str, Any]:
    return {
        "tiedkl": __version__,
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "environment": stamp(device),
        "seed": args.seed,
        "interrupted": interrupted,
        "breaches": breaches,
        "suite": [{"impl": i, "dtype": d, "quantity": q, **asdict(ratio)} for (i, d, q), ratio in ratios.items()],
        "cases": [
            {
                "id": j.case.id,
                "kind": j.case.kind,
                "impl": j.impl,
                "command": _command(args, j.impl, j.case.id),
                "quantities": {
                    m.quantity: {"error": m.error, "eager": m.eager_error, "ulp": m.ulp, "bound_used": m.bound_used}
                    for m in j.measured.values()
                },
            }
            for j in done
        ],
    }


class _Progress:
    """A line on a terminal's standard error with the time left; nothing elsewhere."""

    def __init__(self, total: int):
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), 0.0
        self.on = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def step(self) -> None:
        self.done += 1
        if self.on and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            left = self.seconds / self.done * (self.total - self.done)
            print(f"\r{self.done}/{self.total} problems, {left:.0f} s left ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.on:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
