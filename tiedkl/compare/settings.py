"""What a comparison is asked to do: the settings, their defaults and their checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MODELS = ("lstm", "transformer")


class CompareError(ValueError):
    """A request that cannot be carried out; the message is one line for the user."""


@dataclass(frozen=True)
class Variant:
    """One arm of the test."""

    name: str
    label: str
    augmented: bool  # the loss adds alpha * KL to the cross-entropy
    tied: bool  # the output layer is the input embedding
    summary: str


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "baseline",
            "baseline",
            False,
            False,
            "Two separate word matrices, one for reading and one for predicting, trained with plain cross-entropy.",
        ),
        Variant(
            "al",
            "+AL",
            True,
            False,
            "Augmented loss: as the baseline, but the model also earns credit for words that are close in meaning to "
            "the right one, measured with the input embedding.",
        ),
        Variant(
            "re",
            "+RE",
            False,
            True,
            "Reused embedding: one word matrix does both jobs, which saves parameters. Plain cross-entropy.",
        ),
        Variant("real", "+REAL", True, True, "Both together: one word matrix and the augmented loss."),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison; None means a default that depends on the model or the corpus (see `resolved`)."""

    data: str | None = None  # directory, file, or None for the text that ships with Python
    out: str = "tiedkl-compare"
    model: str = "lstm"
    variants: tuple[str, ...] = tuple(VARIANTS)
    epochs: int | None = None
    hidden: int = 200  # units, and the width of the embedding
    layers: int = 2
    batch: int | None = None  # sequences
    bptt: int = 35  # time steps
    lr: float | None = None
    lr_decay: float = 0.8  # factor an epoch
    decay_after: int | None = None  # first epochs at the full rate
    clip: float = 5.0  # global gradient norm
    dropout: float = 0.3
    temperature: float = 20.0
    gamma: float = 0.5
    tied_bias: bool = True  # an output bias in +RE and +REAL too; the paper has none there
    impl: str = "auto"
    threads: int | None = None
    device: str = "cpu"
    seed: int = 1
    vocab_size: int = 10_000
    min_count: int = 2
    max_tokens: int | None = None  # of the training split
    checkpoint_every: float = 30.0  # seconds
    quiet: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise CompareError(f"unknown model {self.model!r}: expected one of {', '.join(MODELS)}")
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown or not self.variants:
            named = ", ".join(unknown) or "(none)"
            raise CompareError(f"unknown variant {named}: expected some of {','.join(VARIANTS)}")
        if len(set(self.variants)) != len(self.variants):
            raise CompareError(f"a variant is named twice in {','.join(self.variants)}")
        for name in ("epochs", "hidden", "layers", "batch", "bptt", "threads", "min_count", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CompareError(f"{name}={value}: expected at least 1")
        if self.vocab_size < 3:
            raise CompareError(f"vocab_size={self.vocab_size}: expected at least 3, <unk> and <eos> included")
        for name in ("lr", "lr_decay", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise CompareError(f"{name}={value}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise CompareError(f"dropout={self.dropout}: expected a probability in [0, 1)")
        if not 0 <= self.gamma < float("inf"):
            raise CompareError(f"gamma={self.gamma}: expected 0 or more")
        if self.decay_after is not None and self.decay_after < 0:
            raise CompareError(f"decay_after={self.decay_after}: expected 0 or more")

    def resolved(self, n_train: int) -> dict[str, Any]:
        """Every setting that influences the numbers, defaults filled in for a corpus of `n_train` tokens."""
        small = n_train < 300_000
        settings = asdict(self)
        for name in ("data", "out", "variants", "checkpoint_every", "quiet", "fresh"):
            del settings[name]
        defaults = {
            "batch": 10 if small else 20,
            "lr": 1.0 if self.model == "lstm" else 1e-3,
            "epochs": 7 if small else 6,
            "decay_after": 4 if small else 3,
        }
        return settings | {name: value for name, value in defaults.items() if settings[name] is None}


def parse_variants(text: str) -> tuple[str, ...]:
    """`"baseline, +REAL"` -> ("baseline", "real"); the names are checked by `Settings`."""
    return tuple(part.strip().lower().lstrip("+") for part in text.split(",") if part.strip())


def ordered(variants: Iterable[str]) -> list[Variant]:
    """The chosen variants in the order of the report, the baseline first."""
    chosen = set(variants)
    return [v for v in VARIANTS.values() if v.name in chosen]
