"""Settings written as the command that has them."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from typing import Any

from .settings import Settings

BEST = "tiedkl-tune/best.json"  # where `tiedkl tune` leaves its result unless --out says otherwise


def options(settings: Any) -> str:
    """The options of every setting that is not at its default, each after a space, quoted for a shell.

    settings: `Settings` or `TuneSettings`, whose fields are named like the options of their commands.
    """
    words = ""
    for field in fields(settings):
        value, flag = getattr(settings, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words += f" {flag}" if value else f" --no-{flag[2:]}"
            continue
        text = ",".join(value) if isinstance(value, (list, tuple)) else str(value)
        words += f" {flag}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"
    return words


def compare_command(settings: Settings, **changes: Any) -> str:
    """`tiedkl compare` with these settings; it continues what is there, so `fresh` is left out."""
    return f"tiedkl compare{options(replace(settings, fresh=False, **changes))}"


def tune_command(settings: Settings, variant: str) -> str:
    """`tiedkl tune` of a variant with the settings that a search has too.

    A range that leaves out a setting of the run is widened to hold it, since the search begins there.
    """
    from ..tune.settings import TuneSettings  # tiedkl.tune imports this package

    ranges = TuneSettings(model=settings.model, variant=variant).ranges()
    parts, usual = [], True
    for name, (low, high, log) in ranges.items():
        value = getattr(settings, name)
        inside = value is None or low <= value <= high
        usual &= inside
        if inside:
            parts.append(name)
        elif value or not log:  # a logarithmic range cannot hold 0: the setting stays at it
            parts.append(f"{name}={min(low, value)}:{max(high, value)}")
    names = {field.name for field in fields(TuneSettings)} - {"out", "fresh"}
    shared = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name in names}
    shared = {name: value for name, value in shared.items() if value is not None}
    search = None if usual else ",".join(parts)
    return f"tiedkl tune{options(TuneSettings(**shared, variant=variant, search=search))}"


def tuned_compare_command(settings: Settings, **changes: Any) -> str:
    """`tiedkl compare` with these settings, but those of the search from its result."""
    from ..tune.settings import RANGES

    default = {field.name: field.default for field in fields(Settings) if field.name in {*RANGES, "tuned_for"}}
    return f"{compare_command(settings, **default, **changes)} --config {BEST}"
