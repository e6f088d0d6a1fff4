"""The answer in plain words, with its uncertainty."""

from __future__ import annotations

from typing import Any

MARGIN = 1.0  # per cent of perplexity that nobody would change a model for
LEVEL = 0.05


def limits(n_seeds: int) -> list[str]:
    """What a comparison cannot tell."""
    first = (
        "One training run a variant, with one random seed: differences of a few per cent can change with the seed."
        if n_seeds == 1
        else f"{n_seeds} random seeds a variant: the spread between seeds is itself only roughly known."
    )
    return [
        first,
        "A small model and a short training; larger models and longer training can change the order of the variants.",
        "The settings are common to all variants, not tuned for each.",
        "Words outside the vocabulary count as the one word <unk>, so perplexities of different texts or vocabularies "
        "cannot be compared.",
        "The test text is one sample of its kind: the intervals say nothing of texts of another kind.",
        "Speed is that of the whole training step on this machine, including the network around the loss; memory "
        "leaves out the activations of the network.",
    ]


def verdict(variants: dict[str, Any], n_seeds: int) -> tuple[str, list[str]]:
    """(outcome, sentences for a reader who knows nothing of language models; the first is the answer).

    Yes needs three things: the best variant is better by `MARGIN` or more, its interval for other seeds and texts
    leaves out 0, and so does Holm's p-value, since the best of several was picked.
    """
    done = {name: v for name, v in variants.items() if v["seeds_done"]}
    missing = [v["label"] for v in variants.values() if v["status"] not in ("done", "diverged")]
    compared = [v for v in done.values() if v["evidence"]]
    outcome = "nothing"
    sentences: list[str] = []
    if compared:
        outcome, sentences = _against_baseline(compared, variants["baseline"])
    elif len(done) >= 2:
        best = min(done.values(), key=lambda v: v["test_ppl"])
        baseline = "has not been trained to the end" if "baseline" in variants else "was not part of this test"
        sentences.append(
            f"{best['label']} predicts unseen text best (test perplexity {best['test_ppl']:.1f}); "
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


def _against_baseline(compared: list[dict[str, Any]], base: dict[str, Any]) -> tuple[str, list[str]]:
    best = min(compared, key=lambda v: v["evidence"]["percent"])
    outcome, first = _answer(best)
    sentences = [first]
    if outcome == "one seed":
        sentences.append("Whether another random seed says the same is not known: --seeds 3 finds out.")
    if best["tied"]:
        sentences.append(
            f"It has {-best['change']['parameters']:.0f}% fewer parameters "
            f"({best['parameters']:,} instead of {base['parameters']:,})."
        )
    rest = [f"{v['label']} {_signed(v['evidence']['percent'])}" for v in compared if v is not best]
    if rest:
        sentences.append(f"The others against the baseline: {', '.join(rest)} (less is better).")
    sentences.append("Perplexity: among how many equally likely words the model hesitates on average. Less is better.")
    return outcome, sentences


def _answer(best: dict[str, Any]) -> tuple[str, str]:
    evidence, label = best["evidence"], best["label"]
    n_seeds, change = len(evidence["seeds"]), evidence["percent"]
    sure = evidence["over_both"] or evidence["over_text"]
    new, old = evidence["test_ppl"]
    p = "p < 0.001" if sure["p_holm"] < 0.001 else f"p = {sure['p_holm']:.3f}"
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else "for another text of this kind"
    low, high = sure["percent"]
    figures = f"test perplexity {new:.1f} instead of {old:.1f}"
    proof = f"95% interval {-high:.1f} to {-low:.1f}%, {seeds}, {p}; {figures}"
    harm = f"95% interval {low:.1f} to {high:.1f}%, {seeds}, {p}; {figures}"
    decided = sure["p_holm"] < LEVEL and (high < 0 or low > 0)
    if abs(change) < MARGIN:
        return "draw", (
            f"A draw: the best variant, {label}, is within {MARGIN:.0f}% of the baseline "
            f"({change:+.1f}%, 95% interval {low:+.1f} to {high:+.1f}%, {seeds}; {figures})."
        )
    if not decided:
        more = "one seed" if n_seeds == 1 else f"{n_seeds} seeds"
        direction = "better" if change < 0 else "worse"
        return "draw", (
            f"A draw so far: {label} predicts unseen text {abs(change):.1f}% {direction} than the baseline, but {more} "
            f"and this test text do not rule out chance ({proof if change < 0 else harm})."
        )
    if n_seeds == 1:
        if change < 0:
            return "one seed", (
                f"One seed: {label} predicts the test text {-change:.1f}% better than the baseline ({proof})."
            )
        return "one seed", (
            f"One seed: nothing beats the baseline on this text; {label} is nearest, {change:.1f}% worse ({harm})."
        )
    if change < 0:
        return "yes", f"Yes: {label} predicts unseen text {-change:.1f}% better than the baseline ({proof})."
    return "no", (f"No: nothing beats the baseline on this text; {label} is nearest, {change:.1f}% worse ({harm}).")


def _signed(percent: float) -> str:
    return f"{percent:+.1f}%".replace("-0.0%", "0.0%").replace("+0.0%", "0.0%")


def _list(names: list[str]) -> str:
    return names[0] + " is" if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]} are"
