"""`tiedkl tune`: search gamma, temperature, learning rate and dropout on a text, and check the winner."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from ..compare.settings import CONTROLS, MODELS, VARIANTS, CompareError
from ..tune.settings import ON_REQUEST, PRUNERS, RANGES, TRANSFORMER_LR, TuneSettings
from .compare import BAD_INPUT, DATA, INTERRUPTED, add_option, ctrl_c


def _searched() -> str:
    """The ranges of a search, in words."""
    ranges = ", ".join(f"{name}={low:g}:{high:g}" for name, (low, high, _) in RANGES.items() if name not in ON_REQUEST)
    ranges += ", of these what the variant has"
    low, high, _ = TRANSFORMER_LR
    more = ", ".join(f"{name}={RANGES[name].low:g}:{RANGES[name].high:g}" for name in ON_REQUEST)
    return f"{ranges}; lr={low:g}:{high:g} for transformer; not {more}, for lstm"


OPTIONS = (
    ("--data", DATA, str, "PATH", "Python's help texts"),
    ("--out", "directory for the study and the result", str, "DIR", None),
    ("--search", f"some of {', '.join(RANGES)}, each with =LOW:HIGH or without", str, "LIST", _searched()),
    ("--trials", "trials in all, those of earlier runs included", int, "N", None),
    ("--timeout", "no training begins after this time, and those under way stop: 90s, 10m, 2h", str, "TIME", "none"),
    ("--jobs", "processes that share the study", int, "N", None),
    ("--check", "other seeds to compare the winner with the defaults on", int, "N", None),
    ("--epochs", "passes over the training text in a trial", int, "N", None),
    ("--max-tokens", "training tokens of a trial, and a tenth of it for each other split; the vocabulary is "
     "that of the whole text", int, "N", None),
    ("--hidden", "units a layer, and width of the embedding", int, "N", None),
    ("--layers", "layers", int, "N", None),
    ("--batch", "sequences trained side by side", int, "N", "by the size of the text"),
    ("--bptt", "time steps of back-propagation", int, "N", None),
    ("--lr", "default learning rate", float, "X", "1 for lstm, 0.001 for transformer"),
    ("--dropout", "default dropout", float, "P", None),
    ("--embedding-range", "default initial range of an LSTM's embedding", float, "X", None),
    ("--temperature", "default temperature", float, "X", None),
    ("--gamma", "default gamma", float, "X", None),
    ("--label-smoothing", f"default label smoothing of {' and '.join(CONTROLS.values())}", float, "X", None),
    ("--impl", "backend of the loss", str, "NAME", None),
    ("--threads", "CPU threads of a process", int, "N", "PyTorch's choice, shared between the jobs"),
    ("--device", "cpu or cuda", str, "NAME", None),
    ("--seed", "seed of the search and of every trial", int, "N", None),
    ("--vocab-size", "largest vocabulary", int, "N", None),
    ("--min-count", "rarer words become <unk>", int, "N", "2, or 1 where the text has <unk> in it"),
    ("--tokenizer", "a Hugging Face tokenizer.json, instead of words", str, "FILE", "none"),
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `tune`; every default comes from `TuneSettings`."""
    default = {field.name: field.default for field in dataclasses.fields(TuneSettings)}
    parser = subparsers.add_parser(
        "tune",
        help="search gamma, temperature, learning rate and dropout on your own text",
        description="Searches settings of one variant with Optuna (TPE, hopeless trials are pruned) on a slice of the "
        "text, a few epochs a trial. The first trial is the defaults. At the end the winner is compared with them "
        "with other seeds on the test split. A search that was stopped is continued by the same command, "
        "without --fresh.",
    )
    for flag, text, kind, metavar, shown in OPTIONS:
        add_option(parser, default, flag, text, kind, metavar, shown)
    for flag, choices, text in (
        ("--variant", VARIANTS, "what is trained"),
        ("--model", MODELS, "network"),
        ("--pruner", PRUNERS, "what ends hopeless trials"),
    ):
        value = default[flag.lstrip("-")]
        parser.add_argument(flag, choices=tuple(choices), default=value, help=f"{text} (default: {value})")
    through = "let the gradient of the augmented loss flow through its similarity target too"
    parser.add_argument("--target-grad", action="store_true", help=through)
    parser.add_argument("--fresh", action="store_true", help="discard an earlier study in --out and start again")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the search: 0 when done, 2 for bad input, 130 after Ctrl-C (best.json then holds the best so far)."""
    from ..compare.tables import aligned
    from ..tune.report import FAIR, table
    from ..tune.search import Interrupted, tune

    names = {field.name for field in dataclasses.fields(TuneSettings)}
    status = 0
    try:
        settings = TuneSettings(**{name: value for name, value in vars(args).items() if name in names})
        with ctrl_c() as pressed:
            try:
                found = tune(settings, say=nothing if args.quiet else say, should_stop=lambda: bool(pressed))
            except Interrupted as stopped:
                found, status = stopped.result, INTERRUPTED
    except CompareError as error:
        print(f"tiedkl tune: {error}", file=sys.stderr)
        return BAD_INPUT
    best = Path(settings.out).expanduser() / "best.json"
    print(aligned(*table(found)), "", *found["verdict"], "", f"best: {best}, tune.md", sep="\n")
    use, *fair = found["commands"]
    print(f"use:  {use}", FAIR, *(f"      {command}" for command in fair), sep="\n")
    return status


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def nothing(_: str) -> None:
    """No progress."""
