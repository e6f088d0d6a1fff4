"""The `tiedkl` command line.

A command is a module here, named like the command with `_` for `-`, with two functions:

    add_parser(subparsers) -> None     adds its parser and sets `func=run`
    run(args) -> int                   does the work and returns the exit status

It is imported when it is asked for: `tiedkl --help` stays quick, and a command may need an optional extra.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tiedkl import __version__

COMMANDS = {
    "doctor": "what is installed, which backends can run here and why not the others",
    "verify": "every runnable backend against float64; exit 1 when one breaks its bound",
    "bench": "memory and throughput beside eager, torch.compile and every peer that is installed",
    "tune-kernels": "measure tile sizes of the Triton kernels on this GPU",
    "compare": "train baseline, +AL, +RE and +REAL on a text and report the difference",
    "tune": "search gamma, temperature, learning rate and dropout on a text",
}
# What a command imports beyond tiedkl's own dependencies; the extra that brings it has the command's name.
EXTRAS = {"compare": ("tqdm", "matplotlib", "jinja2"), "tune": ("optuna",), "bench": ("matplotlib", "jinja2")}
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13  # as a shell reports SIGINT and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; `argv` defaults to the process's arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        status = _run(argv, command)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit: let that go nowhere instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if command is None or missing not in EXTRAS.get(command, ()):
            raise
        print(
            f"tiedkl {command} needs {missing}, which is not installed: pip install 'tiedkl[{command}]'",
            file=sys.stderr,
        )
        return 1


def _run(argv: list[str], command: str | None) -> int:
    parser = argparse.ArgumentParser(
        prog="tiedkl", description="Fused cross entropy + KL loss for models with tied embeddings."
    )
    parser.add_argument("--version", action="version", version=f"tiedkl {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f".{name.replace('-', '_')}", __name__).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    args = parser.parse_args(argv)
    return int(args.func(args))
