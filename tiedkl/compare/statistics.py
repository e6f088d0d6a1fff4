"""How sure a difference is: Student's t over seeds and over blocks of the test text, Holm's correction.

Differences are in nats a token, new minus old, so that less than 0 is better; `percent` turns them into perplexity.
Nothing is drawn: the same losses give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95
MAX_DF = 1000  # beyond it Student's t is the normal distribution to three digits
SMALLEST_P = 1e-6  # that is told from 0
QUIET_LAGS = 5  # so many correlations that could be chance end a dependence
LEAST_BLOCKS = 10


class Interval(NamedTuple):
    """An estimate with a two-sided interval, and the p-value of "the truth is 0"; all but p in nats."""

    mean: float
    low: float
    high: float
    p: float
    error: float  # standard error of the mean
    df: int  # degrees of freedom of that error; 0 where it has no single number of them


def perplexity(ce: float) -> float:
    """exp(ce), ce in nats a token; infinite where that overflows."""
    return math.exp(ce) if ce < 700 else math.inf


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


@lru_cache
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
    margin = t_quantile(df) * error
    p = two_sided_p(mean / error, df) if error else float(mean == 0)
    return Interval(mean, mean - margin, mean + margin, p, error, df)


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of one value a seed; None for fewer than two, which say nothing of the spread."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return student(mean, math.sqrt(variance / n), n - 1)


def block_length(n: int) -> int:
    """Tokens in a block at least: the square root of the text's length."""
    return max(1, math.isqrt(n))


def block_means(values: Tensor) -> Tensor:
    """Means over consecutive blocks of about `block_length(n)` tokens of values (n,), float64."""
    return torch.stack([part.mean() for part in values.double().tensor_split(len(values) // block_length(len(values)))])


def automatic_block_length(values: Tensor) -> float:
    """Of the circular bootstrap of the mean of values (n,): 1 or more, n / 10 at most.

    Source: Politis and White (2004), "Automatic block-length selection for the dependent bootstrap", with the
    correction of Patton, Politis and White (2009). Correlations below twice their standard error count as none.
    """
    x = values.double().cpu() - values.double().mean()
    n = len(x)
    most = math.isqrt(n - 1) + 1 + QUIET_LAGS if n > 1 else 0  # lags
    if n <= most + QUIET_LAGS or not bool(x.any()):
        return 1.0
    covariance = torch.stack([x[k:] @ x[: n - k] for k in range(most + QUIET_LAGS + 1)]) / n
    significant = (covariance / covariance[0]).abs() >= 2 * math.sqrt(math.log10(n) / n)
    last = next((m for m in range(most) if not significant[m + 1 : m + 1 + QUIET_LAGS].any()), most)
    if not last:
        return 1.0
    lags = torch.arange(1, min(2 * last, most) + 1, dtype=torch.float64)
    window = (2 * (1 - lags / lags[-1])).clamp(0, 1)  # flat, then a slope
    weighed = 2 * window * covariance[1 : len(lags) + 1]
    spectrum = float(covariance[0] + weighed.sum())
    if spectrum <= 0:
        return 1.0
    slope = float((lags * weighed).sum())
    length = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * n ** (1 / 3)
    return min(max(1.0, length), max(1.0, n / LEAST_BLOCKS))


def length_of_blocks(differences: Tensor, *, means: bool = False) -> int:
    """Values in a block of per-token differences (n,): `block_length`, longer where the text asks.

    means: the differences are those of `block_means` already, of which a block may be one.
    Texts speak of one thing for a while, so tokens hundreds of places apart may depend on each other, each pair too
    little to be seen; in means over blocks it is.
    """
    if means:
        return round(automatic_block_length(differences))
    return round(block_length(len(differences)) * automatic_block_length(block_means(differences)))


def over_text(differences: Tensor, *, length: int | None = None) -> Interval:
    """Student's interval of the mean of per-token differences (n,) in the order of the text.

    length: of a block; default `length_of_blocks(differences)`.
    Losses of neighbouring tokens are not independent, so the error is that of resampling whole blocks of consecutive
    tokens on a circle, which keeps the dependence within them: the spread of the means of all n such blocks, without a
    draw. n / length blocks make one text, and one less are the degrees of freedom. A single block says nothing.
    Source: Kuensch (1989), "The jackknife and the bootstrap for general stationary observations"; Politis and Romano
    (1992), "A circular block-resampling procedure for stationary data".
    """
    d = differences.double().cpu()
    n = len(d)
    length = min(length or length_of_blocks(d), n)
    mean, n_blocks = float(d.mean()), n / length
    if n_blocks < 2:
        return student(mean, math.inf, 1)
    ends = torch.cat([d.new_zeros(1), torch.cat([d, d[: length - 1]]).cumsum(0)])
    means = (ends[length:] - ends[:-length]) / length
    error = math.sqrt(float((means - mean).square().mean()) / (n_blocks - 1))
    return student(mean, error, min(math.floor(n_blocks) - 1, MAX_DF))


def margin_of_error(seeds: Interval, text: Interval, confidence: float = CONFIDENCE) -> float:
    """Half the width of the interval for another seed and another text of the same kind at once; 0 without any error.

    The two variances add, each with its own degrees of freedom. Student's t is the mean of the two quantiles, weighted
    by the variances. Simulated with two to five seeds and a long text, 2 to 6% of its 95% intervals miss the truth.
    Source: Cochran (1964), "Approximate significance levels of the Behrens-Fisher test".
    """
    error = math.hypot(seeds.error, text.error)
    share = (seeds.error / error) ** 2 if error else 0.0
    t = share * t_quantile(seeds.df, confidence) if share else 0.0
    return error * (t + (1 - share) * t_quantile(text.df, confidence))


def over_both(seeds: Interval, text: Interval) -> Interval:
    """The interval for another seed and another text of the same kind at once (`margin_of_error`)."""
    error, margin = math.hypot(seeds.error, text.error), margin_of_error(seeds, text)
    if not error:
        return Interval(text.mean, text.mean, text.mean, float(text.mean == 0), 0.0, 0)
    low, high = 0.0, 1.0 - SMALLEST_P  # the confidence at which the interval ends at 0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if margin_of_error(seeds, text, middle) < abs(text.mean) else (low, middle)
    return Interval(text.mean, text.mean - margin, text.mean + margin, 1.0 - low, error, 0)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values adjusted for being looked at together: the chance of one false alarm among all stays at the level.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted, worst = {}, 0.0
    for k, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - k) * p_values[name]))
        adjusted[name] = worst
    return adjusted
