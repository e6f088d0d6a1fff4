"""The bound every backend is held to: its error against float64 next to eager PyTorch's own.

One case, per quantity (loss, CE, KL of every token; gradients), with eager in the same dtype on the same inputs:

    RMS error <= 1.5 x eager's RMS error     + 2 ulp of the RMS of the true values
    max error <= 2.0 x eager's largest error + 2 ulp of the largest true value

A reduced loss, CE or KL is one number, where eager may be right by luck: it may differ by what token errors of eager's
RMS could add up to, 1.5 x eager's RMS error x sum |factor|, + 2 ulp. One sample of a rounding error is a poor estimate:
where two words compete, a whole gradient has the error of one logit. When a case misses its bound, both are measured
eight times more, with features (and eager with tokens) in other orders; of eager all nine count, as above, and of what
is judged the RMS over its nine takes the place of each error. Eager then adds up half of its products in an order of
their own, as a BLAS may with blocks of another width: among equal rows its errors cancel otherwise, to a tenth.

A suite, per dtype and quantity: the RMS over all cases is at most 1.0 x eager's. The two RMS errors of a case are
divided by their own root sum of squares, or by one ulp where that is more: every case weighs the same, and one where
eager is hopeless hides no other. A suite is a sample: the ratio comes with its standard error, and it is a breach when
it is above 1 by more than two of them, or by what takes their place among few cases: Student's t of the same level.

KL's relative error in float32 is at most 1e-5 for every token with KL >= 1e-6, in the near_teacher cases made for that.

float64 is the truth's own precision, and where eager is not finite it measures nothing: there the bound is
FIXED_ULPS x (1 + max |z|) ulp, as an error of an ulp in a logit z is a relative error of |z| ulp in its softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import IGNORE, Case, make_inputs
from .oracle import FIXED_ULPS, GRADS, TERMS, Flat, Values, eager, eager_again, flatten, truth, ulp, use, use_again

RMS_FACTOR, MAX_FACTOR, ULPS, SUITE_FACTOR = 1.5, 2.0, 2.0, 1.0
KL_RELATIVE, KL_SMALLEST = 1e-5, 1e-6
REPEATS = 8


@dataclass
class Measured:
    """One quantity of one case."""

    quantity: str
    error: float  # RMS
    eager_error: float  # RMS
    ulp: float  # of the RMS of the true values
    bound_used: float  # largest of error / bound over the quantity's bounds; above 1 is a breach
    broken: str = ""  # the bound that was missed, in words


@dataclass
class Judgement:
    """One case under one backend."""

    case: Case
    impl: str
    measured: dict[str, Measured]

    @property
    def breaches(self) -> list[str]:
        return [f"{m.quantity}: {m.broken}" for m in self.measured.values() if m.broken]


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _max(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def _mean(errors: list[float]) -> float:
    """Root mean square."""
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def _ratio(error: float, bound: float) -> float:
    if error == 0.0:
        return 0.0
    if math.isnan(error):
        return math.inf
    return error / bound if bound else math.inf


class _Judge:
    def __init__(self, case: Case, device: str | torch.device):
        self.case = case
        self.inputs = make_inputs(case, device)
        self.flat: Flat = flatten(case, self.inputs)
        self.right = truth(case, self.flat)
        self.eager = [eager(case, self.flat)]
        valid = self.flat.y != IGNORE
        z = self.flat.h[valid].double() @ self.flat.w.double().T
        self.largest_logit = _max(z)

    def more_eager(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.eager += [eager_again(self.case, self.flat, generator) for _ in range(REPEATS)]

    def checks(self, name: str, got: list[Values]) -> Iterable[tuple[str, float, float]]:
        """(what, error, bound) of every bound on one quantity, which was computed once or several times."""
        per_token = name in TERMS
        right = (self.right.tokens if per_token else self.right.grads)[name]
        errors = [(x.tokens if per_token else x.grads)[name] - right for x in got]
        others = [(e.tokens if per_token else e.grads)[name] - right for e in self.eager]
        finite = [bool(torch.isfinite(e).all()) for e in others]
        fixed = self.case.dtype == "float64" or not all(finite)
        # With one word only, every probability is one and what should vanish is a difference of ones.
        one = 1.0 if self.case.vocab == 1 and len(right) else 0.0
        # Zero for everybody (ignored tokens): no part of the RMS, whose ulp is that of the entries that are computed.
        live = torch.stack([right != 0, *(e != 0 for e in (*errors, *others))]).any(0)
        typical = _rms(right[live])
        rms_ulp, max_ulp = ulp(self.case, name, max(one, typical)), ulp(self.case, name, max(one, _max(right)))
        slack = FIXED_ULPS * (1 + self.largest_logit)
        rms_eager, largest = _mean([_rms(e[live]) for e in others]), _mean([_max(e) for e in errors])
        if fixed:
            yield "max", largest, slack * max_ulp
        else:
            yield "rms", _mean([_rms(e[live]) for e in errors]), RMS_FACTOR * rms_eager + ULPS * rms_ulp
            yield "max", largest, MAX_FACTOR * max(map(_max, others)) + ULPS * max_ulp
        if per_token:
            reduced, factor = self.right.reduced[name], self.flat.scale.abs()
            off = _mean([_max(x.reduced[name] - reduced) for x in got])
            rms_bound = FIXED_ULPS * (1 + self.largest_logit) * max_ulp if fixed else RMS_FACTOR * rms_eager
            weight = float(factor.sum()) if reduced.dim() == 0 else _max(factor)
            if reduced.dim() and not fixed:
                rms_bound = MAX_FACTOR * max(map(_max, others))
            yield "reduced", off, rms_bound * weight + ULPS * ulp(self.case, name, max(one, _max(reduced)))
        if name == "kl" and self.case.kind == "near_teacher" and self.case.dtype == "float32":
            big = right >= KL_SMALLEST
            yield "relative", max(_max(e[big] / right[big]) for e in errors), KL_RELATIVE

    def measure(self, name: str, got: list[Values]) -> Measured:
        per_token = name in TERMS
        right = (self.right.tokens if per_token else self.right.grads)[name]
        error = _rms((got[0].tokens if per_token else got[0].grads)[name] - right)
        other = _rms((self.eager[0].tokens if per_token else self.eager[0].grads)[name] - right)
        worst = max(self.checks(name, got), key=lambda c: _ratio(c[1], c[2]))
        used = _ratio(worst[1], worst[2])
        broken = f"{worst[0]} error {worst[1]:.3g} is over its bound {worst[2]:.3g}" if used > 1 else ""
        return Measured(name, error, other, ulp(self.case, name, _rms(right)), used, broken)

    def run(self, impl: str) -> Judgement:
        got = [use(self.case, self.inputs, impl)]
        names = [name for name in (*TERMS, *GRADS) if name in got[0].grads or name in TERMS]
        missing = set(self.right.grads) ^ set(got[0].grads)
        assert not missing, f"gradients do not match: {missing}"
        measured = {name: self.measure(name, got) for name in names}
        if any(m.broken for m in measured.values()):
            if len(self.eager) == 1:
                self.more_eager()
            generator = torch.Generator().manual_seed(1)
            got += [use_again(self.case, self.inputs, impl, generator) for _ in range(REPEATS)]
            measured = {name: self.measure(name, got) for name in names}
        return Judgement(self.case, impl, measured)


def judge(case: Case, impls: str | Iterable[str], device: str | torch.device = "cpu") -> list[Judgement]:
    """Evaluate `case` with every backend of `impls` and hold each to the bounds above."""
    judge = _Judge(case, device)
    return [judge.run(impl) for impl in ([impls] if isinstance(impls, str) else impls)]


@dataclass(frozen=True)
class Ratio:
    """RMS error of a suite over eager's."""

    value: float
    standard_error: float  # jackknife over cases; infinite where there is but one
    cases: int

    @property
    def broken(self) -> bool:
        return self.value - self._errors_allowed * self.standard_error > SUITE_FACTOR

    @property
    def _errors_allowed(self) -> float:
        """Student's t with cases - 1 degrees of freedom at the level of two standard errors: 2.65 for 6, 2.09 for 30.

        Source: the expansion of Abramowitz and Stegun (1964), 26.7.5, at 2.
        """
        df = max(self.cases - 1, 1)
        return 2 + 2.5 / df + 3.0625 / df**2 + 2.859375 / df**3 + 1.844 / df**4


def suite_ratios(judgements: Iterable[Judgement]) -> dict[tuple[str, str, str], Ratio]:
    """(backend, dtype, quantity) -> ratio of the suite; float64, having no truth beyond it, is left out."""
    pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for j in judgements:
        if j.case.dtype == "float64":
            continue
        for name, m in j.measured.items():
            unit = max(math.hypot(m.error, m.eager_error), m.ulp)
            if unit and math.isfinite(unit):
                pairs.setdefault((j.impl, j.case.dtype, name), []).append(
                    ((m.error / unit) ** 2, (m.eager_error / unit) ** 2)
                )
    return {key: _ratio_of(values) for key, values in pairs.items()}


def _ratio_of(pairs: list[tuple[float, float]]) -> Ratio:
    ours, eagers, n = sum(a for a, _ in pairs), sum(b for _, b in pairs), len(pairs)
    if not eagers:
        return Ratio(math.inf if ours else 0.0, 0.0, n)
    if n == 1:
        return Ratio(math.sqrt(ours / eagers), math.inf, n)
    without = [math.sqrt(max(ours - a, 0.0) / (eagers - b)) if eagers > b else 0.0 for a, b in pairs]
    mean = sum(without) / n
    return Ratio(math.sqrt(ours / eagers), math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in without)), n)
