"""One workload: every candidate is checked against float64, its memory measured, and all are timed in turns."""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tiedkl

from .candidates import EAGER, Candidate
from .figures import compare_with_peers, timings, units
from .shapes import IGNORE, Workload
from .steps import (
    Step,
    clean,
    inputs,
    nothing,
    once,
    out_of_memory,
    peak_bytes,
    prepare,
    relative,
    start_compiler,
    truth,
)
from .targets import describe

BOUND = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}  # relative error of a right result
CHECK_WORK = {"cpu": 1e11, "cuda": 1e13}  # N V D up to which every token is checked; beyond it only the first ones
LEAST_CHECKED = 64
NARROW = 256  # widths below this cost no less: element-wise work in float64 then takes the time
FLUSH_BYTES = 1 << 28  # more than a GPU's L2 cache
TINY_SECONDS, MOST_REPEATS = 0.02, 20  # on a CPU, steps are repeated until a measurement is that long
COMPILE_SECONDS = 20.0  # a guess at the first call of what torch.compile compiles, before there has been one
ROUNDS_KEPT_FREE = 2  # timed rounds of what is already measured that the time for a new candidate must leave

Save = Callable[[], None]


class Measurement:
    """The rows of one workload. `run` fills `result`, which is valid JSON at any moment."""

    def __init__(
        self,
        workload: Workload,
        table: dict[str, Candidate],
        *,
        rounds: int,
        deadline: float = math.inf,
        long_seconds: float = math.inf,
        save: Save = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ):
        """rounds is the most there will be; no new work starts when it would not end before `deadline` (monotonic).

        A candidate that has taken `long_seconds` in all is not timed again.
        """
        self.w, self.table, self.rounds, self.deadline = workload, table, rounds, deadline
        self.long_seconds, self.save, self.say = long_seconds, save, say
        self.device = torch.device(workload.device)
        self.h, self.weight, self.y = inputs(workload)
        valid = self.y[self.y != IGNORE]
        self.share = len(valid) / workload.tokens
        self.rho = len(valid.unique()) / len(valid)
        checked = int(CHECK_WORK[self.device.type] // (workload.vocab * max(workload.width, NARROW)))
        self.checked = min(workload.tokens, max(LEAST_CHECKED, checked))
        self.truths: dict[tuple[bool, bool, int], dict[str, Tensor]] = {}
        self.warm: dict[str, float] = {}  # seconds of a step that is no first one
        self.compile_seconds = COMPILE_SECONDS
        self.seconds: dict[str, list[float]] = {}
        self.units: list[float] = []
        self.rows: dict[str, dict[str, Any]] = {name: self._row(c) for name, c in table.items()}
        self.result: dict[str, Any] = {
            "title": workload.title,
            "N": workload.tokens,
            "V": workload.vocab,
            "D": workload.width,
            "dtype": workload.dtype,
            "device": workload.device,
            "loss": workload.loss,
            "mode": workload.mode,
            "targets": describe(workload),
            "ignored": workload.ignored,
            "temperature": workload.temperature,
            "workspace_bytes": workload.workspace_bytes,
            "rho": self.rho,
            "checked_tokens": self.checked,
            "unit_seconds": None,
            "best_peer": {},
            "rows": self.rows,
        }

    def _row(self, c: Candidate) -> dict[str, Any]:
        row: dict[str, Any] = {"status": "waiting" if c.loss else "absent", "kl": c.kl, "note": c.note, "errors": {}}
        if c.loss and c.impl:
            options = {
                "temperature": self.w.temperature,
                "alpha": self.w.alpha if c.kl else 0.0,
                "ignore_index": IGNORE,
                "impl": c.impl,
                "workspace_bytes": c.workspace_bytes,
            }
            with torch.set_grad_enabled(self.w.mode != "fwd"):
                plan = tiedkl.explain(self.h, self.weight, self.y, **options)  # type: ignore[arg-type]
            row |= {"plan": str(plan).split("\nnot ")[0], "scratch_bytes": plan.scratch_bytes}
        return row

    @property
    def alive(self) -> list[str]:
        return [name for name, row in self.rows.items() if row["status"] in ("ok", "inaccurate")]

    def run(self) -> None:
        """Check, then time. Interrupted, it leaves the rows as far as they have come."""
        try:
            for name in [n for n, row in self.rows.items() if row["status"] == "waiting"]:
                self.say(name)
                if self._in_time(name):
                    self.start(name)
                self.save()
            self.truths.clear()
            self.time()
        finally:
            for row in self.rows.values():
                if row["status"] == "waiting":
                    row |= {"status": "not measured", "note": "interrupted before it"}
            self.fill()
            self.save()

    def _in_time(self, name: str) -> bool:
        """Whether there is time for a new candidate and for the rounds; the first of all always has it."""
        rounds = ROUNDS_KEPT_FREE + (self.device.type == "cuda")  # one is not timed there
        left = self.deadline - time.monotonic() - rounds * sum(self.warm[n] for n in self.alive)
        if not self.warm or left >= (self.compile_seconds if self.table[name].compiled else 0.0):
            return True
        self.rows[name] |= {"status": "not measured", "note": "no time was left; --budget-seconds gives more"}
        return False

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """work(), or a row that says why there is no result."""
        try:
            return work()
        except Exception as error:  # a peer's failure must not end the run
            text = " ".join(str(error).split()) or "no reason given"
            if out_of_memory(error):
                asked = re.search(r"tried to allocate (\d+) bytes", text)  # the CPU allocator's words
                note = f"{int(asked[1]) / 2**30:.1f} GiB cannot be allocated" if asked else text.split(". ")[0][:200]
                self.rows[name] |= {"status": "out of memory", "note": note}
            else:
                if "active drivers" in text:  # what Triton says without a GPU
                    text += " Its Triton kernels need a GPU."
                note = f"{self.table[name].note}: {type(error).__name__}: {text}"
                self.rows[name] |= {"status": "failed", "note": note[:300]}
        clean(self.device)
        return None

    def start(self, name: str) -> None:
        """The first call, its errors, and the peak memory of a second one."""
        c, row = self.table[name], self.rows[name]

        def work() -> bool:
            if c.compiled:
                start_compiler(self.device)
            began = time.perf_counter()
            step = prepare(c, self.w.mode, self.h, self.weight, self.y)
            found = step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            row["first_call_seconds"] = time.perf_counter() - began
            if c.compiled:
                self.compile_seconds = row["first_call_seconds"]
            if self.checked == self.w.tokens:
                row["errors"] = self.errors(c, found, row)
            else:
                h, y = self.h.detach()[: self.checked].clone().requires_grad_(), self.y[: self.checked]
                row["errors"] = self.errors(c, prepare(c, self.w.mode, h, self.weight, y)(), row)
            del found
            if c.graph:  # a replay finds its memory allocated: measured is the capture
                del step
                step = Step(nothing, lambda: prepare(c, self.w.mode, self.h, self.weight, self.y)())
            began = time.perf_counter()
            row["peak_bytes"] = peak_bytes(step, self.device)[0]
            self.warm[name] = time.perf_counter() - began
            return True

        if self.attempt(name, work):
            row["status"] = "ok"
            self.judge(name)
        clean(self.device)

    def truth(self, kl: bool, target_grad: bool = False) -> dict[str, Tensor]:
        key = kl, target_grad, self.checked
        if key not in self.truths:
            rows = slice(0, self.checked)
            self.truths[key] = truth(self.w, self.h[rows], self.weight, self.y[rows], kl, target_grad)
        return self.truths[key]

    def errors(self, c: Candidate, found: tuple[Tensor | None, ...], row: dict[str, Any]) -> dict[str, float]:
        """RMS errors relative to the true RMS.

        A peer whose gradient also flows through the target computes another d_w: it is held to that one, and says so.
        """

        def against(right: dict[str, Tensor]) -> dict[str, float]:
            names = zip(("loss", "dh", "dw"), found, strict=True)
            return {k: relative(x, right[k]) for k, x in names if k in right and x is not None}

        errors, bound = against(self.truth(c.kl)), BOUND[self.w.dtype]
        if c.kl and not c.impl and errors.get("dw", 0.0) > bound:
            others = against(self.truth(True, target_grad=True))
            if others["dw"] <= bound:
                row["note"] += "; its gradient flows through the target too, and is held to that"
                return others
        return errors

    def judge(self, name: str) -> None:
        """A wrong result of tiedkl is not timed; an inaccurate peer is, and says so."""
        row, c = self.rows[name], self.table[name]
        over = {k: e for k, e in row["errors"].items() if not e <= BOUND[self.w.dtype]}
        if over:
            row["status"] = "wrong" if c.impl else "inaccurate"
            row["note"] += "; relative errors over the bound: " + ", ".join(f"{k} {e:.2g}" for k, e in over.items())

    def product(self) -> Callable[[], Any]:
        """What one unit is timed by: on a GPU the three products of a cross-entropy, on a CPU one in float32.

        Eager bfloat16 products are emulated on most CPUs and would be no floor.
        """
        h, w = self.h.detach(), self.weight.detach()
        if self.device.type == "cpu" and self.w.dtype != "float64":
            h, w = h.float(), w.float()
        z = h.new_empty(self.w.tokens, self.w.vocab)
        if self.device.type == "cpu":
            return lambda: torch.mm(h, w.T, out=z)
        d_h, d_w = torch.empty_like(h), torch.empty_like(w)
        return lambda: (torch.mm(h, w.T, out=z), torch.mm(z, w, out=d_h), torch.mm(z.T, h, out=d_w))

    def time(self) -> None:
        """Rounds of one step of everything; captured ones apart, for they hold on to their memory."""
        cuda = self.device.type == "cuda"
        flush = torch.empty(FLUSH_BYTES if cuda else 1, dtype=torch.int8, device=self.device)
        for graph in (False, True):
            names = [name for name in self.alive if self.table[name].graph == graph]
            steps: dict[str, Step] = {}
            for name in names:
                args = self.table[name], self.w.mode, self.h, self.weight, self.y
                step = self.attempt(name, functools.partial(prepare, *args))
                if step:
                    steps[name] = step
            unit = None if graph else self._unit()
            for name in list(steps) if cuda else ():  # untimed: the allocator asks the driver for what it does not have
                if self.attempt(name, functools.partial(once, steps[name], flush)) is None:
                    del steps[name]
            for turn in range(self.rounds if steps else 0):
                if turn and time.monotonic() + sum(self.warm[n] for n in steps) > self.deadline:
                    break
                self.say(f"round {turn + 1} of {self.rounds}")
                if unit:
                    took = once(unit, flush, self._repeats(self.units[-1] if self.units else 1.0))
                    self.units.append(took / (3 if cuda else 1))
                for name in [n for n in steps if sum(self.seconds.get(n, ())) < self.long_seconds]:
                    repeats = self._repeats(self.warm[name])
                    again = self.attempt(name, functools.partial(once, steps[name], flush, repeats))
                    if again is None:
                        del steps[name]
                    else:
                        self.seconds.setdefault(name, []).append(again)
                if turn + 1 < self.rounds:
                    self.fill()
                    self.save()
            del steps, unit
            clean(self.device)

    def _unit(self) -> Step | None:
        try:
            product = self.product()
            product()
        except Exception as error:  # the logits of the floor do not fit: there is none to compare with
            if not out_of_memory(error):
                raise
            return None
        return Step(nothing, product)

    def _repeats(self, seconds: float) -> int:
        return max(1, min(MOST_REPEATS, round(TINY_SECONDS / max(seconds, 1e-9))))

    def fill(self) -> None:
        """Rows from what was timed so far."""
        unit = statistics.median(self.units) if self.units else None
        self.result["unit_seconds"] = unit
        for name in self.alive:
            c, row = self.table[name], self.rows[name]
            eager = self.rows.get(EAGER[c.kl], {}).get("errors", {})
            row["errors_vs_eager"] = {k: e / eager[k] for k, e in row["errors"].items() if eager.get(k)}
            times = self.seconds.get(name)
            if times:
                row |= timings(times, row["first_call_seconds"])
                if unit is not None:
                    row |= units(row, unit, self.w.mode, self.share, self.rho)
        compare_with_peers(self.result)
