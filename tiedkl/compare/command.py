"""Settings written as the command that has them."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .settings import OWN, VARIANTS, Settings

OUT = "tune-{}"  # of the search for a variant


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
        if isinstance(value, dict):
            text = json.dumps(value)
        words += f" {flag}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"
    return words


def compare_command(settings: Settings, **changes: Any) -> str:
    """`tiedkl compare` with these settings; it continues what is there, so `fresh` and `reuse` are left out."""
    return f"tiedkl compare{options(replace(settings, fresh=False, reuse=None, **changes))}"


def tune_command(settings: Settings, variant: str) -> str:
    """`tiedkl tune` of a variant with the settings that a search has too, in a directory of its own."""
    from ..tune.settings import TuneSettings  # tiedkl.tune imports this package

    own: dict[str, Any] = {**(settings.overrides or {}).get(variant, {}), "overrides": None}
    settings = replace(settings, **own)
    names = {field.name for field in fields(TuneSettings)} - {"out", "fresh"}
    shared = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name in names}
    shared = {name: value for name, value in shared.items() if value is not None}
    shared["target_grad"] = settings.target_grad and VARIANTS[variant].augmented
    search = search_of_all(settings, variant)
    return f"tiedkl tune{options(TuneSettings(**shared, variant=variant, search=search, out=OUT.format(variant)))}"


def search_of_all(settings: Any, variant: str) -> str | None:
    """`--search` for all that a variant has, None where that is the default. settings: as for `options`.

    A range that leaves out a setting is widened to hold it, since the search begins there.
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
    return None if usual else ",".join(parts)


def tuned_compare_command(settings: Settings, **changes: Any) -> str:
    """`tiedkl compare` with these settings, but those of a search from each variant's result."""
    default = {f.name: f.default for f in fields(Settings) if f.name in (*OWN, "tuned_for", "overrides")}
    variants = changes.get("variants", settings.variants)
    configs = "".join(config(f"{OUT.format(v)}/best.json", v) for v in variants)
    return f"{compare_command(settings, **default, **changes)}{configs}"


def config(file: str | Path, variant: str | None = None) -> str:
    """The option that takes settings from a file, for all variants or for one."""
    return f" --config {shlex.quote(f'{variant}={file}' if variant else str(file))}"
