"""What the reports have in common: one look, inline SVG figures, pages that need nothing from outside.

A page is a Jinja template that starts with `{% extends "base.html.j2" %}` and fills the blocks `title`, `style` and
`main`. Only what is called imports matplotlib or jinja2.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a929c",
}


def figure(name: str, title: str, paint: Callable[[Any], None], size: tuple[float, float] = (5.4, 3.5)) -> str:
    """What `paint(axes)` draws as an `<svg>` element; `name` keeps the ids of a page's figures apart.

    The same drawing gives the same text every time, with the same version of matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        paint(canvas.add_subplot())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    tag, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)  # the page decides
    return tag.replace("<svg", f'<svg role="img" aria-label="{title}"') + rest


def render(package: str, template: str, **values: Any) -> str:
    """The template of that name in `package`, filled in."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    base = resources.files(__package__)
    sources = {
        "base.html.j2": base.joinpath("base.html.j2").read_text("utf-8"),
        "style.css": base.joinpath("style.css").read_text("utf-8"),
        template: resources.files(package).joinpath(template).read_text("utf-8"),
    }
    environment = Environment(loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)


def facts(known: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys and values to read; a nested dictionary becomes one line."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        if isinstance(value, list | tuple):
            return ", ".join(map(text, value)) or "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:.4g}"
        return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    return [(key.replace("_", " "), text(value)) for key, value in known.items()]
