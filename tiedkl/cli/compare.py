"""`tiedkl compare`: train baseline, +AL, +RE, +REAL, and controls, on a text; report which is best, at what cost."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..compare.per_variant import read_configs
from ..compare.settings import CONTROLS, MODELS, OWN, PAPER_VARIANTS, VARIANTS, CompareError, Settings, parse_variants

DIVERGED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DATA = (
    "directory with *.train.txt, *.valid.txt, *.test.txt, taken as already tokenised (split at white space only); or "
    "one text file, which is lower-cased and split at punctuation"
)


def add_option(
    parser: argparse.ArgumentParser,
    default: dict[str, Any],
    flag: str,
    text: str,
    kind: Callable[[str], Any] = str,
    metavar: str | None = None,
    shown: str | None = None,
    **more: Any,
) -> None:
    """An option whose default is that of the setting it names; `shown` says it in words where it depends."""
    value = default[flag.lstrip("-").replace("-", "_")]
    text = f"{text} (default: {shown or value})"
    parser.add_argument(flag, type=kind, metavar=metavar, default=value, help=text, **more)


class Given(argparse.Action):
    """Stores an option and remembers in `given` that the user gave it: it comes before the file of --config.

    With nargs=0 it is a flag that stores `const`.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.given |= {self.dest}


def overrides(text: str) -> Any:
    """The value of --overrides; `Settings` says what is wrong with what it holds."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `compare`; every default comes from `Settings`."""
    default = {field.name: field.default for field in dataclasses.fields(Settings)}
    parser = subparsers.add_parser(
        "compare",
        help="A/B test on your own text: baseline, augmented loss, reused embedding, both",
        description="Trains variants of a small language model on the same text and reports perplexity, "
        "parameters, memory, speed and how sure the difference is. A run that was stopped is continued by the same "
        "command, without --fresh.",
    )

    option = functools.partial(add_option, parser, default, action=Given)
    option("--data", DATA, metavar="PATH", shown="Python's help texts")
    option("--out", "directory for checkpoints and reports", metavar="DIR")
    parser.add_argument(
        "--model", choices=MODELS, default=default["model"], action=Given, help="network (default: %(default)s)"
    )
    parser.add_argument(
        "--variants",
        action=Given,
        default=",".join(PAPER_VARIANTS),
        metavar="LIST",
        help=f"some of {','.join(VARIANTS)}; {' and '.join(CONTROLS.values())}, the baseline and +RE with label "
        "smoothing, are controls of the augmented loss (default: %(default)s)",
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
    option("--embedding-range", "an LSTM's embedding starts uniform between this and its negative", float, "X")
    option("--temperature", "temperature of the augmented loss", float, "X")
    option("--gamma", "weight of the augmented loss, in units of the temperature", float, "X")
    option("--label-smoothing", f"of {' and '.join(CONTROLS.values())}", float, "X")
    option("--impl", "backend of the loss", metavar="NAME")
    option("--threads", "CPU threads", int, "N", "PyTorch's own choice")
    option("--device", "cpu or cuda", metavar="NAME")
    option("--seed", "first random seed", int, "N")
    option("--seeds", "train every variant with so many seeds; more can be added later", int, "N", "1")
    option("--budget", "fit seeds, epochs and, if need be, the text into a time such as 90s, 15m, 2h", metavar="TIME",
           shown="none")  # fmt: skip
    option("--price-per-hour", "what this machine costs an hour, for the cost of a million tokens", float, "X", "none")
    option("--tokenizer", "a Hugging Face tokenizer.json, instead of words", metavar="FILE", shown="none")
    option("--vocab-size", "largest vocabulary", int, "N")
    option("--min-count", "rarer words become <unk>", int, "N", "2, or 1 where the text has <unk> in it")
    option("--max-tokens", "use only so many training tokens, and a tenth of it for each other split", int, "N", "all")
    option("--tuned-for", "the variant that the settings were searched for, which the report then says", metavar="NAME",
           shown="what --config says")  # fmt: skip
    option("--checkpoint-every", "seconds between checkpoints", float, "S")
    flag = functools.partial(parser.add_argument, action=Given, nargs=0)
    flag("--target-grad", const=True, default=False,
         help="let the gradient of the augmented loss flow through its similarity target too")  # fmt: skip
    flag("--no-target-grad", dest="target_grad", const=False, default=False,
         help="no such gradient, whatever a file of --config says (default)")  # fmt: skip
    flag("--no-tied-bias", dest="tied_bias", const=False, default=True,
         help="no output bias in +RE and +REAL, as in the paper; an LSTM's +REAL then needs --target-grad")  # fmt: skip
    parser.add_argument("--config", action="append", default=[], metavar="FILE",
                        help="JSON with settings, such as best.json of `tiedkl tune`; VARIANT=FILE, once for each, for "
                        f"{', '.join(OWN)} of one variant; options given here come first")  # fmt: skip
    option("--overrides", "settings of single variants as JSON, instead of --config VARIANT=FILE", overrides, "JSON",
           "none")  # fmt: skip
    option("--reuse", "directory of another comparison, whose finished runs are taken over where every setting they "
           "use is the same: baseline and +RE, when only --gamma differs", metavar="DIR", shown="none")  # fmt: skip
    flag("--fresh", const=True, default=False, help="discard an earlier run in --out and start again")
    flag("--quiet", const=True, default=False, help="no progress, only the result")
    parser.set_defaults(func=run, given=frozenset())


def run(args: argparse.Namespace) -> int:
    """Run the comparison: 0 when complete, 1 when a training diverged, 2 for bad input, 130 after Ctrl-C.

    All but 2 leave reports of what was done.
    """
    from ..compare.runner import Interrupted, compare, report_paths
    from ..compare.tables import table
    from ..compare.verdict import diverged

    names = {field.name for field in dataclasses.fields(Settings)}
    status = 0
    try:
        values = {name: value for name, value in vars(args).items() if name in names}
        values["variants"] = parse_variants(args.variants)
        values |= read_configs(args.config, args.given)
        settings = Settings(**values | {"variants": tuple(values["variants"])})
        for line in () if settings.quiet else notes(args.given, settings):
            print(f"tiedkl compare: {line}", file=sys.stderr)
        with ctrl_c() as pressed:
            try:
                report = compare(settings, should_stop=lambda: bool(pressed))
            except Interrupted as stopped:
                report, status = stopped.report, INTERRUPTED
    except CompareError as error:
        print(f"tiedkl compare: {error}", file=sys.stderr)
        return BAD_INPUT
    if not status and diverged(report["variants"]):
        status = DIVERGED
    if report["plan"]:
        print(report["plan"]["text"], "", sep="\n")
    html, *others = report_paths(settings.out)
    files = ", ".join([str(html), *(path.name for path in others)])
    print(table(report), "", *report["verdict"], "", f"report: {files}", sep="\n")
    return status


def notes(given: Collection[str], settings: Settings) -> Iterator[str]:
    """What to know before the training: options that none of the variants uses, and what is known not to work."""
    from ..compare.verdict import stuck_target

    yield from without_effect(given, settings)
    if "real" in settings.variants:
        yield from stuck_target(dataclasses.asdict(settings))


def without_effect(given: Collection[str], settings: Settings) -> Iterator[str]:
    """A line for each option the user gave that none of the variants compared does anything with."""
    chosen = [VARIANTS[name] for name in settings.variants]
    for name in sorted(given):
        if all(name in variant.unused for variant in chosen):
            some = ", ".join(v.name for v in VARIANTS.values() if name not in v.unused)
            flag = "--" + name.replace("_", "-")
            yield f"{flag} has no effect on {','.join(settings.variants)}; it is of {some}"


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
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
