"""`tiedkl compare`: train baseline, +AL, +RE and +REAL on a text and report which is best, and at what cost."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..compare.settings import MODELS, VARIANTS, CompareError, Settings, parse_variants

BAD_INPUT, INTERRUPTED = 2, 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `compare`; every default comes from `Settings`."""
    default = {field.name: field.default for field in dataclasses.fields(Settings)}
    parser = subparsers.add_parser(
        "compare",
        help="A/B test on your own text: baseline, augmented loss, reused embedding, both",
        description="Trains four variants of a small language model on the same text and reports perplexity, "
        "parameters, memory and speed. A run that was stopped is continued by the same command.",
    )

    def option(flag: str, text: str, kind: type = str, metavar: str | None = None, shown: str | None = None) -> None:
        value = default[flag.lstrip("-").replace("-", "_")]
        parser.add_argument(flag, type=kind, metavar=metavar, default=value, help=f"{text} (default: {shown or value})")

    data = "directory with *.train.txt, *.valid.txt, *.test.txt; or one text file"
    option("--data", data, metavar="PATH", shown="Python's help texts")
    option("--out", "directory for checkpoints and reports", metavar="DIR")
    parser.add_argument("--model", choices=MODELS, default=default["model"], help="network (default: %(default)s)")
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), metavar="LIST", help="some of %(default)s (default: all)"
    )
    option("--epochs", "passes over the training text", int, "N", "by the size of the text")
    option("--hidden", "units a layer, and width of the embedding", int, "N")
    option("--layers", "layers", int, "N")
    option("--batch", "sequences trained side by side", int, "N", "by the size of the text")
    option("--bptt", "time steps of back-propagation", int, "N")
    option("--lr", "learning rate", float, "X", "1 for lstm, 0.001 for transformer")
    option("--lr-decay", "factor on the learning rate an epoch", float, "X")
    option("--decay-after", "first epochs without decay", int, "N", "by the size of the text")
    option("--clip", "largest global gradient norm", float, "X")
    option("--dropout", "probability of dropping a unit", float, "P")
    option("--temperature", "temperature of the augmented loss", float, "X")
    option("--gamma", "weight of the augmented loss, in units of the temperature", float, "X")
    option("--impl", "backend of the loss", metavar="NAME")
    option("--threads", "CPU threads", int, "N", "PyTorch's own choice")
    option("--device", "cpu or cuda", metavar="NAME")
    option("--seed", "seed of all random numbers", int, "N")
    option("--vocab-size", "largest vocabulary", int, "N")
    option("--min-count", "rarer words become <unk>", int, "N")
    option("--max-tokens", "use only so many training tokens, and a tenth of it for each other split", int, "N", "all")
    option("--checkpoint-every", "seconds between checkpoints", float, "S")
    parser.add_argument(
        "--no-tied-bias",
        dest="tied_bias",
        action="store_false",
        help="no output bias in +RE and +REAL, as in the paper",
    )
    parser.add_argument("--fresh", action="store_true", help="discard an earlier run in --out and start again")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the comparison: 0 when complete, 2 for bad input, 130 after Ctrl-C (the reports then show what was done)."""
    from ..compare.report import table
    from ..compare.runner import Interrupted, compare, report_paths

    names = {field.name for field in dataclasses.fields(Settings)}
    status = 0
    try:
        values = {name: value for name, value in vars(args).items() if name in names}
        settings = Settings(**values | {"variants": parse_variants(args.variants)})
        with _ctrl_c() as pressed:
            try:
                report = compare(settings, should_stop=lambda: bool(pressed))
            except Interrupted as stopped:
                report, status = stopped.report, INTERRUPTED
    except CompareError as error:
        print(f"tiedkl compare: {error}", file=sys.stderr)
        return BAD_INPUT
    html, json = report_paths(settings.out)
    print(table(report), "", *report["verdict"], "", f"report: {html}", f"data:   {json}", sep="\n")
    return status


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, for the training loop to see between two steps; a second Ctrl-C stops at once."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
