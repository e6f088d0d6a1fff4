"""What a search is asked to do: settings, ranges, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..compare.settings import INITIAL_RANGE, VARIANTS, CompareError, Settings, parse_duration

PRUNERS = ("median", "hyperband", "none")


class Range(NamedTuple):
    """low..high of one setting, on a logarithmic scale or not."""

    low: float
    high: float
    log: bool


# Around what the paper and its reimplementations use, gamma higher: see "The defaults" in docs/compare.md. A learning
# rate is that of the optimiser of each model.
RANGES = {
    "gamma": Range(0.1, 16.0, True),
    "temperature": Range(5.0, 40.0, True),
    "lr": Range(0.5, 2.0, True),
    "dropout": Range(0.0, 0.6, False),
    "embedding_range": Range(0.05, 2.0, True),
    "label_smoothing": Range(0.02, 0.4, True),
}
ON_REQUEST = ("embedding_range",)  # searched only when they are named; of an LSTM
TRANSFORMER_LR = Range(3e-4, 3e-3, True)


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a search. Those of a training mean what they mean in `tiedkl.compare.Settings`."""

    data: str | None = None
    out: str = "tiedkl-tune"
    search: str | None = None  # "gamma,temperature,lr=0.5:2"; None: all that the variant has
    variant: str = "real"
    trials: int = 20  # in all, those of earlier runs included
    timeout: str | None = None  # such as "10m"; no training begins after it, and those under way stop
    jobs: int = 1  # processes
    pruner: str = "median"
    check: int = 3  # other seeds to compare the winner with the defaults on, 0 for none
    model: str = "lstm"
    hidden: int = 200
    layers: int = 2
    batch: int | None = None
    bptt: int = 35
    epochs: int = 4
    max_tokens: int = 20_000  # of the training split
    lr: float | None = None  # this and the next five: the defaults that the search has to beat
    dropout: float = 0.3
    embedding_range: float = INITIAL_RANGE
    temperature: float = 20.0
    gamma: float = 0.5
    label_smoothing: float = 0.1
    target_grad: bool = False  # of all trials
    impl: str = "auto"
    threads: int | None = None
    device: str = "cpu"
    seed: int = 1
    vocab_size: int = 10_000
    min_count: int | None = None
    tokenizer: str | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise CompareError(f"unknown variant {self.variant}: expected one of {', '.join(VARIANTS)}")
        if self.pruner not in PRUNERS:
            raise CompareError(f"unknown pruner {self.pruner}: expected one of {', '.join(PRUNERS)}")
        for name, low in (("trials", 1), ("jobs", 1), ("check", 0), ("epochs", 1)):
            if getattr(self, name) < low:
                raise CompareError(f"{name}={getattr(self, name)}: expected at least {low}")
        if self.timeout is not None:
            parse_duration(self.timeout)
        self.compared()
        self.ranges()

    def compared(self) -> Settings:
        """The settings of a trial with the defaults."""
        shared = (
            "data", "model", "hidden", "layers", "batch", "bptt", "epochs", "max_tokens", "lr", "dropout",
            "embedding_range", "temperature", "gamma", "target_grad", "label_smoothing", "impl", "threads", "device",
            "seed", "vocab_size", "min_count", "tokenizer",
        )  # fmt: skip
        # the rate falls after as large a part of the epochs as in `tiedkl compare` on a small text, 4 of 7
        decay_after = max(1, round(self.epochs * 4 / 7))
        return Settings(**{name: getattr(self, name) for name in shared}, decay_after=decay_after)

    def defaults(self) -> dict[str, float]:
        """What the first trial uses for each setting that is searched."""
        config: dict[str, Any] = self.compared().resolved(self.max_tokens)
        return {name: float(config[name]) for name in self.ranges()}

    def ranges(self) -> dict[str, Range]:
        """The settings to search and their ranges. Raises CompareError for a range that makes no sense.

        A range has to hold the default: the first trial is the defaults, so that a gain over them is a fact.
        """
        variant = VARIANTS[self.variant]
        known = dict(RANGES)
        if self.model == "transformer":
            known = {name: r for name, r in known.items() if name not in ON_REQUEST} | {"lr": TRANSFORMER_LR}
        usual = (name for name in known if name not in (*ON_REQUEST, *variant.unused))
        text = self.search if self.search is not None else ",".join(usual)
        found: dict[str, Range] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, ends = part.partition("=")
            if name not in known:
                raise CompareError(
                    f"search {part}: expected some of {', '.join(known)}, each with =LOW:HIGH or without"
                )
            if name in variant.unused:
                what = "label smoothing" if name == "label_smoothing" else "augmented loss"
                raise CompareError(f"search {name}: variant {self.variant} has no {what}")
            found[name] = _range(name, ends, known[name].log) if ends else known[name]
        if not found:
            raise CompareError(f"search {text!r}: nothing to search; expected some of {', '.join(known)}")
        config = self.compared().resolved(self.max_tokens)
        for name, (low, high, _) in found.items():
            if not low <= config[name] <= high:
                raise CompareError(
                    f"search {name}={low:g}:{high:g} leaves out the default {config[name]:g}, the first trial; "
                    f"widen the range, or change the default with --{name.replace('_', '-')}"
                )
        return found


def _range(name: str, ends: str, log: bool) -> Range:
    try:
        low, high = map(float, ends.split(":"))
    except ValueError:
        raise CompareError(f"search {name}={ends}: expected LOW:HIGH, two numbers") from None
    top = 1.0 if name in ("dropout", "label_smoothing") else float("inf")
    if not (0 <= low < high < top) or (log and low == 0):
        raise CompareError(f"search {name}={ends}: expected 0 {'<' if log else '<='} LOW < HIGH < {top:g}")
    return Range(low, high, log)
