"""The answer in plain words, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .evidence import widest
from .settings import CONTROLS, SMALL, VARIANTS, of_variant
from .tables import number, span

MARGIN = 1.0  # per cent of perplexity that nobody would change a model for
LEVEL = 0.05
UNKNOWN = 10.0  # per cent of the test tokens, from which the verdict speaks of unknown words
COPIED = 5.0  # per cent of the test tokens, from which it speaks of text that is in the training text too
# per cent of cross-entropy; LSTMs (examples/ptb) with an output bias that the KL sees, the default initial embedding
# and alpha * KL up to 1.5% came out from 0.9% worse to 1.4% better than without the loss on test; with 1.6 to 9% better
# on parts of the Penn Treebank, and from 0.1% better to 2.5% worse on all of it; from 12% training failed
FAINT, STRONG = 2.0, 10.0
YES = (
    "with two seeds or more, none of which diverged, the variant is better by "
    f"{MARGIN:.0f}% of perplexity or more, the 95% interval over seeds and text leaves out 0, Holm's p is below "
    f"{LEVEL:g}, and it predicts the test text better than word counts do"
)
IN_WORDS = {"yes": "better", "no": "worse", "draw": "a draw", "one seed": "one seed", "undecided": "undecided"}


def decide(evidence: dict[str, Any], *, diverged: bool = False) -> str:
    """What a change against the baseline, or a control (evidence.py), shows: yes | no | draw | one seed | undecided.

    yes: all of `YES`. no: the same for a variant that is worse. draw: the whole interval lies within `MARGIN` on either
    side. one seed: one of these three, but of a single seed, which says nothing of others. undecided: all else, and
    whatever the seeds say that are left where a run of either `diverged`, or where neither predicts the test text
    better than word counts do.
    """
    if diverged or not evidence.get("beyond_counts", True):
        return "undecided"
    change, sure = evidence["percent"], widest(evidence)
    low, high = sure["percent"]
    differs = abs(change) >= MARGIN and (high < 0 or low > 0) and sure["p_holm"] < LEVEL
    equal = abs(change) < MARGIN and low > -MARGIN and high < MARGIN
    if not differs and not equal:
        return "undecided"
    if len(evidence["seeds"]) == 1:
        return "one seed"
    return "draw" if equal else "yes" if change < 0 else "no"


def outcomes(variants: dict[str, Any]) -> dict[str, str]:
    """What `decide` says of each variant that was compared with the baseline."""
    return {
        name: decide(v["evidence"], diverged=bool(diverged(variants, name, "baseline")))
        for name, v in variants.items()
        if v["evidence"]
    }


def best(variants: dict[str, Any]) -> str | None:
    """The name of the variant that the verdict speaks of, None where none was compared with the baseline.

    Of those that are proven to be better the best; where none is, of those that one seed proves; else of all. A control
    is not the method, and is none of them where there are others.
    """
    found = outcomes(variants)
    found = {name: said for name, said in found.items() if not variants[name]["smoothed"]} or found

    def rank(name: str) -> tuple[int, float]:
        change = variants[name]["evidence"]["percent"]
        proof = {"yes": 2, "one seed": 1}.get(found[name], 0) if change <= -MARGIN else 0
        return -proof, change

    return min(found, key=rank, default=None)


def limits(
    variants: dict[str, Any], tuned_for: str | None = None, config: Mapping[str, Any] | None = None
) -> list[str]:
    """What a comparison cannot tell, with the seeds that are finished so far.

    tuned_for: the variant that the settings were searched for, None where they were not searched. config: settings.
    """
    config = config or {}
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
        *_fairness(variants, tuned_for, config.get("overrides") or (), config.get("model")),
        *(stuck_target(config) if "real" in variants else ()),
        *_without_control(variants),
        "Words outside the vocabulary count as the one word <unk>, so perplexities of different texts or vocabularies "
        "cannot be compared.",
        "The test text is one sample of its kind: the intervals say nothing of texts of another kind.",
        "Speed is that of the whole training step on this machine, including the network around the loss; memory "
        "leaves out the activations of the network.",
    ]


def _fairness(
    variants: dict[str, Any], tuned_for: str | None, own: Collection[str], model: str | None
) -> Iterator[str]:
    """Whom the settings favour. own: the variants that have some of their own."""
    if own:
        yield "Variants have settings of their own: a better search for one of them can change the answer."
    mine, common = ([VARIANTS[name].label for name in variants if (name in own) is has] for has in (True, False))
    if mine and common:
        yield (
            f"{_list(common, 'has', 'have')} the settings that are common to all, without a search for them alone, "
            f"which favours {' and '.join(mine)}."
        )
    if tuned_for is not None:
        yield _searched_for(tuned_for)
    elif not own:
        text = "The settings are common to all variants, not tuned for each."
        if model == "lstm":
            text += " On little text one of them, --embedding-range, can matter more than the variant."
        yield text


def stuck_target(config: Mapping[str, Any]) -> Iterator[str]:
    """What examples/ptb saw of a +REAL without an output bias whose similarity target is a constant."""
    mine = of_variant(dict(config), "real")
    if mine.get("model") == "lstm" and not mine.get("tied_bias", True) and mine["gamma"] and not mine["target_grad"]:
        yield (
            "Without an output bias an LSTM's +REAL was worse than +RE on the Penn Treebank where its similarity "
            "target was a constant; --target-grad helped."
        )


def _without_control(variants: dict[str, Any]) -> Iterator[str]:
    """That the augmented loss has no control beside it."""
    missing = [CONTROLS[name] for name in variants if name in CONTROLS and CONTROLS[name] not in variants]
    if missing:
        yield (
            "Label smoothing, a simpler regulariser, may do as much as the augmented loss: "
            f"{' and '.join(missing)} among --variants would show how they compare."
        )


def _searched_for(tuned_for: str) -> str:
    favoured = "the baseline" if tuned_for == "baseline" else VARIANTS[tuned_for].label
    return (
        f"The settings (lr, dropout, ...) were searched for {favoured}; the other variants use them without a search "
        f"of their own, which favours {favoured}."
    )


def verdict(
    variants: dict[str, Any], n_seeds: int, corpus: dict[str, Any], *, fresh: bool = False
) -> tuple[str, list[str]]:
    """(outcome, sentences for a reader who knows nothing of language models; the first is the answer).

    The outcome is "nothing" without a variant to compare, else what `decide` says of the best; but where that is worse
    and another is unfinished or undecided, which may be better, "undecided". n_seeds: planned. corpus: `Corpus.facts`.
    fresh: whether the command has --fresh, which discards what is there.
    """
    done = {name: v for name, v in variants.items() if v["seeds_done"]}
    missing = [v["label"] for v in variants.values() if v["status"] not in ("done", "diverged")]
    outcome, name = "nothing", best(variants)
    sentences: list[str] = []
    if name is not None:
        outcome = outcomes(variants)[name]
        rivals = _rivals(variants, name)
        sentences = _against_baseline(variants, name, outcome, corpus, rivals)
        outcome = "undecided" if rivals else outcome
    elif len(done) >= 2:
        first = min(done.values(), key=lambda v: v["test_ppl"])
        baseline = "has not been trained to the end" if "baseline" in variants else "was not part of this test"
        sentences.append(
            f"{first['label']} predicts unseen text best (test perplexity {first['test_ppl']:.1f}); "
            f"the baseline {baseline}."
        )
    else:
        sentences.append("There is nothing to compare yet: fewer than two variants have been trained to the end.")
    sentences += _beside_controls(variants)
    if missing:
        of = "" if n_seeds == 1 else f" with all {n_seeds} seeds"
        again = "The same command without --fresh" if fresh else "The same command"
        sentences.append(f"The test is incomplete: {_list(missing)} not finished{of}. {again} continues it.")
    if lost := diverged(variants):
        runs = ", ".join(f"{label} with seed {seed} in epoch {epoch}" for label, seed, epoch in lost)
        sentences.append(
            f"Training diverged (the loss was no number any more): {runs}. The figures leave that out. "
            "A smaller --lr or --clip may help, with --fresh or another --out."
        )
    sentences += _taken_over(variants)
    return outcome, sentences


def _taken_over(variants: dict[str, Any]) -> Iterator[str]:
    """Which runs another comparison trained."""
    found: dict[str, list[str]] = {}
    for v in variants.values():
        runs = v.get("runs", ())
        for place in dict.fromkeys(run["taken_from"] for run in runs if run["taken_from"]):
            seeds = [str(run["seed"]) for run in runs if run["taken_from"] == place]
            which = "" if len(seeds) == len(runs) else f" (seed{'s' * (len(seeds) > 1)} {_names(seeds)})"
            found.setdefault(place, []).append(v["label"] + which)
    for place, labels in found.items():
        yield f"Taken over from the comparison in {place}: {_names(labels)}. Their training speed was measured then."


def diverged(variants: dict[str, Any], *names: str) -> list[tuple[str, int, int]]:
    """Label, seed and epoch of each run that diverged, of the variants `names`; default all."""
    return [
        (v["label"], run["seed"], round(run["epochs_done"]))
        for name, v in variants.items()
        for run in v.get("runs", ())
        if run["status"] == "diverged" and (not names or name in names)
    ]


def _rivals(variants: dict[str, Any], name: str) -> list[str]:
    """Labels of variants that may yet be better than the baseline where `name`, the best, is proven to be worse."""
    found = outcomes(variants)
    if found[name] not in ("no", "one seed") or variants[name]["evidence"]["percent"] < MARGIN:
        return []
    others = [(n, v) for n, v in variants.items() if n != "baseline" and not v["smoothed"]]
    return [v["label"] for n, v in others if found.get(n, "undecided") == "undecided"]


def _against_baseline(
    variants: dict[str, Any], name: str, outcome: str, corpus: dict[str, Any], rivals: list[str]
) -> list[str]:
    v, base = variants[name], variants["baseline"]
    answer = _answer(v, outcome, diverged(variants, name, "baseline"), rivals, _method(variants))
    counts, (new, old) = corpus.get("unigram_ppl", math.inf), v["evidence"]["test_ppl"]
    untaught = [who for who, ppl in ((v["label"], new), ("The baseline", old)) if ppl >= counts]
    if len(untaught) == 2:
        answer = (
            f"Undecided: neither {v['label']} (test perplexity {new:.1f}) nor the baseline ({old:.1f}) predicts unseen "
            f"text better than word counts do ({counts:.1f}), which know nothing of its order."
        )
    sentences = [_of_a_part(answer, corpus)]
    if len(untaught) == 1:
        sentences.append(f"{untaught[0]} is no better than word counts ({counts:.1f}).")
    if untaught:
        sentences.append("Such a training was too short, or failed.")
    if outcome == "one seed":
        sentences.append("Whether another random seed says the same is not known: --seeds 3 finds out.")
    if v["tied"]:
        sentences.append(
            f"It has {-v['change']['parameters']:.0f}% fewer parameters "
            f"({v['parameters']:,} instead of {base['parameters']:,})."
        )
    others = {other: said for other, said in outcomes(variants).items() if other != name}
    rest = [_briefly(variants[o]["label"], variants[o]["evidence"], said) for o, said in others.items()]
    if rest:
        sentences.append(f"The others against the baseline (less is better): {', '.join(rest)}.")
    if (unknown := 100 * corpus["oov_rate"]["test"]) > UNKNOWN:
        sentences.append(
            f"{unknown:.0f}% of the test tokens are words outside the vocabulary, all of them <unk>: much of what is "
            f"compared is how well that is predicted. {_wider_vocabulary(corpus)} may change the answer."
        )
    if (copied := 100 * (corpus.get("copied") or 0.0)) > COPIED:
        sentences.append(
            f"{copied:.0f}% of the test text stands in the training text word for word: much of what is compared is "
            "how well that is remembered. Without copies the answer may be another."
        )
    sentences += _early(variants, name, corpus)
    better = [n for n, said in outcomes(variants).items() if said in ("yes", "one seed")]
    if not any(variants[n]["augmented"] and variants[n]["evidence"]["percent"] <= -MARGIN for n in better):
        sentences += _strength(variants, corpus)
    sentences.append("Perplexity: among how many equally likely words the model hesitates on average. Less is better.")
    return sentences


def _of_a_part(answer: str, corpus: dict[str, Any]) -> str:
    """The answer, with how much of the training text it is about where that is not all."""
    used, whole = corpus["tokens"]["train"], corpus.get("whole_training_text") or 0
    if used >= whole:
        return answer
    start, rest = answer.split(": ", 1)
    return f"{start}: trained on {max(1.0, min(99.0, 100 * used / whole)):.0f}% of the text, {rest}"


def _method(variants: dict[str, Any]) -> list[str]:
    """Labels of what the answer speaks of where there are controls too, of which it does not; empty where none are."""
    others = {name: v for name, v in variants.items() if name != "baseline"}
    found = [v["label"] for v in others.values() if not v["smoothed"]]
    return found if len(found) < len(others) else []


def _beside_controls(variants: dict[str, Any]) -> Iterator[str]:
    """What the augmented loss does that label smoothing does not."""
    for name, v in variants.items():
        if control := v["control"]:
            said = decide(control, diverged=bool(diverged(variants, name, control["name"])))
            label = f"{v['label']} against {variants[control['name']]['label']}"
            yield f"{_briefly(label, control, said)}: the augmented loss against label smoothing."


def _wider_vocabulary(corpus: dict[str, Any]) -> str:
    """What can make fewer words unknown."""
    if "tokens_per_word" in corpus["vocabulary_facts"]:
        return "Another --tokenizer"
    if "<unk>" in (word for word, _ in corpus["unknown_words"]):
        return "The text as it was before somebody put <unk> into it, or --tokenizer,"
    return "A larger --vocab-size, or --tokenizer,"


def _early(variants: dict[str, Any], name: str, corpus: dict[str, Any]) -> list[str]:
    """Why a longer test may say something else: little of the text, or a training that had not come to its end."""
    sentences = []
    used, whole = corpus["tokens"]["train"], corpus.get("whole_training_text") or 0
    if used < whole:
        sentences.append(
            f"The test used {used:,} of the text's {whole:,} training tokens. With more text, or a longer "
            "training, the differences may be others."
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


def _strength(variants: dict[str, Any], corpus: dict[str, Any]) -> list[str]:
    """Why another gamma may say something else: an augmented loss that hardly counted, or drowned the cross-entropy."""
    doubt = ", though on a long text it was seen to do harm" if corpus["tokens"]["train"] >= SMALL else ""
    shares = {v["label"]: v["kl_share"] for v in variants.values() if v["evidence"] and v["kl_share"] is not None}
    sentences = []
    for was, better, but, chosen in (
        ("hardly counted", "A larger", doubt, [label for label, share in shares.items() if share < FAINT]),
        ("weighed heavily", "A smaller", "", [label for label, share in shares.items() if share > STRONG]),
    ):
        if chosen:
            said = " and ".join(f"{number(shares[label], '.1f', '%')} ({label})" for label in chosen)
            sentences.append(
                f"The augmented loss {was}: at the end of training its term, alpha KL, was {said} of the "
                f"cross-entropy. {better} --gamma may do more for {' and '.join(chosen)}{but}; tiedkl tune searches "
                "it, and --reuse spares a trial the runs without it."
            )
    return sentences


def _briefly(label: str, evidence: dict[str, Any], outcome: str) -> str:
    """A change with its interval, and what is proven."""
    change, interval = number(evidence["percent"], "+.1f", "%"), span(widest(evidence)["percent"], "+.1f")
    return f"{label} {change} ({interval}; {IN_WORDS[outcome]})"


def _answer(
    v: dict[str, Any], outcome: str, lost: list[tuple[str, int, int]], rivals: list[str], method: list[str]
) -> str:
    """The first sentence: the outcome, the size of the change, and its proof in brackets.

    lost: the runs of the variant and of the baseline that diverged. rivals: `_rivals`. method: `_method`.
    """
    evidence, label, sure = v["evidence"], v["label"], widest(v["evidence"])
    n_seeds, change, (low, high) = len(evidence["seeds"]), evidence["percent"], sure["percent"]
    new, old = evidence["test_ppl"]
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else "for another text of this kind"
    p = "p < 0.001" if sure["p_holm"] < 0.001 else f"p = {sure['p_holm']:.3f}"
    p = f", {p}" if n_seeds > 1 else ""  # of the text alone it would sound surer than one seed is
    figures = f"test perplexity {new:.1f} instead of {old:.1f}"
    signed = f"{number(change, '+.1f', '%')}, 95% interval {span((low, high), '+.1f', '%')}, {seeds}"
    small = f"is within {MARGIN:.0f}% of the baseline"
    if outcome == "undecided":
        source = f"{'one seed' if n_seeds == 1 else seeds} and this test text do not rule out"
        why = "training diverged, " + " and ".join(f"{who} with seed {seed}" for who, seed, _ in lost) if lost else ""
        if abs(change) < MARGIN:
            first = f"the best variant, {label}, {small}, but {why or f'{source} a larger difference'}"
        else:
            size = f"{abs(change):.1f}% {'better' if change < 0 else 'worse'}"
            first = f"{label} predicts unseen text {size} than the baseline, but {why or f'{source} chance'}"
        return f"Undecided: {first} ({signed}{p}; {figures})."
    if abs(change) < MARGIN:
        start = "A draw" if outcome == "draw" else "One seed"
        return f"{start}: the best variant, {label}, {small}, and so is the whole interval ({signed}; {figures})."
    ends = (-high, -low) if change < 0 else (low, high)
    proof = f"95% interval {span(ends, '.1f', '%')}, {seeds}{p}; {figures}"
    start = "One seed" if outcome == "one seed" else "Yes" if change < 0 else "No"
    if change < 0:
        text = "the test text" if outcome == "one seed" else "unseen text"
        return f"{start}: {label} predicts {text} {-change:.1f}% better than the baseline ({proof})."
    if rivals:
        rest = _list(rivals, "does", "do")
        return f"Undecided: {label} is {change:.1f}% worse than the baseline ({proof}), but what {rest} is not known."
    if len(method) == 1:
        return f"{start}: {label} is {change:.1f}% worse than the baseline ({proof})."
    none = f"none of {_names(method)}" if method else "nothing"
    return f"{start}: {none} beats the baseline on this text; {label} is nearest, {change:.1f}% worse ({proof})."


def _list(names: list[str], one: str = "is", more: str = "are") -> str:
    """The names and their verb."""
    return f"{_names(names)} {one if len(names) == 1 else more}"


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
