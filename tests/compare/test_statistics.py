"""Intervals and p-values against tables, exact formulas, and simulated texts with a known truth."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tiedkl.compare import statistics as st
from tiedkl.compare.evidence import Run, adjust, against, mean_curves, perplexity_interval

# two-sided 5% points and a tail, from printed tables (Abramowitz and Stegun 26.10; R's pt)
T_TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 30: 2.04227}


@pytest.mark.parametrize("df", T_TABLE)
def test_student_quantiles(df: int) -> None:
    assert st.t_quantile(df) == pytest.approx(T_TABLE[df], abs=1e-4)
    assert st.two_sided_p(T_TABLE[df], df) == pytest.approx(0.05, abs=1e-5)


def test_student_tail_and_normal_limit() -> None:
    assert st.two_sided_p(2.0, 5) == pytest.approx(0.1019395, abs=1e-6)
    assert st.two_sided_p(-2.0, 5) == st.two_sided_p(2.0, 5)
    assert st.two_sided_p(0.0, 4) == 1.0
    assert st.t_quantile(st.MAX_DF) == pytest.approx(1.96, abs=0.003)


def test_interval_over_seeds() -> None:
    interval = st.over_seeds([1.0, 2.0, 4.0])
    assert interval is not None
    assert interval.mean == pytest.approx(7 / 3)
    assert interval.error == pytest.approx(math.sqrt((7 / 3) / 3))  # variance 7/3 of three values
    assert interval.high - interval.mean == pytest.approx(4.30265 * interval.error, rel=1e-5)
    assert st.over_seeds([1.0]) is None
    same = st.over_seeds([0.5, 0.5])
    assert same is not None
    assert (same.low, same.high, same.p) == (0.5, 0.5, 0.0)


def test_independent_tokens_have_the_usual_interval() -> None:
    d = torch.randn(6000, generator=torch.Generator().manual_seed(3)).double()
    d = (d - d.mean()) / d.std() + 0.03
    interval = st.over_text(d)
    error = 1 / math.sqrt(6000)
    assert interval.mean == pytest.approx(0.03)
    assert interval.error == pytest.approx(error, rel=0.15)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert (interval.low + interval.high) / 2 == pytest.approx(0.03, abs=0.15 * error)
    assert interval.p == pytest.approx(math.erfc(0.03 / error / math.sqrt(2)), abs=0.02)
    assert st.over_text(d) == interval
    assert st.over_text(d - 0.03).p > 0.9
    assert st.over_text(d + 1).p < 1e-9
    assert (interval.p < 0.05) == (interval.low > 0)


def test_the_error_is_that_of_resampling_blocks() -> None:
    """The closed form against draws: the spread of the mean of four blocks of five, each at any of 20 places."""
    d = torch.arange(20).double() ** 1.5
    places = torch.randint(20, (200_000, 4, 1), generator=torch.Generator().manual_seed(2))
    means = d[(places + torch.arange(5)) % 20].mean((1, 2))
    interval = st.over_text(d, length=5)
    assert interval.error * math.sqrt(3 / 4) == pytest.approx(float(means.std()), rel=0.01)
    assert interval.df == 3
    assert interval.high - interval.mean == pytest.approx(3.18245 * interval.error, rel=1e-5)


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.4], [0.3, 0.3, 0.3]])
def test_a_single_block_says_nothing(values: list[float]) -> None:
    interval = st.over_text(torch.tensor(values), length=len(values))
    assert (interval.low, interval.high, interval.p) == (-math.inf, math.inf, 1.0)
    assert st.over_both(st.student(0.3, 0.1, 2), interval).p == 1.0


def test_neighbours_that_depend_on_each_other_are_less_evidence() -> None:
    """Each value ten times in a row: a tenth of the evidence, so an interval wider by sqrt(10)."""
    d = torch.randn(640, generator=torch.Generator().manual_seed(4)).repeat_interleave(10)
    wanted = float(d.std()) / math.sqrt(640)
    assert st.over_text(d).error == pytest.approx(wanted, rel=0.2)
    assert st.over_text(d).error > 2.5 * wanted / math.sqrt(10)


def filtered(kernel: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """n values, each a sum of neighbouring standard normal ones with the weights `kernel`, float64."""
    noise = torch.randn(n + len(kernel) - 1, generator=generator).double()
    return torch.nn.functional.conv1d(noise.view(1, 1, -1), kernel.view(1, 1, -1)).view(-1)


def powers(memory: float, n: int) -> torch.Tensor:
    """The weights of an autoregression whose values k apart correlate by memory**k."""
    return memory ** torch.arange(n, dtype=torch.float64).flip(0)


@pytest.mark.parametrize("n", [20, 60, 200, 900])
@pytest.mark.parametrize("kernel", [[1.0], [0.25, 0.5, 1.0]], ids=["independent", "short range"])
def test_the_interval_over_the_text_covers_the_truth_as_often_as_it_says(n: int, kernel: list[float]) -> None:
    """Texts of mean 0, of twenty tokens and more: at most 6.5% of 95% intervals miss it, and not next to none."""
    generator, missed, draws = torch.Generator().manual_seed(5), 0, 600
    for _ in range(draws):
        interval = st.over_text(filtered(torch.tensor(kernel).double(), n, generator))
        missed += not interval.low <= 0 <= interval.high
        assert (interval.p < 0.05) == (not interval.low <= 0 <= interval.high)
    assert 0.015 < missed / draws < 0.065


def autoregressive(n: int, memory: float, generator: torch.Generator) -> torch.Tensor:
    """A text of mean 0 whose tokens k apart correlate by memory**k; 0.3 of it, the rest is each token's own."""
    slow = filtered(powers(memory, int(8 / (1 - memory))), n, generator)
    return 0.3 * slow * math.sqrt(1 - memory**2) + 0.7 * torch.randn(n, generator=generator).double()


def test_blocks_grow_where_a_text_stays_with_a_subject() -> None:
    """Dependence over 100 tokens and more, where the square root of the length is 89: the longer blocks hold it."""
    generator = torch.Generator().manual_seed(6)
    held = {"as chosen": 0, "short": 0}
    for _ in range(70):
        d = autoregressive(8000, 0.99, generator)
        for name, length in (("as chosen", None), ("short", st.block_length(len(d)))):
            interval = st.over_text(d, length=length)
            held[name] += interval.low <= 0 <= interval.high
    assert held["as chosen"] >= 0.88 * 70
    assert held["short"] < held["as chosen"]
    lengths = [st.length_of_blocks(autoregressive(8000, 0.0, generator)) for _ in range(20)]
    assert sum(length < 100 for length in lengths) >= 17, "independent tokens need no longer blocks"


def test_the_automatic_block_length_is_that_of_the_formula() -> None:
    """Politis and White's optimum for an autoregression of order 1 whose coefficient is known: rho / (1 - rho^2)."""
    rho, n = 0.5, 4000
    generator = torch.Generator().manual_seed(7)
    found = [st.automatic_block_length(filtered(powers(rho, 40), n, generator)) for _ in range(20)]
    slope, spectrum = 2 * rho / (1 - rho) ** 2, (1 + rho) / (1 - rho)  # sums of |k| rho^|k| and rho^|k|
    wanted = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * n ** (1 / 3)
    assert sorted(found)[10] == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("values", [[], [1.0], [0.0] * 50, [2.0] * 500])
def test_no_dependence_is_found_where_there_is_nothing_to_see(values: list[float]) -> None:
    assert st.automatic_block_length(torch.tensor(values)) == 1.0


def test_blocks_of_losses_hold_the_mean_and_its_error() -> None:
    losses = torch.randn(9000, generator=torch.Generator().manual_seed(1)).repeat_interleave(3)[:20_000]
    blocks = st.block_means(losses)
    assert len(blocks) == 141  # of 141 or 142 tokens, the square root of 20,000
    assert float(blocks.mean()) == pytest.approx(float(losses.double().mean()), abs=1e-4)
    coarse, fine = st.over_text(blocks, length=1), st.over_text(losses)
    assert coarse.error == pytest.approx(fine.error, rel=0.15)


def test_both_sources_of_chance_add() -> None:
    seeds = st.Interval(0.1, 0, 0, 0.5, 0.03, 2)
    text = st.Interval(0.1, 0, 0, 0.5, 0.04, 200)
    both = st.over_both(seeds, text)
    assert both.error == pytest.approx(0.05)
    t = (0.03**2 * 4.30265 + 0.04**2 * 1.97190) / 0.05**2  # printed quantiles of 2 and 200 degrees of freedom
    assert both.high - both.mean == pytest.approx(t * 0.05, rel=1e-4)
    assert both.mean - both.low == pytest.approx(t * 0.05, rel=1e-4)


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.135, 0.2, 3.0])
def test_the_p_value_is_where_the_interval_ends_at_zero(mean: float) -> None:
    both = st.over_both(st.Interval(mean, 0, 0, 0.5, 0.03, 2), st.Interval(mean, 0, 0, 0.5, 0.04, 200))
    assert (both.p < 0.05) == (both.low > 0)
    alone = st.over_both(st.Interval(mean, 0, 0, 0.5, 0.03, 2), st.Interval(mean, 0, 0, 0.5, 0.0, 200))
    assert alone.p == pytest.approx(st.two_sided_p(mean / 0.03, 2), abs=1e-5)
    text = st.over_both(st.Interval(mean, 0, 0, 0.5, 0.0, 2), st.Interval(mean, 0, 0, 0.5, 0.04, 200))
    assert text.p == pytest.approx(st.two_sided_p(mean / 0.04, 200), abs=1e-5)


def test_without_any_chance_a_difference_is_certain() -> None:
    nothing = st.Interval(0.1, 0.1, 0.1, 0.5, 0.0, 1)
    assert st.over_both(nothing, nothing) == st.Interval(0.1, 0.1, 0.1, 0.0, 0.0, 0)
    assert st.over_both(nothing, nothing._replace(mean=0.0)).p == 1.0


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0, 4.0])
def test_the_interval_over_seeds_and_text_covers_the_truth(n_seeds: int, ratio: float) -> None:
    """`ratio`: the seeds' error over the text's. Of 95% intervals at most 6.5% may miss, and not next to none."""
    generator, missed, draws = torch.Generator().manual_seed(8), 0, 4000
    for _ in range(draws):
        z = torch.randn(n_seeds + 1, generator=generator).double()
        values = z[:n_seeds] * ratio * math.sqrt(n_seeds)
        mean, error = float(values.mean() + z[-1]), float(values.std() / math.sqrt(n_seeds))
        seeds = st.Interval(mean, 0, 0, 0, error, n_seeds - 1)
        text = st.Interval(mean, 0, 0, 0, 1.0, st.MAX_DF)
        missed += abs(mean) > st.margin_of_error(seeds, text)
    assert 0.015 < missed / draws < 0.065
    both = st.over_both(seeds, text)
    share = error**2 / (error**2 + 1)
    t = share * st.t_quantile(n_seeds - 1) + (1 - share) * st.t_quantile(st.MAX_DF)
    assert both.high - both.mean == pytest.approx(t * math.hypot(error, 1))


def test_holm() -> None:
    assert st.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert st.holm({"a": 0.4, "b": 0.9}) == pytest.approx({"a": 0.8, "b": 0.9})
    assert st.holm({}) == {}


def run(seed: int, shift: float, n: int = 400) -> Run:
    """A run whose losses share their noise with every other run, and part of it with runs of the same seed."""
    noise = torch.Generator().manual_seed(1)
    own = random.Random(seed).gauss(0, 0.05)
    losses = 4 + torch.randn(n, generator=noise) + own + shift
    return Run(seed, {"curves": []}, losses)


def test_pairs_cancel_what_they_share() -> None:
    base, better = [run(s, 0.0) for s in (1, 2, 3)], [run(s, -0.02) for s in (1, 2, 3)]
    found = against(base, better)
    assert found is not None
    assert found["seeds"] == [1, 2, 3]
    assert found["percent"] == pytest.approx(100 * math.expm1(-0.02), abs=1e-3)
    low, high = found["over_both"]["percent"]
    assert low == pytest.approx(high, abs=1e-2)  # nothing but the shift differs
    assert found["test_ppl"][0] < found["test_ppl"][1]
    unpaired = perplexity_interval(better)
    assert unpaired is not None
    assert unpaired[1] / unpaired[0] > 1.1


def test_only_seeds_that_both_have_finished_count() -> None:
    base, other = [run(1, 0.0), run(2, 0.0)], [run(2, 0.1), Run(3, {"curves": []}, None)]
    found = against(base, other)
    assert found is not None
    assert found["seeds"] == [2]
    assert found["over_seeds"] is None
    assert found["over_both"] is None
    assert against(base, [run(3, 0.0)]) is None
    assert against([], base) is None


def test_a_variant_of_one_seed_is_one_of_the_many_too() -> None:
    """Holm's correction is for every variant, by the interval that is shown of it."""

    def entry(p: float) -> dict[str, float]:
        return {"p": p, "p_holm": p}

    several = {"over_text": entry(0.001), "over_seeds": entry(0.2), "over_both": entry(0.03)}
    one = {"over_text": entry(0.02), "over_seeds": None, "over_both": None}
    adjust({"several": several, "one": one})
    assert several["over_both"]["p_holm"] == pytest.approx(0.04)  # the larger of the one's doubled p and its own
    assert one["over_text"]["p_holm"] == pytest.approx(0.04)
    assert several["over_text"]["p_holm"] == pytest.approx(0.002)


def test_adjusting_leaves_the_plain_p_values() -> None:
    base = [run(1, 0.0)]
    noise = torch.randn(400, generator=torch.Generator().manual_seed(9)) * 0.2
    changes = {k: against(base, [Run(1, {}, base[0].losses + noise * s + 0.01)]) for k, s in (("a", 1), ("b", 2))}
    plain = {k: c["over_text"]["p"] for k, c in changes.items() if c}
    adjust({**changes, "c": None})
    for k, p in st.holm(plain).items():
        assert changes[k]["over_text"]["p_holm"] == p
        assert changes[k]["over_text"]["p"] == plain[k]
    assert any(changes[k]["over_text"]["p_holm"] > plain[k] for k in plain)


def test_curves_are_means_of_the_seeds_that_got_so_far() -> None:
    def row(ce: float) -> dict[str, object]:
        return {"epoch": 1, "lr": 1.0, "train_ce": ce, "train_kl": None, "valid_ce": ce, "valid_ppl": math.exp(ce),
                "tokens_per_second": 10.0}  # fmt: skip

    runs = [Run(1, {"curves": [row(1.0), row(0.5)]}, None), Run(2, {"curves": [row(3.0)]}, None)]
    first, second = mean_curves(runs)
    assert (first["seeds"], second["seeds"]) == (2, 1)
    assert first["valid_ppl"] == pytest.approx(math.exp(2.0))
    assert (first["valid_low"], first["valid_high"]) == (math.exp(1.0), math.exp(3.0))
    assert second["valid_ppl"] == math.exp(0.5)
