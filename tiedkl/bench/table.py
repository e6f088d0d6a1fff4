"""The result of one workload as text for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from .shapes import MIB

PASSES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
HEADS = (
    ("time", "ms"), ("", "+-"), ("of best", "CE peer"), ("of best", "CE+KL peer"), ("GEMM", "floor"), ("extra", "MiB"),
    ("scratch", "MiB"), ("error of", "loss"), ("eager's", "dh"), ("", "dw"), ("cold", "start s"),
)  # fmt: skip
WIDTHS = (10, 6, 9, 12, 7, 10, 9, 10, 9, 7, 9)
MEASURED = ("ok", "inaccurate")
LEGEND = """\
Times are medians of interleaved rounds, +- is (slowest - fastest) / median. "of best peer": time divided by that of
the fastest library that computes CE alone, or CE + KL; below 1 is faster than all of them. "GEMM floor": the time that
the unavoidable matrix products take here, as a share of the row's time; 1 is as fast as they can be, and above 1 means
that the row's products are faster than torch.mm. "extra": peak memory beyond inputs and gradients; "scratch": what
tiedkl's plan asks for. "error": against float64, in units of eager PyTorch's own; below 1 is more accurate. "cold
start": what the first call took longer than later ones."""


def heading(result: dict[str, Any]) -> list[str]:
    """What was measured, in words."""
    n, v, d = result["N"], result["V"], result["D"]
    lines = [
        f"{result['title'] or 'Output layer'}: {n:,} tokens, vocabulary {v:,}, width {d:,}, {result['dtype']}; "
        f"{PASSES[result['mode']]}"
    ]
    targets = f"Targets: {result['targets']}, {result['rho']:.0%} of them distinct"
    if result["ignored"]:
        targets += f", {result['ignored']:.0%} of the tokens ignored"
    unit = result["unit_seconds"]
    if unit:
        speed = 2 * n * v * d / unit
        rate = f"{speed / 1e12:.1f} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.0f} GFLOP/s"
        targets += f". One matrix product N x V x D: {unit * 1e3:.3g} ms, {rate}"
    lines.append(targets + ".")
    rounds = max((row.get("samples", 0) for row in result["rows"].values()), default=0)
    varied = [f"timed in {rounds} round{'s' if rounds != 1 else ''}"]
    if result["loss"] == "cekl":
        varied.append(f"temperature {result['temperature']:g}")
    if result["workspace_bytes"] is not None:
        varied.append(f"workspace {result['workspace_bytes'] / MIB:g} MiB")
    if result["mode"] == "bwd":
        varied.append("of what computes gradients in its forward call this is only the rest")
    text = ", ".join(varied)
    lines.append(text[0].upper() + text[1:] + ".")
    return lines


def cells(row: dict[str, Any]) -> list[str]:
    """One measured row under HEADS."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    errors = row.get("errors_vs_eager", {})
    ms = row.get("seconds")
    return [
        number(ms, ".3f" if ms is not None and ms < 0.1 else ".1f", 1e3),
        number(row.get("spread") if row.get("samples", 0) > 1 else None, ".0%"),
        number(row.get("vs_best_ce"), ".2f"),
        number(row.get("vs_best_cekl"), ".2f"),
        number(row.get("floor_fraction"), ".2f"),
        number(row.get("peak_bytes"), ",.1f", 1 / MIB),
        number(row.get("scratch_bytes"), ",.1f", 1 / MIB),
        *(number(errors.get(k), ".2f") for k in ("loss", "dh", "dw")),
        number(row.get("cold_start_seconds"), ".2f"),
    ]


def render(result: dict[str, Any]) -> str:
    """The table: CE + KL first, then CE alone, then what could not be measured and why."""
    rows = result["rows"]
    width = max(len(name) for name in rows) + 2
    lines = [*heading(result), ""]
    for k in (0, 1):
        titles = "".join(f"{head[k]:>{w}}" for head, w in zip(HEADS, WIDTHS, strict=True))
        lines += [" " * (width + 2) + titles]
    for kl, title in ((True, "CE + KL, the loss of tiedkl"), (False, "CE alone, a part of it")):
        chosen = {n: row for n, row in rows.items() if row["kl"] == kl and row["status"] in MEASURED}
        if not chosen:
            continue
        lines.append(title if result["loss"] == "cekl" else "CE")
        best = result["best_peer"].get("cekl" if kl else "ce")
        for name, row in sorted(chosen.items(), key=lambda item: item[1].get("seconds", float("inf"))):
            mark = "!" if row["status"] == "inaccurate" else "*" if name == best else " "
            values = "".join(f"{cell:>{w}}" for cell, w in zip(cells(row), WIDTHS, strict=True))
            lines.append(f"{mark} {name:{width}}{values}")
    others = {n: row for n, row in rows.items() if row["status"] not in MEASURED}
    measured = {n: row for n, row in rows.items() if n not in others}
    if any(name in result["best_peer"].values() for name in rows):
        inaccurate = any(row["status"] == "inaccurate" for row in rows.values())
        lines.append("* the fastest peer of its kind" + ("   ! inaccurate, see the notes" if inaccurate else ""))
    lines += _listed("What ran", {n: row["note"] for n, row in measured.items()})
    lines += _listed("Not measured", {n: reason(row) for n, row in others.items()})
    return "\n".join(line.rstrip() for line in lines)


def _listed(title: str, notes: dict[str, str]) -> list[str]:
    """Names with the same note together."""
    groups: dict[str, list[str]] = {}
    for name, note in notes.items():
        groups.setdefault(note, []).append(name)
    return [title, *(_wrapped("; ".join(names) + ": " + note) for note, names in groups.items())] if groups else []


def reason(row: dict[str, Any]) -> str:
    known = ("absent", "not measured", "waiting")
    return row["note"] if row["status"] in known else f"{row['status']}: {row['note']}"


def _wrapped(text: str) -> str:
    columns = max(80, min(140, shutil.get_terminal_size((132, 24)).columns))
    return textwrap.fill(text, columns, initial_indent="  ", subsequent_indent="      ")
