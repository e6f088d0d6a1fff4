"""How sure a difference is: Student's t over seeds, a block bootstrap over the test text, Holm's correction.

Differences are in nats a token, new minus old, so that less than 0 is better; `percent` turns them into perplexity.
Everything is deterministic: the bootstrap draws from its own seeded generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 10_000
MAX_DF = 1000  # beyond it Student's t is the normal distribution to three digits


class Interval(NamedTuple):
    """An estimate with a two-sided interval, and the p-value of "the truth is 0"; all but p in nats."""

    mean: float
    low: float
    high: float
    p: float
    error: float  # standard error of the mean
    df: int | None = None  # degrees of freedom, where the interval is Student's


def percent(nats: float) -> float:
    """A difference of mean cross-entropies as a change of perplexity in per cent."""
    return 100.0 * math.expm1(min(nats, 700.0))


def two_sided_p(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t with `df` >= 1 degrees of freedom.

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, the finite series for whole degrees of freedom.
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| <= t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while 1.0 - two_sided_p(high, df) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1.0 - two_sided_p(middle, df) < confidence else (low, middle)
    return high


def student(mean: float, error: float, df: int) -> Interval:
    """The interval of an estimate whose standard error has `df` degrees of freedom."""
    reach = t_quantile(df) * error
    p = two_sided_p(mean / error, df) if error else float(mean == 0)
    return Interval(mean, mean - reach, mean + reach, p, error, df)


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of one value a seed; None for fewer than two, which say nothing of the spread."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return student(mean, math.sqrt(variance / n), n - 1)


def block_length(n: int) -> int:
    """Tokens in a block: the square root of the text's length, far longer than the reach of one token's surprise."""
    return max(1, math.isqrt(n))


def over_text(differences: Tensor, *, length: int | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Circular block bootstrap of the mean of per-token differences (n,) in the order of the text.

    length: of a block; default `block_length(n)`. 1 where the differences are means over blocks already.
    Losses of neighbouring tokens are not independent, so whole blocks of consecutive tokens are drawn, which keeps
    the dependence within them. The interval is the basic (pivotal) one and the p-value its counterpart: how often a
    resampled mean strays from the observed mean by as much as that lies from 0.
    Source: Politis and Romano (1992), "A circular block-resampling procedure for stationary data"; Davison and Hinkley
    (1997), chapters 5.2 and 8.2.3; the +1 of the p-value, Phipson and Smyth (2010).
    """
    d = differences.double().cpu()
    n = len(d)
    length = length or block_length(n)
    n_blocks = -(-n // length)
    ends = torch.cat([d.new_zeros(1), torch.cat([d, d[: length - 1]]).cumsum(0)])
    starts = torch.randint(n, (resamples, n_blocks), generator=torch.Generator().manual_seed(seed))
    means = (ends[starts + length] - ends[starts]).mean(1) / length
    mean = float(d.mean())
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    stray = int(((means - mean).abs() >= abs(mean)).sum())
    return Interval(mean, 2 * mean - high, 2 * mean - low, (1 + stray) / (1 + resamples), float(means.std()))


def over_both(seeds: Interval, text: Interval) -> Interval:
    """The interval for another seed and another text of the same kind at once.

    The two variances add; the degrees of freedom are Satterthwaite's (1946), rounded down, with those of the text
    counted as infinite. Each variance holds the interaction of seed and text, so the sum is on the careful side.
    """
    error = math.hypot(seeds.error, text.error)
    if not seeds.error:
        return student(text.mean, error, MAX_DF)
    ratio = text.error / seeds.error
    growth = 1 + ratio * ratio  # of the variance; exactly 1 where the text adds nothing, so never fewer than the seeds
    return student(text.mean, error, int(min((seeds.df or 1) * growth * growth, MAX_DF)))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values adjusted for being looked at together: the chance of one false alarm among all stays at the level.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted, worst = {}, 0.0
    for k, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - k) * p_values[name]))
        adjusted[name] = worst
    return adjusted
