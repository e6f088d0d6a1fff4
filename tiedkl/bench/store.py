"""Results as files: JSON, written whole or not at all after every step, and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from ..environment import finite
from .errors import BenchError

SCHEMA = 1
WORKLOAD = (
    "title", "N", "V", "D", "dtype", "device", "loss", "mode", "targets", "ignored", "temperature", "workspace_bytes",
    "rho", "unit_seconds",
)  # fmt: skip
COLUMNS = (
    "status", "kl", "seconds", "samples", "spread", "vs_best_ce", "vs_best_cekl", "gemm_units", "floor_fraction",
    "own_floor_fraction", "peak_bytes", "scratch_bytes", "first_call_seconds", "cold_start_seconds", "plan", "note",
)  # fmt: skip
ERRORS = ("loss", "dh", "dw")


def write(file: Path, text: str) -> None:
    """Write beside `file` and move into place. Raises BenchError."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise BenchError(f"{file}: cannot be written ({error.strerror})") from None


def write_json(file: Path, report: dict[str, Any]) -> None:
    """The whole report. Raises BenchError."""
    write(file, json.dumps(finite(report), indent=1, allow_nan=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """A report that `write_json` wrote. Raises BenchError."""
    try:
        report = json.loads(file.read_text("utf-8"))
        for result in report["results"]:
            assert {"N", "V", "D", "dtype", "rows"} <= set(result)
    except OSError as error:
        raise BenchError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise BenchError(f"{file}: not a result of tiedkl bench") from None
    assert isinstance(report, dict)
    return report


def write_csv(file: Path, report: dict[str, Any]) -> None:
    """One line for each workload and candidate. Raises BenchError."""
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(
        [*WORKLOAD, "name", *COLUMNS, *(f"error_{e}" for e in ERRORS), *(f"error_vs_eager_{e}" for e in ERRORS)]
    )
    for result in report["results"]:
        for name, row in result["rows"].items():
            errors = [row.get(kind, {}).get(e) for kind in ("errors", "errors_vs_eager") for e in ERRORS]
            table.writerow([*map(result.get, WORKLOAD), name, *map(row.get, COLUMNS), *errors])
    write(file, out.getvalue())
