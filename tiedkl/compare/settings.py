"""What a comparison is asked to do: the settings, their defaults and their checks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

MODELS = ("lstm", "transformer")
SMALL = 300_000  # training tokens below which a text gets a smaller batch and more epochs
NOT_RESOLVED = (
    "data", "out", "variants", "seeds", "price_per_hour", "tokenizer", "tuned_for", "checkpoint_every", "quiet",
    "fresh", "reuse",
)  # fmt: skip
UNITS = {"s": 1, "m": 60, "h": 3600}
LOSS_OPTIONS = ("temperature", "gamma", "target_grad")  # of the augmented loss
LARGEST_SEED = 2**60  # three streams a seed, 64 bits for all
OWN = (  # what may differ between variants: all that can be searched, and target_grad
    "lr", "dropout", "embedding_range", *LOSS_OPTIONS, "label_smoothing",
)  # fmt: skip
INITIAL_RANGE = 0.1  # of an LSTM of 200 units in Zaremba et al. (2014)
LOSS_KEYWORDS = {*LOSS_OPTIONS, "alpha", "label_smoothing"}  # of tiedkl.FusedTiedLoss


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
    smoothed: bool = False  # the cross-entropy has label smoothing

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings among `OWN` that it does nothing with."""
        return (() if self.augmented else LOSS_OPTIONS) + (() if self.smoothed else ("label_smoothing",))

    def loss_keywords(self, settings: Mapping[str, Any]) -> dict[str, float]:
        """What of `settings` its `tiedkl.FusedTiedLoss` takes, an option that is off left out; alpha 0 without the
        augmented loss."""
        names = (name for name in (*LOSS_OPTIONS, "label_smoothing") if name not in self.unused)
        found = {name: settings[name] for name in names if settings[name] is not False}
        return found if self.augmented else {"alpha": 0.0, **found}


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
        Variant(
            "ls",
            "+LS",
            False,
            False,
            "Label smoothing, the control of +AL: as the baseline, but a part of the target is spread over all words "
            "alike, close in meaning or not.",
            smoothed=True,
        ),
        Variant(
            "re-ls",
            "+RE+LS",
            False,
            True,
            "Label smoothing with one word matrix, the control of +REAL.",
            smoothed=True,
        ),
    )
}
PAPER_VARIANTS = ("baseline", "al", "re", "real")  # the four of the paper
CONTROLS = {"al": "ls", "real": "re-ls"}  # the same model with a simpler regulariser than the augmented loss


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison; None means a default that depends on the model or the corpus (see `resolved`)."""

    data: str | None = None  # directory, file, or None for the text that ships with Python
    out: str = "tiedkl-compare"
    model: str = "lstm"
    variants: tuple[str, ...] = PAPER_VARIANTS
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
    embedding_range: float = INITIAL_RANGE  # an LSTM's embedding starts uniform in +- this
    temperature: float = 20.0
    gamma: float = 0.5
    target_grad: bool = False  # the gradient of the augmented loss flows through its similarity target too
    label_smoothing: float = 0.1  # of the variants that have it
    tied_bias: bool = True  # an output bias in +RE and +REAL too; the paper has none there
    impl: str = "auto"
    threads: int | None = None
    device: str = "cpu"
    seed: int = 1  # the first
    seeds: int | None = None  # how many, counted up from `seed`
    budget: str | None = None  # wall-clock time such as "15m"; decides what is None, and shortens the text if need be
    price_per_hour: float | None = None  # of the machine, in any currency
    tokenizer: str | None = None  # a Hugging Face tokenizer.json instead of a vocabulary of words
    vocab_size: int = 10_000
    min_count: int | None = None  # 2, or 1 where the text has <unk> in it
    max_tokens: int | None = None  # of the training split
    tuned_for: str | None = None  # the variant that the settings were searched for; the report says whom that favours
    checkpoint_every: float = 30.0  # seconds
    quiet: bool = False
    fresh: bool = False
    reuse: str | None = None  # directory of another comparison, whose runs with the same settings are taken over
    overrides: dict[str, dict[str, float]] | None = None  # variant -> settings of its own, some of `OWN`

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise CompareError(f"unknown model {self.model!r}: expected one of {', '.join(MODELS)}")
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown or not self.variants:
            named = ", ".join(unknown) or "(none)"
            raise CompareError(f"unknown variant {named}: expected some of {','.join(VARIANTS)}")
        if self.tuned_for is not None and self.tuned_for not in VARIANTS:
            raise CompareError(f"tuned_for={self.tuned_for}: expected one of {', '.join(VARIANTS)}")
        if len(set(self.variants)) != len(self.variants):
            raise CompareError(f"a variant is named twice in {','.join(self.variants)}")
        for name in ("epochs", "hidden", "layers", "batch", "bptt", "threads", "seeds", "min_count", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CompareError(f"{name}={value}: expected at least 1")
        if self.vocab_size < 3:
            raise CompareError(f"vocab_size={self.vocab_size}: expected at least 3, <unk> and <eos> included")
        for name in ("lr", "lr_decay", "clip", "temperature", "embedding_range"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise CompareError(f"{name}={value}: expected a number above 0")
        if self.model != "lstm" and self.embedding_range != INITIAL_RANGE:
            raise CompareError(f"embedding_range={self.embedding_range}: only an lstm has it")
        if not 0 <= self.dropout < 1:
            raise CompareError(f"dropout={self.dropout}: expected a probability in [0, 1)")
        if not 0 <= self.label_smoothing <= 1:
            raise CompareError(f"label_smoothing={self.label_smoothing}: expected a number from 0 to 1")
        if not 0 <= self.gamma < float("inf"):
            raise CompareError(f"gamma={self.gamma}: expected 0 or more")
        for name in OWN:
            value = getattr(self, name)
            if isinstance(value, bool) != (name == "target_grad"):
                expected = "true or false" if name == "target_grad" else "a number"
                raise CompareError(f"{name}={value}: expected {expected}")
        if abs(self.seed) > LARGEST_SEED:
            raise CompareError(f"seed={self.seed}: expected a whole number from {-LARGEST_SEED} to {LARGEST_SEED}")
        for name in ("decay_after", "price_per_hour", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise CompareError(f"{name}={value}: expected 0 or more")
        if self.budget is not None:
            parse_duration(self.budget)
        if self.overrides is not None:
            self._check_overrides(self.overrides)

    def _check_overrides(self, overrides: Any) -> None:
        if not isinstance(overrides, dict) or not all(isinstance(values, dict) for values in overrides.values()):
            raise CompareError(f"overrides={overrides}: expected an object of settings for each variant")
        for variant, values in overrides.items():
            if variant not in self.variants:
                raise CompareError(f"settings for variant {variant}, which is not one of {','.join(self.variants)}")
            if other := sorted(values.keys() - set(OWN)):
                raise CompareError(f"variant {variant}: {', '.join(other)}: only {', '.join(OWN)} may differ")
            if empty := sorted(name for name, value in values.items() if value is None):
                raise CompareError(f"variant {variant}: {', '.join(empty)}: expected a value")
            try:
                replace(self, overrides=None, **values)
            except TypeError as error:
                raise CompareError(f"variant {variant}: a setting has the wrong type ({error})") from None
            except CompareError as error:
                raise CompareError(f"variant {variant}: {error}") from None

    def resolved(self, n_train: int) -> dict[str, Any]:
        """Every setting that influences the numbers of one run, defaults filled in for a corpus of `n_train` tokens.

        The text and its tokenizer are not among them: the corpus has a digest. More seeds and variants can be added to
        a comparison, so they are not either.
        """
        small = n_train < SMALL
        settings = asdict(self)
        for name in NOT_RESOLVED:
            del settings[name]
        defaults = {
            "batch": 10 if small else 20,
            "lr": 1.0 if self.model == "lstm" else 1e-3,
            "epochs": 7 if small else 6,
            "decay_after": 4 if small else 3,
        }
        return settings | {name: value for name, value in defaults.items() if settings[name] is None}


def of_variant(config: dict[str, Any], variant: str) -> dict[str, Any]:
    """`config` (`Settings.resolved`) with what this variant has of its own."""
    return config | (config.get("overrides") or {}).get(variant, {})


def parse_variants(text: str) -> tuple[str, ...]:
    """`"baseline, +REAL, +RE+LS"` -> ("baseline", "real", "re-ls"); the names are checked by `Settings`."""
    return tuple(part.strip().lower().lstrip("+").replace("+", "-") for part in text.split(",") if part.strip())


def ordered(variants: Iterable[str]) -> list[Variant]:
    """The chosen variants in the order of the report, the baseline first."""
    chosen = set(variants)
    return [v for v in VARIANTS.values() if v.name in chosen]


def parse_duration(text: str) -> float:
    """`"90s"`, `"15m"` or `"1.5h"` -> seconds. Raises CompareError for anything else, a number without unit too."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text).strip().lower())
    if not match or not float(match[1]):
        raise CompareError(f"{text!r} is not a time: expected a number above 0 with s, m or h, such as 90s, 15m, 2h")
    return float(match[1]) * UNITS[match[2]]


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings in a configuration file, such as the `best.json` of `tiedkl tune`: keywords for `Settings`.

    The file is a JSON object, either of settings or with one under "settings"; beside that, "tuned_for" or, without it,
    "variant" names the variant that the settings were searched for. Raises CompareError, with the reason, when it
    cannot be read or holds a setting that `Settings` does not have.
    """
    return _settings_in(_read_json(path), path)


def _settings_in(content: Any, path: str | Path) -> dict[str, Any]:
    values = content.get("settings", content) if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise CompareError(f"{path}: expected a JSON object of settings")
    tuned_for = content.get("tuned_for") or content.get("variant") if "settings" in content else None
    if tuned_for is not None:
        values = {"tuned_for": tuned_for, **values}
    known = {field.name for field in fields(Settings)} - {"overrides"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise CompareError(f"{path}: unknown settings {', '.join(unknown)}")
    try:
        Settings(**values)
    except TypeError as error:
        raise CompareError(f"{path}: a setting has the wrong type ({error})") from None
    except CompareError as error:
        raise CompareError(f"{path}: {error}") from None
    return values


def load_loss_options(path: str | Path) -> dict[str, float]:
    """The part of a configuration file that `tiedkl.FusedTiedLoss(**options)` takes.

    What a `best.json` has under "loss": temperature, gamma and, where it is on, target_grad, or alpha 0 for a variant
    without the augmented loss, and label_smoothing for one that has it. For a file of settings alone, its temperature,
    gamma and target_grad. Raises CompareError as `load_config` does.
    """
    content = _read_json(path)
    values = _settings_in(content, path)
    if "loss" not in content:
        return {name: values[name] for name in LOSS_OPTIONS if name in values}
    loss = content["loss"]
    if not isinstance(loss, dict) or not loss.keys() <= LOSS_KEYWORDS:
        raise CompareError(f"{path}: loss={loss}: expected an object with some of {', '.join(sorted(LOSS_KEYWORDS))}")
    return dict(loss)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CompareError(f"{path}: not JSON ({error})") from None
