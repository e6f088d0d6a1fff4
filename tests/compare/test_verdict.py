"""The answer of a comparison: every outcome, and what it must not claim."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tiedkl.compare import Settings
from tiedkl.compare.evidence import Run, kl_share
from tiedkl.compare.page import render
from tiedkl.compare.tables import certainty, p_value
from tiedkl.compare.verdict import YES, decide

from .made import built, run, three


def evidence(change: float, low: float, high: float, p: float = 0.001, n_seeds: int = 3) -> dict[str, Any]:
    """What `decide` reads; the interval is that over seeds and text, or over the text with one seed."""
    sure = {"percent": [low, high], "p_holm": p}
    unsure = {"percent": [-50.0, 50.0], "p_holm": 1.0}
    both = {"over_text": unsure, "over_both": sure} if n_seeds > 1 else {"over_text": sure, "over_both": None}
    return {"percent": change, "seeds": list(range(n_seeds)), **both}


@pytest.mark.parametrize(
    ("change", "low", "high", "p", "outcome"),
    [
        (-5.0, -6.0, -4.0, 0.001, "yes"),
        (-1.2, -2.3, -0.1, 0.04, "yes"),  # the estimate reaches the margin, the interval need not
        (-5.0, -6.0, -4.0, 0.06, "undecided"),
        (-5.0, -11.0, 1.0, 0.001, "undecided"),
        (5.0, 4.0, 6.0, 0.001, "no"),
        (5.0, 4.0, 6.0, 0.06, "undecided"),
        (5.0, -1.0, 11.0, 0.001, "undecided"),
        (-0.5, -0.9, -0.1, 0.001, "draw"),
        (0.2, -0.3, 0.7, 0.5, "draw"),
        (-0.5, -30.0, 42.0, 0.9, "undecided"),
        (-0.5, -1.1, 0.1, 0.2, "undecided"),
        (0.5, -0.1, 1.1, 0.2, "undecided"),
        (-0.9, -1.1, -0.7, 0.001, "undecided"),  # surely better, but by 1%?
    ],
)
def test_decision(change: float, low: float, high: float, p: float, outcome: str) -> None:
    assert decide(evidence(change, low, high, p)) == outcome
    alone = "undecided" if outcome == "undecided" else "one seed"
    assert decide(evidence(change, low, high, p, n_seeds=1)) == alone


@pytest.mark.parametrize(
    ("real", "spread", "outcome", "start"),
    [
        (90.0, 0.001, "yes", "Yes: +REAL predicts unseen text 10.0% better than the baseline (95% interval 9."),
        (
            105.0,
            0.001,
            "no",
            "No: nothing beats the baseline on this text; +REAL is nearest, 5.0% worse (95% interval ",
        ),
        (
            99.5,
            0.001,
            "draw",
            "A draw: the best variant, +REAL, is within 1% of the baseline, and so is the whole interval (-0.5%, 95% "
            "interval -0.",
        ),
        (
            99.5,
            0.15,
            "undecided",
            "Undecided: the best variant, +REAL, is within 1% of the baseline, but 3 seeds and this test text do not "
            "rule out a larger difference (-0.5%, 95% interval -3",
        ),
        (
            95.0,
            0.05,
            "undecided",
            "Undecided: +REAL predicts unseen text 5.0% better than the baseline, but 3 seeds and this test text do "
            "not rule out chance (-5.0%, 95% interval -1",
        ),
        (105.0, 0.1, "undecided", "Undecided: +REAL predicts unseen text 5.0% worse than the baseline, but 3 seeds"),
    ],
)
def test_verdict_of_three_seeds(real: float, spread: float, outcome: str, start: str) -> None:
    worse = three(150.0)
    data = built(3, baseline=three(100.0), al=worse, real=three(real, spread=spread, parameters=600))
    assert data["verdict"][0].startswith(start)
    assert data["outcome"] == outcome
    text = " ".join(data["verdict"])
    assert f"test perplexity {real:.1f} instead of 100.0" in text
    assert "3 seeds" in text
    assert "40% fewer parameters (600 instead of 1,000)" in text
    assert "+AL +50.0%" in text
    assert ('class="card verdict good"' in render(data)) == (outcome == "yes")
    assert ('<tr class="best">' in render(data)) == (outcome == "yes")


@pytest.mark.parametrize(
    ("real", "noise", "outcome", "start"),
    [
        (90.0, 0.02, "one seed", "One seed: +REAL predicts the test text 10.0% better than the baseline (95%"),
        (110.0, 0.02, "one seed", "One seed: nothing beats the baseline"),
        (99.9, 0.02, "one seed", "One seed: the best variant, +REAL, is within 1% of the baseline, and so is"),
        (97.0, 2.0, "undecided", "Undecided: +REAL predicts unseen text 3.0% better than the baseline, but one seed"),
        (99.9, 2.0, "undecided", "Undecided: the best variant, +REAL, is within 1% of the baseline, but one seed and"),
    ],
)
def test_verdict_of_one_seed_is_neither_yes_nor_no_nor_a_draw(
    real: float, noise: float, outcome: str, start: str
) -> None:
    data = built(baseline=run(110.0, 100.0), real=run(95.0, real, parameters=600, noise=noise))
    assert data["verdict"][0].startswith(start)
    assert data["outcome"] == outcome
    assert "for another text of this kind" in data["verdict"][0]
    assert "p =" not in data["verdict"][0], "that of the text alone sounds surer than one seed is"
    assert "p <" not in data["verdict"][0]
    assert ("--seeds 3" in data["verdict"][1]) == (outcome == "one seed")
    assert "one random seed" in data["limits"][0]


def test_a_gain_that_only_one_comparison_would_pass_is_undecided() -> None:
    """p-values are Holm's: the same change that decides alone does not decide as the best of three."""
    real = run(95.0, 98.6, parameters=600, noise=0.1)
    alone = built(baseline=run(110.0, 100.0, noise=0.1), real=real)
    p = alone["variants"]["real"]["evidence"]["over_text"]["p"]
    assert 0.05 / 3 < p < 0.05
    assert alone["outcome"] == "one seed"
    among = built(baseline=run(110.0, 100.0, noise=0.1), al=run(110.0, 100.0), re=run(110.0, 100.2), real=real)
    assert among["variants"]["real"]["evidence"]["over_text"]["p_holm"] == pytest.approx(3 * p)
    assert among["outcome"] == "undecided"


def test_the_verdict_speaks_of_a_proven_gain_before_a_larger_one_that_may_be_chance() -> None:
    proven = three(98.6, parameters=600)
    data = built(3, baseline=three(100.0), re=three(98.5, spread=0.05, parameters=610), real=proven)
    assert data["outcome"] == "yes"
    assert data["verdict"][0].startswith("Yes: +REAL predicts unseen text 1.4% better")
    assert "here: yes" in data["checklist"][0]["go_on_if"]
    others = next(text for text in data["verdict"] if text.startswith("The others"))
    assert others.startswith("The others against the baseline (less is better): +RE -1.5% (-")
    assert others.endswith("; undecided).")
    data = built(3, baseline=three(100.0), re=run(90.0, 90.0, parameters=610), real=proven)  # one seed proves less
    assert data["verdict"][0].startswith("Yes: +REAL")
    assert "+RE -9.9% (-10.1 to -9.7; one seed)" in " ".join(data["verdict"])


@pytest.mark.parametrize("rest", ["undecided", "unfinished", "diverged"])
def test_nothing_beats_the_baseline_only_where_every_variant_is_known(rest: str) -> None:
    worse, lost = three(101.5), run(120.0, None, seed=1, parameters=600, status="diverged")
    unfinished = run(120.0, None, parameters=600, status="partial")
    real = {"undecided": three(102.0, spread=0.06, parameters=600), "unfinished": unfinished, "diverged": lost}[rest]
    data = built(3, baseline=three(100.0), re=worse, real=real)
    assert data["outcome"] == "undecided"
    assert data["verdict"][0].startswith("Undecided: +RE is 1.5% worse than the baseline (95% interval 1.")
    assert data["verdict"][0].endswith("but what +REAL does is not known.")
    known = built(3, baseline=three(100.0), re=worse, real=three(102.0, parameters=600))
    assert known["outcome"] == "no"
    assert known["verdict"][0].startswith("No: nothing beats the baseline on this text; +RE is nearest, 1.5% worse")


@pytest.mark.parametrize("who", ["real", "baseline"])
def test_seeds_that_are_left_where_one_diverged_prove_nothing(who: str) -> None:
    runs = {"baseline": three(100.0), "real": three(95.0, parameters=600)}
    runs[who][1] = run(120.0, None, seed=2, status="diverged")
    data = built(3, **runs)
    label = data["variants"][who]["label"]
    assert data["outcome"] == "undecided"
    assert data["verdict"][0].startswith(
        f"Undecided: +REAL predicts unseen text 5.0% better than the baseline, but training diverged, {label} with "
        "seed 2 (-5.0%"
    )
    assert "here: undecided" in data["checklist"][0]["go_on_if"]
    runs["re"] = three(95.5, parameters=610)
    of_re = built(3, **runs)["outcome"]
    assert of_re == ("yes" if who == "real" else "undecided")


@pytest.mark.parametrize(("share", "said"), [(0.09, False), (0.6, True)])
def test_many_unknown_words_are_said(share: float, said: bool) -> None:
    rates = {"train": share, "valid": share, "test": share}
    text = " ".join(built(3, corpus={"oov_rate": rates}, baseline=three(100.0), real=three(95.0))["verdict"])
    assert ("60% of the test tokens are words outside the vocabulary" in text) == said


@pytest.mark.parametrize(
    ("counts", "outcome", "start", "worse"),
    [
        (101.0, "yes", "Yes", None),
        (99.0, "yes", "Yes", "The baseline"),
        (94.0, "undecided", "Undecided: neither +REAL (test", None),
    ],
)
def test_models_that_predict_no_better_than_word_counts_decide_nothing(
    counts: float, outcome: str, start: str, worse: str | None
) -> None:
    runs = {"re": three(97.0, parameters=600), "real": three(95.0, parameters=610)}
    data = built(3, corpus={"unigram_ppl": counts}, baseline=three(100.0), **runs)
    assert data["outcome"] == outcome
    assert data["verdict"][0].startswith(start)
    said = [s for s in data["verdict"] if "is no better than word counts" in s]
    assert said == ([f"{worse} is no better than word counts ({counts:.1f})."] if worse else [])
    assert any("too short, or failed" in s for s in data["verdict"]) == (counts < 100.0)
    rest = next(s for s in data["verdict"] if s.startswith("The others"))
    assert ("; undecided)" in rest) == (counts == 94.0), "+RE is no better than counts either"
    assert f"here: {outcome}" in data["checklist"][0]["go_on_if"]


def test_a_variant_worse_than_word_counts_is_said() -> None:
    data = built(3, corpus={"unigram_ppl": 103.0}, baseline=three(100.0), real=three(105.0))
    assert "+REAL is no better than word counts (103.0)." in data["verdict"]
    assert data["outcome"] == "no"


def test_a_proven_gain_below_word_counts_does_not_hide_one_above() -> None:
    runs = {"re": three(90.0, spread=0.08, parameters=600), "real": three(95.0, parameters=610)}
    assert built(3, baseline=three(100.0), **runs)["verdict"][0].startswith("Yes: +REAL")
    above = built(3, corpus={"unigram_ppl": 94.5}, baseline=three(100.0), **runs)
    assert above["verdict"][0].startswith("Undecided: +RE predicts unseen text")


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.049, False), (0.051, True)])
def test_text_that_is_in_training_too_is_said(share: float | None, said: bool) -> None:
    text = " ".join(built(3, corpus={"copied": share}, baseline=three(100.0), real=three(95.0))["verdict"])
    assert ("of the test text stands in the training text word for word" in text) == said


def test_what_may_make_fewer_words_unknown() -> None:
    def said(**corpus: Any) -> str:
        corpus |= {"oov_rate": dict.fromkeys(("train", "valid", "test"), 0.6)}
        return " ".join(built(3, corpus=corpus, baseline=three(100.0), real=three(95.0))["verdict"])

    assert "A larger --vocab-size, or --tokenizer, may change" in said()
    assert "Another --tokenizer may change" in said(vocabulary_facts={"tokens_per_word": 1.3})
    assert "The text as it was before somebody put <unk> into it" in said(unknown_words=[["<unk>", 9]])


def test_a_command_with_fresh_is_not_to_be_repeated() -> None:
    runs = {"baseline": three(100.0), "real": run(90.0, None, status="partial")}
    assert "The same command continues it." in built(3, **runs)["verdict"][-1]
    assert "The same command without --fresh continues it." in built(3, Settings(fresh=True), **runs)["verdict"][-1]


def test_settings_of_one_arm_alone_favour_it() -> None:
    runs = {"baseline": three(100.0), "re": three(97.0), "real": three(95.0)}
    limits = " ".join(built(3, overrides={"real": {"lr": 2.0}}, **runs)["limits"])
    assert "baseline and +RE have the settings that are common to all" in limits
    assert "which favours +REAL." in limits
    each = " ".join(built(3, overrides={name: {"lr": 2.0} for name in runs}, **runs)["limits"])
    assert "which favours" not in each
    tuned = built(3, Settings(tuned_for="real"), overrides={"re": {"gamma": 2.0}}, **runs)["limits"]
    assert any("were searched for +REAL" in text for text in tuned)


def test_the_augmented_loss_is_held_against_label_smoothing_where_that_is_there() -> None:
    """Each augmented variant against its own control, with an answer by the same rule; else the limits say so."""
    runs = {"baseline": three(100.0), "al": three(98.0), "re": three(97.0), "real": three(95.0)}
    alone = built(3, **runs)
    assert all(v["control"] is None for v in alone["variants"].values())
    assert "ls and re-ls among --variants would show how they compare." in " ".join(alone["limits"])
    data = built(3, **runs, **{"re-ls": three(90.0)})
    control = data["variants"]["real"]["control"]
    assert control["name"] == "re-ls"
    assert control["percent"] == pytest.approx(100 * (95 / 90 - 1), rel=1e-4)  # the losses are float32
    assert data["variants"]["al"]["control"] is None
    (said,) = [text for text in data["verdict"] if "against label smoothing" in text]
    assert said.startswith("+REAL against +RE+LS +5.6% (+")
    assert said.endswith("; worse): the augmented loss against label smoothing.")
    assert "ls among --variants would show how they compare." in " ".join(data["limits"])
    assert said in render(data)
    columns, rows = certainty(data)
    (row,) = [row for row in rows if row[0] == "+REAL vs +RE+LS"]
    assert row[1] == "+5.6%"
    assert row[-1] == p_value(control["over_both"]["p_holm"])
    assert len({len(row) for row in (columns, *rows)}) == 1

    whole = built(3, **runs, **{"re-ls": three(90.0), "ls": three(98.0, spread=0.02)})
    assert not any("Label smoothing" in text for text in whole["limits"])
    (al,) = [text for text in whole["verdict"] if text.startswith("+AL against +LS")]
    assert "; undecided)" in al
    lost = built(3, **runs, **{"re-ls": [*three(90.0)[:2], run(90.0, None, seed=3, status="diverged")]})
    assert any("+REAL against +RE+LS" in text and "; undecided)" in text for text in lost["verdict"])
    without = built(3, baseline=three(100.0), re=three(97.0), **{"re-ls": three(90.0)})
    assert not any("abel smoothing" in text for text in (*without["verdict"], *without["limits"]))
    pair = built(3, real=three(95.0), **{"re-ls": three(90.0)})  # no baseline
    assert any(text.startswith("+REAL against +RE+LS") for text in pair["verdict"])


@pytest.mark.parametrize(
    ("others", "start"),
    [
        (
            {"re": 103.0, "real": 102.0},
            "No: none of +RE and +REAL beats the baseline on this text; +REAL is nearest, 2",
        ),
        ({"real": 102.0}, "No: +REAL is 2.0% worse than the baseline ("),
        ({"real": 97.0}, "Yes: +REAL predicts unseen text 3.0% better"),
    ],
)
def test_a_control_is_not_the_method(others: dict[str, float], start: str) -> None:
    """However good it is: the question is whether the method helps."""
    runs = {name: three(test) for name, test in others.items()}
    data = built(3, baseline=three(100.0), **runs, ls=three(90.0), **{"re-ls": three(80.0)})
    assert data["verdict"][0].startswith(start)
    assert data["outcome"] == start.partition(":")[0].lower()
    assert "+LS -10.0% (" in " ".join(data["verdict"])
    assert data["checklist"][0]["seen"][0].startswith("+REAL")


def test_controls_alone_are_compared_all_the_same() -> None:
    assert built(3, baseline=three(100.0), ls=three(90.0))["verdict"][0].startswith(
        "Yes: +LS predicts unseen text 10.0%"
    )


def test_verdict_without_enough_results() -> None:
    alone = built(al=run(9.0, 9.0), re=run(8.0, 8.0))
    assert "baseline was not part" in alone["verdict"][0]
    nothing = built(baseline=run(9.0, None, status="partial"), re=None)
    assert "nothing to compare" in nothing["verdict"][0]
    assert "baseline and +RE are not finished" in nothing["verdict"][1]
    assert nothing["checklist"] == []
    assert alone["outcome"] == nothing["outcome"] == "nothing"
    assert nothing["limits"][0] == "No training run is finished yet."


def test_limits_speak_of_the_seeds_that_are_finished() -> None:
    """Three are planned; the fewest that a variant has finished count."""
    one = built(3, baseline=three(100.0)[:2], real=[*three(90.0)[:1], run(90.0, None, seed=2, status="partial")])
    assert one["limits"][0].startswith("One training run a variant, with one random seed")
    assert "1 seed" not in one["limits"][0]
    two = built(3, baseline=three(100.0), al=None, real=three(90.0)[:2])
    assert two["limits"][0].startswith("2 random seeds a variant")
    assert "3 random seeds planned" in render(two)
    whole = built(3, baseline=three(100.0), real=three(90.0))
    assert whole["limits"][0].startswith("3 random seeds a variant")
    assert "3 random seeds." in render(whole)


@pytest.mark.parametrize(("spread", "outcome"), [(0.001, "yes"), (0.008, "yes"), (0.05, "undecided")])
def test_the_checklist_asks_for_what_the_verdict_asks_for(spread: float, outcome: str) -> None:
    """0.008: an interval that crosses -1% is Yes in both, since the estimate decides."""
    data = built(3, baseline=three(100.0), real=three(98.0, spread=spread, parameters=600))
    low, high = data["variants"]["real"]["evidence"]["over_both"]["percent"]
    assert (spread == 0.008) == (low < -1 < high < 0)
    assert data["outcome"] == outcome
    condition = data["checklist"][0]["go_on_if"]
    assert YES in condition
    assert f"here: {outcome}" in condition


def test_a_shortened_text_and_a_training_cut_short_are_said() -> None:
    """Both make another answer likelier; neither is said of a whole text and a training that has come to rest."""

    def curve(*ppl: float) -> list[Run]:
        runs = three(90.0, parameters=600)
        for r in runs:
            row = r.result["curves"][0]
            r.result["curves"] = [row | {"valid_ppl": p, "valid_ce": math.log(p)} for p in ppl]
        return runs

    def said(runs: list[Run], **corpus: Any) -> str:
        return " ".join(built(3, corpus=corpus, baseline=curve(101.0, 100.5), real=runs)["verdict"])

    assert "One epoch is hardly a training" in said(curve(95.0))
    falling = said(curve(97.0, 95.0))
    assert "the last epoch still lowered validation perplexity by 2.1% (+REAL). More" in falling
    rest = said(curve(95.5, 95.0), whole_training_text=1000)
    assert "epoch" not in rest
    assert "training tokens" not in rest
    short = said(curve(95.5, 95.0), whole_training_text=50_000)
    assert "The test used 1,000 of the text's 50,000 training tokens." in short
    assert rest.startswith("A draw: the best variant, +REAL, is ")
    for whole, part in ((50_000, 2), (10**9, 1), (1001, 99)):
        text = said(curve(95.5, 95.0), whole_training_text=whole)
        assert text.startswith(f"A draw: trained on {part}% of the text, the best variant, +REAL, is ")


def learned(runs: list[Run], *kl: float | None) -> list[Run]:
    """`runs` with an epoch for each KL; the cross-entropy is 5, so the share in per cent is 200 times the last."""
    for r in runs:
        r.result["curves"] = [r.result["curves"][0] | {"train_kl": value} for value in kl]
    return runs


def strength(n_seeds: int = 3, *, n_train: int = 1000, **runs: list[Run]) -> str:
    """What the verdict says of the augmented loss."""
    corpus = {"tokens": {"train": n_train, "valid": 9, "test": 9}}
    said = built(n_seeds, corpus=corpus, baseline=learned(three(100.0)[:n_seeds], None, None), **runs)["verdict"]
    return " ".join(text for text in said if text.startswith("The augmented loss"))


@pytest.mark.parametrize(
    ("kl", "was", "better"),
    [
        (0.001, "hardly counted: at the end of training its term, alpha KL, was 0.2%", "A larger"),
        (0.0101, "", ""),
        (0.049, "", ""),
        (0.06, "weighed heavily: at the end of training its term, alpha KL, was 12.0%", "A smaller"),
    ],
)
def test_a_faint_and_a_strong_augmented_loss_are_said(kl: float, was: str, better: str) -> None:
    text = strength(real=learned(three(101.0, parameters=600), 0.03, kl))
    whole = f"The augmented loss {was} (+REAL) of the cross-entropy. {better} --gamma may do more for +REAL; "
    assert text.startswith(whole) if was else not text
    long = strength(n_train=300_000, real=learned(three(101.0, parameters=600), 0.03, kl))
    assert ("seen to do harm; tiedkl tune" in long) == (better == "A larger")


def test_the_strength_is_said_of_finished_variants_where_it_may_change_the_answer() -> None:
    faint = learned(three(99.9, parameters=700), 0.03, 0.001)
    strong = learned(three(101.0, parameters=600), 0.03, 0.06)
    text = strength(al=faint, real=strong)
    assert "hardly counted: at the end of training its term, alpha KL, was 0.2% (+AL) of" in text
    assert "weighed heavily: at the end of training its term, alpha KL, was 12.0% (+REAL) of" in text
    assert "0.2% (+AL) and 0.2% (+REAL)" in strength(al=faint, real=faint)
    for n_seeds in (1, 3):  # +REAL is the answer as it is; +RE is not, whatever its gain
        better = learned(three(90.0, parameters=600)[:n_seeds], 0.03, 0.001)
        assert not strength(n_seeds, real=better)
        assert "hardly" in strength(
            n_seeds, real=faint[:n_seeds], re=learned(three(90.0, parameters=800), None)[:n_seeds]
        )
    started = learned([run(120.0, None, status="partial", parameters=600)], 0.001)
    assert not strength(re=learned(three(90.0, parameters=800), None), real=started)  # not its end


def test_the_share_of_the_augmented_loss() -> None:
    runs = {"baseline": learned(three(100.0), None), "real": learned(three(99.0, parameters=600), 0.03, 0.01)}
    variants = built(3, **runs)["variants"]
    assert variants["baseline"]["kl_share"] is None
    assert variants["real"]["kl_share"] == pytest.approx(2.0)
    variants = built(3, overrides={"real": {"gamma": 5.0}}, **runs)["variants"]
    assert variants["real"]["kl_share"] == pytest.approx(20.0)
    settings = {"gamma": 0.5, "temperature": 20.0}
    assert kl_share([], settings) is None
    assert kl_share([{"train_kl": 0.1, "train_ce": 0.0}], settings) is None
