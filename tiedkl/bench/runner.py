"""All workloads of one run, in order, within its time; the report is kept as it comes."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..environment import stamp
from .candidates import Candidate, candidates
from .measure import Measurement
from .shapes import Workload
from .steps import clean, memory_limit, out_of_memory
from .store import SCHEMA, write_json

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass
class Settings:
    """How to run; what to run are the workloads."""

    command: str
    impls: Sequence[str] | None = None
    workspaces: Sequence[int] = ()  # bytes: a row of every backend of tiedkl with each
    graph: bool = False
    compiled: bool = True
    rounds: int = 5
    budget_seconds: float = math.inf
    long_seconds: float = math.inf
    fresh_caches: bool = True
    json: Path | None = None

    def table(self, w: Workload) -> dict[str, Candidate]:
        """The candidates of one workload."""
        return candidates(w, self.impls, workspaces=self.workspaces, graph=self.graph, compiled=self.compiled)


def run(
    workloads: Sequence[Workload],
    settings: Settings,
    *,
    show: Callable[[dict[str, Any]], None] = lambda result: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every workload and return the report; `show` gets each result, `say` what is being done.

    An interrupt ends the run, not the report: `finished` is then False.
    """
    device = torch.device(workloads[0].device)
    where = stamp(device)
    where["commit"] = where.pop("git_commit")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "stamp": {
            "command": settings.command,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **where,
            "rounds": settings.rounds,
            "fresh_caches": settings.fresh_caches,
        },
        "finished": False,
        "interrupted": False,
        "left_out": [],
        "too_large": [],
        "results": [],
    }

    def save() -> None:
        if settings.json:
            write_json(settings.json, report)

    start = time.monotonic()
    with fresh_caches() if settings.fresh_caches else contextlib.nullcontext(), memory_limit(device):
        try:
            for i, w in enumerate(workloads):
                if time.monotonic() - start > settings.budget_seconds:
                    report["left_out"] = [left.size for left in workloads[i:]]
                    break
                torch._dynamo.reset()
                clean(device)
                say(f"{w.size}: inputs")
                table = settings.table(w)
                gc.freeze()  # the libraries imported so far: collecting among them takes longer than a small step
                try:
                    one = Measurement(
                        w,
                        table,
                        rounds=settings.rounds,
                        deadline=start + settings.budget_seconds,
                        long_seconds=settings.long_seconds,
                        save=save,
                        say=lambda text, w=w: say(f"{w.size}: {text}"),  # type: ignore[misc]
                    )
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    report["too_large"].append(w.size)  # its inputs alone
                    continue
                report["results"].append(one.result)
                try:
                    one.run()
                finally:
                    show(one.result)
            else:
                report["finished"] = True
        except KeyboardInterrupt:
            report["interrupted"] = True
        finally:
            gc.unfreeze()
    save()
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What must not be: a wrong result of tiedkl, a failure of tiedkl or eager. Running out of memory is a result."""
    found = []
    for result in report["results"]:
        size = f"N={result['N']} V={result['V']} D={result['D']} {result['dtype']}"
        for name, row in result["rows"].items():
            own = name.startswith(("tiedkl", "eager"))
            if row["status"] == "wrong" or (own and row["status"] == "failed"):
                found.append(f"{name} at {size} {row['status']}: {row['note']}")
    return found


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty caches for what compiles, so that a cold start is one; caches that the environment names stay."""
    names = [name for name in CACHES if name not in os.environ]
    with tempfile.TemporaryDirectory(prefix="tiedkl-bench-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: os.path.join(folder, name.lower()) for name in names})
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)
