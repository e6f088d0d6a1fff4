"""The answer in plain words, with its uncertainty."""

from __future__ import annotations

from typing import Any

from .evidence import surest
from .settings import VARIANTS
from .tables import number, span

MARGIN = 1.0  # per cent of perplexity that nobody would change a model for
LEVEL = 0.05
# per cent of cross-entropy; LSTMs (examples/ptb) with alpha * KL up to 1.4% came out within a per cent of those without
# the loss, with 1.6 to 9% better, and failed from 12%
FAINT, STRONG = 2.0, 10.0
YES = (
    f"with two seeds or more the variant is better by {MARGIN:.0f}% of perplexity or more, the 95% interval over seeds "
    f"and text leaves out 0, and Holm's p is below {LEVEL:g}"
)


def decide(evidence: dict[str, Any]) -> str:
    """What a change against the baseline (evidence.py) shows: yes | no | draw | one seed | undecided.

    yes: all of `YES`. no: the same for a variant that is worse. draw: the whole interval lies within `MARGIN` on either
    side. one seed: one of these three, but of a single seed, which says nothing of others. undecided: all else.
    """
    change, sure = evidence["percent"], surest(evidence)
    low, high = sure["percent"]
    differs = abs(change) >= MARGIN and (high < 0 or low > 0) and sure["p_holm"] < LEVEL
    equal = abs(change) < MARGIN and low > -MARGIN and high < MARGIN
    if not differs and not equal:
        return "undecided"
    if len(evidence["seeds"]) == 1:
        return "one seed"
    return "draw" if equal else "yes" if change < 0 else "no"


def best(variants: dict[str, Any]) -> str | None:
    """The name of the best of the variants that were compared with the baseline: the verdict speaks of it."""
    changes = {name: v["evidence"]["percent"] for name, v in variants.items() if v["evidence"]}
    return min(changes, key=lambda name: changes[name]) if changes else None


def limits(variants: dict[str, Any], tuned_for: str | None = None, *, own: bool = False) -> list[str]:
    """What a comparison cannot tell, with the seeds that are finished so far.

    tuned_for: the variant that the settings were searched for, None where they were not searched. own: whether variants
    have settings of their own.
    """
    n_seeds = min((len(v["seeds_done"]) for v in variants.values() if v["seeds_done"]), default=0)
    if n_seeds == 0:
        first = "No training run is finished yet."
    elif n_seeds == 1:
        first = "One training run a variant, with one random seed: another can change differences of a few per cent."
    else:
        first = f"{n_seeds} random seeds a variant: the spread between seeds is itself only roughly known."
    return [
        first,
        "A small model and a short training; larger models and longer training can change the order of the variants.",
        "Variants have settings of their own: a better search for one of them can change the answer."
        if own
        else _fairness(tuned_for),
        "Words outside the vocabulary count as the one word <unk>, so perplexities of different texts or vocabularies "
        "cannot be compared.",
        "The test text is one sample of its kind: the intervals say nothing of texts of another kind.",
        "Speed is that of the whole training step on this machine, including the network around the loss; memory "
        "leaves out the activations of the network.",
    ]


def _fairness(tuned_for: str | None) -> str:
    if tuned_for is None:
        return "The settings are common to all variants, not tuned for each."
    baseline = tuned_for == "baseline"
    favoured = "the baseline" if baseline else VARIANTS[tuned_for].label
    others, own = ("the other variants use", "their") if baseline else ("the baseline uses", "its")
    return (
        f"The settings (lr, dropout, ...) were searched for {favoured}; {others} them without a search of {own} own, "
        f"which favours {favoured}."
    )


def verdict(variants: dict[str, Any], n_seeds: int, corpus: dict[str, Any]) -> tuple[str, list[str]]:
    """(outcome, sentences for a reader who knows nothing of language models; the first is the answer).

    The outcome is "nothing" without a variant to compare, else what `decide` says of the best. n_seeds: planned.
    corpus: `Corpus.facts`.
    """
    done = {name: v for name, v in variants.items() if v["seeds_done"]}
    missing = [v["label"] for v in variants.values() if v["status"] not in ("done", "diverged")]
    outcome, name = "nothing", best(variants)
    sentences: list[str] = []
    if name is not None:
        outcome = decide(variants[name]["evidence"])
        sentences = _against_baseline(variants, name, outcome, corpus)
    elif len(done) >= 2:
        first = min(done.values(), key=lambda v: v["test_ppl"])
        baseline = "has not been trained to the end" if "baseline" in variants else "was not part of this test"
        sentences.append(
            f"{first['label']} predicts unseen text best (test perplexity {first['test_ppl']:.1f}); "
            f"the baseline {baseline}."
        )
    else:
        sentences.append("There is nothing to compare yet: fewer than two variants have been trained to the end.")
    if missing:
        of = "" if n_seeds == 1 else f" with all {n_seeds} seeds"
        sentences.append(f"The test is incomplete: {_list(missing)} not finished{of}. The same command continues it.")
    if lost := diverged(variants):
        runs = ", ".join(f"{label} with seed {seed} in epoch {epoch}" for label, seed, epoch in lost)
        sentences.append(
            f"Training diverged (the loss was no number any more): {runs}. The figures leave that out. "
            "A smaller --lr or --clip may help, with --fresh or another --out."
        )
    return outcome, sentences


def diverged(variants: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Label, seed and epoch of each run that diverged."""
    return [
        (v["label"], run["seed"], round(run["epochs_done"]))
        for v in variants.values()
        for run in v.get("runs", ())
        if run["status"] == "diverged"
    ]


def _against_baseline(variants: dict[str, Any], name: str, outcome: str, corpus: dict[str, Any]) -> list[str]:
    v, base = variants[name], variants["baseline"]
    sentences = [_answer(v, outcome)]
    if outcome == "one seed":
        sentences.append("Whether another random seed says the same is not known: --seeds 3 finds out.")
    if v["tied"]:
        sentences.append(
            f"It has {-v['change']['parameters']:.0f}% fewer parameters "
            f"({v['parameters']:,} instead of {base['parameters']:,})."
        )
    others = [other for other in variants.values() if other["evidence"] and other is not v]
    rest = [f"{other['label']} {number(other['evidence']['percent'], '+.1f', '%')}" for other in others]
    if rest:
        sentences.append(f"The others against the baseline: {', '.join(rest)} (less is better).")
    sentences += _early(variants, name, corpus)
    if not (v["augmented"] and outcome in ("yes", "one seed") and v["evidence"]["percent"] <= -MARGIN):
        sentences += _strength(variants)
    sentences.append("Perplexity: among how many equally likely words the model hesitates on average. Less is better.")
    return sentences


def _early(variants: dict[str, Any], name: str, corpus: dict[str, Any]) -> list[str]:
    """Why a longer test may say something else: little of the text, or a training that had not come to its end."""
    sentences = []
    used, whole = corpus["tokens"]["train"], corpus.get("whole_training_text") or 0
    if used < whole:
        sentences.append(
            f"The test used {used:,} of the text's {whole:,} training tokens. With more text the variants usually "
            "differ less."
        )
    pair = (variants["baseline"], variants[name])
    if any(len(v["curves"]) < 2 for v in pair):
        return [*sentences, "One epoch is hardly a training: more --epochs may change the answer."]
    falls = [(v["label"], 100 * (1 - v["curves"][-1]["valid_ppl"] / v["curves"][-2]["valid_ppl"])) for v in pair]
    if said := " and ".join(f"{fall:.1f}% ({label})" for label, fall in falls if fall > MARGIN):
        sentences.append(
            f"Training had not come to its end: the last epoch still lowered validation perplexity by {said}. "
            "More --epochs may change the answer."
        )
    return sentences


def _strength(variants: dict[str, Any]) -> list[str]:
    """Why another gamma may say something else: an augmented loss that hardly counted, or drowned the cross-entropy."""
    shares = {v["label"]: v["kl_share"] for v in variants.values() if v["evidence"] and v["kl_share"] is not None}
    sentences = []
    for was, better, chosen in (
        ("hardly counted", "A larger", [label for label, share in shares.items() if share < FAINT]),
        ("weighed heavily", "A smaller", [label for label, share in shares.items() if share > STRONG]),
    ):
        if chosen:
            said = " and ".join(f"{number(shares[label], '.1f', '%')} ({label})" for label in chosen)
            sentences.append(
                f"The augmented loss {was}: at the end of training its term, alpha KL, was {said} of the "
                f"cross-entropy. {better} --gamma may do more for {' and '.join(chosen)}; tiedkl tune searches it."
            )
    return sentences


def _answer(v: dict[str, Any], outcome: str) -> str:
    """The first sentence: the outcome, the size of the change, and its proof in brackets."""
    evidence, label, sure = v["evidence"], v["label"], surest(v["evidence"])
    n_seeds, change, (low, high) = len(evidence["seeds"]), evidence["percent"], sure["percent"]
    new, old = evidence["test_ppl"]
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else "for another text of this kind"
    p = "p < 0.001" if sure["p_holm"] < 0.001 else f"p = {sure['p_holm']:.3f}"
    figures = f"test perplexity {new:.1f} instead of {old:.1f}"
    signed = f"{number(change, '+.1f', '%')}, 95% interval {span((low, high), '+.1f', '%')}, {seeds}"
    small = f"is within {MARGIN:.0f}% of the baseline"
    if outcome == "undecided":
        source = f"{'one seed' if n_seeds == 1 else seeds} and this test text do not rule out"
        if abs(change) < MARGIN:
            first = f"the best variant, {label}, {small}, but {source} a larger difference"
        else:
            size = f"{abs(change):.1f}% {'better' if change < 0 else 'worse'}"
            first = f"{label} predicts unseen text {size} than the baseline, but {source} chance"
        return f"Undecided: {first} ({signed}, {p}; {figures})."
    if abs(change) < MARGIN:
        start = "A draw" if outcome == "draw" else "One seed"
        return f"{start}: the best variant, {label}, {small}, and so is the whole interval ({signed}; {figures})."
    ends = (-high, -low) if change < 0 else (low, high)
    proof = f"95% interval {span(ends, '.1f', '%')}, {seeds}, {p}; {figures}"
    start = "One seed" if outcome == "one seed" else "Yes" if change < 0 else "No"
    if change < 0:
        text = "the test text" if outcome == "one seed" else "unseen text"
        return f"{start}: {label} predicts {text} {-change:.1f}% better than the baseline ({proof})."
    return f"{start}: nothing beats the baseline on this text; {label} is nearest, {change:.1f}% worse ({proof})."


def _list(names: list[str]) -> str:
    return names[0] + " is" if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]} are"
