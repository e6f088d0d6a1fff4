"""Test cases and the error oracle: what `tiedkl verify` and the test suite measure with.

cases(n, seed)      several hundred distinct problems of every kind, each with an id that rebuilds it
make_inputs(case)   its tensors
judge(case, impl)   the errors of one backend and of eager PyTorch against float64, and the bound each is held to
"""

from .cases import ALL_DTYPES, KINDS, Case, Inputs, cases, find_case, make_case, make_inputs, random_problem
from .judge import Judgement, Measured, Ratio, judge, suite_ratios
from .oracle import FIXED_ULPS, GRADS, TERMS, Values, arguments, eager, flatten, truth, ulp, use

__all__ = [
    "ALL_DTYPES",
    "FIXED_ULPS",
    "GRADS",
    "KINDS",
    "TERMS",
    "Case",
    "Inputs",
    "Judgement",
    "Measured",
    "Ratio",
    "Values",
    "arguments",
    "cases",
    "eager",
    "find_case",
    "flatten",
    "judge",
    "make_case",
    "make_inputs",
    "random_problem",
    "suite_ratios",
    "truth",
    "ulp",
    "use",
]
