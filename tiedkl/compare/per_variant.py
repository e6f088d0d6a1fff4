"""Settings that one variant has of its own: `--config VARIANT=FILE` beside `--config FILE`, and their table."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from .settings import OWN, VARIANTS, CompareError, load_config, of_variant, parse_variants


def read_configs(arguments: Iterable[str], given: Container[str]) -> dict[str, Any]:
    """Keywords for `Settings` from the arguments of `--config`; settings in `given` are left out.

    FILE holds settings for all variants. Of VARIANT=FILE, those in `OWN` become the variant's `overrides`; the others
    are for all variants, and the files have to agree on them; "tuned_for" has to be the variant. Raises CompareError
    where the files do not agree, or one was searched for another variant.
    """
    common: dict[str, tuple[Any, str]] = {}  # setting -> value, file
    overrides: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        name, _, rest = argument.partition("=")
        variant = "".join(parse_variants(name))
        file = rest if variant in VARIANTS and rest else argument
        own = overrides.setdefault(variant, {}) if file is rest else None
        if own:
            raise CompareError(f"--config {argument}: variant {variant} has a file already")
        found = load_config(file)
        if own is not None and found.get("tuned_for", variant) != variant:
            raise CompareError(
                f"--config {argument}: {file} was searched for {found['tuned_for']}, not for {variant}; without "
                "tuned_for in it, it is taken for any"
            )
        for setting, value in found.items():
            if setting in given or (own is not None and setting == "tuned_for"):
                continue
            if own is not None and setting in OWN:
                if value is not None:
                    own[setting] = value
                continue
            known, where = common.setdefault(setting, (value, file))
            if known != value:
                raise CompareError(
                    f"{where} has {setting}={known}, {file} has {setting}={value}: only {', '.join(OWN)} may differ "
                    f"between variants; decide with --{setting.replace('_', '-')}"
                )
    overrides = {variant: own for variant, own in overrides.items() if own}
    return {setting: value for setting, (value, _) in common.items()} | ({"overrides": overrides} if overrides else {})


def in_words(value: float | bool) -> str:
    """A setting as a table and a report have it."""
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:.4g}"


def settings_table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Columns and rows of the settings in which the variants of a report differ; None when they do not.

    A setting is "-" where the variant does nothing with it.
    """
    if not report["config"].get("overrides"):
        return None
    settings = {name: of_variant(report["config"], name) for name in report["variants"]}
    differing = [s for s in OWN if len({values[s] for values in settings.values()}) > 1]
    rows = []
    for name, v in report["variants"].items():
        unused = VARIANTS[name].unused
        rows.append((v["label"], *("-" if s in unused else in_words(settings[name][s]) for s in differing)))
    return (("variant", *differing), rows) if differing else None
