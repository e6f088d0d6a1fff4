"""The tables and curves in results/ and the table in README.md, from the figures of run.py and the other scripts.

python examples/ptb/tables.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import predictions
import subspaces
import torch
from experiments import experiments
from page import as_file, markdown, source
from run import read

from tiedkl.compare import plots
from tiedkl.compare.evidence import Run, adjust, against, finished, kl_share, mean_curves, perplexity_interval, widest
from tiedkl.compare.plots import COLOURS
from tiedkl.compare.settings import PAPER_VARIANTS, VARIANTS
from tiedkl.compare.store import LATER
from tiedkl.compare.tables import number, span
from tiedkl.compare.verdict import LEVEL

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
PUBLISHED = {  # units -> validation and test perplexity on the Penn Treebank, Inan et al. (2017), Table 1
    200: {"baseline": (92.6, 87.3), "al": (86.3, 82.9), "re": (89.9, 85.1), "real": (86.3, 82.7)},
    650: {"baseline": (82.0, 77.7), "al": (77.4, 74.7), "re": (77.1, 73.9), "real": (75.7, 73.2)},
    1500: {"baseline": (76.8, 72.6), "al": (74.5, 71.2), "re": (72.5, 69.0), "real": (71.1, 68.5)},
}
# units of the trainings on all of the text
UNITS = {
    name: runs[0].settings["hidden"]
    for name, runs in experiments().items()
    if runs[0].fraction == 1 and not runs[0].help_texts
}
TITLES = {
    "small": "Two layers of 200 units, 11 epochs",
    "small40": "Two layers of 200 units, 40 epochs",
    "small42": "Two layers of 200 units, 42 epochs, most at the full rate",
    "small64": "Two layers of 200 units, 64 epochs",
    "small100": "Two layers of 200 units, 100 epochs",
    "medium": "Two layers of 650 units",
    "large": "Two layers of 1500 units",
    "medium76": "Two layers of 650 units, 76 epochs",
    "medium110": "Two layers of 650 units, 110 epochs",
    "large100": "Two layers of 1500 units, 100 epochs",
    "readings": "Two layers of 200 units: is the published dropout 0.7 a probability of dropping or of keeping?",
    "quarter": "Two layers of 200 units, a quarter of the training text",
    "sixteenth": "Two layers of 200 units, a sixteenth of the training text",
    "wide": "Two layers of 200 units, a sixteenth of the training text, wider initial embeddings",
    "wide_quarter": "Two layers of 200 units, a quarter of the training text, wider initial embeddings",
    "long": "Two layers of 200 units, a sixteenth of the training text, 40 epochs",
    "transformer": "A Transformer of two layers, a quarter of the training text",
    "help_texts": "A Transformer on Python's help texts, with the defaults of `tiedkl compare --model transformer`",
}
ABOUT = """\
Written by `python examples/ptb/tables.py` from the JSON files beside it, which hold settings, seeds, curves and test
losses by block. Perplexity is that of the epoch with the best validation, over several seeds the geometric mean. In
brackets the 95% interval: of a perplexity over seeds; of a change over seeds and the test text, or over the text alone
where there is one seed, which says nothing of other seeds (see docs/compare.md). * marks changes of two seeds or more
whose p-value is below 5% after Holm's correction for all of the table. Choices are made by validation, never by
test. α KL is that of the training text in the best epoch, in per cent of its cross-entropy."""
FRACTIONS = """\
The vocabulary is that of the whole text. Shorter texts had smaller batches, and still fewer steps: where the best epoch
is the last one, less of the text is also less training."""
STRENGTHS = """\
Each training with the augmented loss against the same without it: the change of perplexity, and α KL in the best
epoch."""
ON_TYING = """\
Test perplexity of the tied models against plain cross-entropy, and against label smoothing where that was trained,
everything else alike; trainings with two seeds or more, those of one experiment and control being one family."""
NOTES = {
    "small": """\
Three things differ from the paper: a schedule that two CPU cores finish (the JSON file has it), an output bias in +RE
and +REAL, and a KL that sees it. Perplexities here are those of a shorter training than the paper's; only the changes
are comparable. Seeds 2 and 3 of the baseline and +AL were trained on a GPU.""",
    "small40": """\
The rate falls by a tenth an epoch after the fifth. Unlike the paper's, +RE and +REAL have an output bias. The baseline,
+RE and the stronger loss were trained on a CPU, +AL and +REAL on a GPU, where dropout masks are others.""",
    "small42": """\
30 epochs at the full rate, then a quarter less an epoch. Unlike the paper's, +RE and +REAL have an output bias.""",
    "small64": """\
40 sequences instead of 20, and a rate that falls by 5.7% an epoch after the ninth. Unlike the paper's, +RE and
+REAL have an output bias. +AL and +REAL were trained on a GPU, with tf32 products; the baseline and +RE on a CPU, with
other dropout masks.""",
    "small100": """\
40 sequences instead of 20, and a rate that falls by 3.8% an epoch after the fifteenth. Unlike the paper's, +RE and
+REAL have an output bias. +AL was trained on a GPU, with tf32 products; the others on two threads of a CPU (+REAL after
four epochs on one), where MKL was made to take its AVX-512 path, which it leaves alone on AMD's processors (a preloaded
mkl_serv_intel_cpu_true).""",
    "medium": """\
40 epochs, the rate falling by a tenth an epoch after the fifth. Unlike the paper's, +REAL has an output bias. Trained
with tf32 products.""",
    "large": """\
55 epochs, after which the rate is where the Keras reimplementation's is after 82. Unlike the paper's, +REAL has an
output bias. Trained with tf32 products; the perplexity still fell by 0.06 an epoch at the end.""",
    "medium76": """\
40 sequences instead of 20, 46 epochs at the full rate. Unlike the paper's, +REAL has an output bias. Trained with tf32
products.""",
    "medium110": """\
40 sequences instead of 20, 68 epochs at the full rate. Unlike the paper's, +REAL has an output bias. Trained with tf32
products, and stopped early; these are the first epochs of the 76 above.""",
    "large100": """\
40 sequences instead of 20, 62 epochs at the full rate. Unlike the paper's, +REAL has an output bias. Trained with tf32
products.""",
    "sixteenth": """\
τ is varied at γ as it is: the gradient of the KL goes with γ/τ, so a larger τ is also a weaker loss; `tau=40,gamma=1`
has γ/τ of the control. "average" and "frozen" are sources of the similarity target: a moving average of the embedding,
and the embedding of a finished +RE that has seen all of the text, sixteen times as much as the others here. "bias in
CE": the KL does not see the output bias.""",
    "wide": """\
The settings of the sixteenth above, where everything starts in ±0.1. The embedding starts in ±1 for the baseline and
+AL, and in ±0.3 for +RE and +REAL, where it is the output matrix too: of 0.1, 0.3 and 1 the best for each on
validation.""",
    "wide_quarter": """\
The settings of the quarter above, where everything starts in ±0.1. All embeddings start in ±0.3; of ±1 a run says
what it does.""",
    "long": "The rate falls by a tenth an epoch after the fifth.",
    "readings": "On a quarter of the training text, four epochs at the full rate.",
}
CONTROLS = ("real", "al", "re", "baseline")
NOT_OF_THE_LOSS = ("no bias", "embedding=")  # parts of a label that a run without the loss has too
SMOOTHED = "re,smoothing=0.1"
# the label of a variant with the loss at the far end of what the paper gives
FAR_END = {run.variant: run.label for run in experiments()["small100"] if run.label not in VARIANTS}
WITHOUT_LOSS = {"al": "baseline", "real": "re"}  # the label of the same model without the augmented loss
BEGIN, END = "<!-- against the paper: python examples/ptb/tables.py -->", "<!-- end of against the paper -->"
Figures = dict[str, Any]  # of the runs of one experiment, by name


def runs_of(figures: Figures, label: str) -> list[Run]:
    """The runs of one label; the losses are means over blocks of the test text."""
    chosen = [run for run in figures.values() if run["label"] == label]
    return [
        Run(r["seed"], r, None if r["status"] != "done" else torch.tensor(r["test_blocks"], dtype=torch.float64))
        for r in chosen
    ]


def perplexity(runs: list[Run], key: str) -> str:
    """Geometric mean over the seeds that are done; for the test text with its 95% interval where there are several."""
    done = [run for run in runs if run.done]
    if not done:
        return "-"
    mean = geometric_mean(run.result[key] for run in done)
    interval = perplexity_interval(runs) if key == "test_ppl" else None
    return f"{mean:.2f}" + (f" ({span(interval, '.1f')})" if interval else "")


def changes(runs: dict[str, list[Run]], control: str) -> dict[str, dict[str, Any]]:
    """What is known of each label's change of the test loss against the control (`evidence.against`), Holm's p too."""
    found = {label: against(runs[control], r, means=True) for label, r in runs.items() if control in runs}
    found.pop(control, None)
    adjust(found)
    return {label: change for label, change in found.items() if change is not None}


def in_words(change: dict[str, Any] | None, runs: list[Run]) -> str:
    """The change of `runs` in per cent with its interval; * where it is sure, and how many seeds have a pair."""
    if change is None:
        return "-"
    sure, pairs, n_seeds = widest(change), len(change["seeds"]), sum(run.done for run in runs)
    star = "*" if pairs > 1 and sure["p_holm"] < LEVEL else ""
    of = "" if pairs == n_seeds else f", {pairs} of {n_seeds} seeds"
    return f"{number(change['percent'], '+.1f', '%')}{star} ({span(sure['percent'], '+.1f')}{of})"


def strength(runs: list[Run]) -> float | None:
    """α KL in per cent of the cross-entropy in the best epoch, mean over seeds; None without it, or where α changes."""
    results = [run.result for run in runs if "temperatures" not in run.result["loss"]]
    shares = [kl_share(r["curves"][: r["best_epoch"]], r["settings"]) for r in results]
    found = [share for share in shares if share is not None]
    return fmean(found) if found else None


def unfinished(runs: list[Run]) -> str:
    """Where runs stand that have not ended."""
    parts = []
    for r in (run.result for run in runs if not run.done):
        reached = f", validation {r['valid_ppl']:.2f}" if r["valid_ppl"] else ""
        reached += f", test {r['test_ppl']:.2f}" if r["test_ppl"] else ""
        diverged = "diverged in " if r["status"] == "diverged" else ""
        parts.append(f"seed {r['seed']}: {diverged}epoch {r['epochs_done']:.1f} of {r['epochs_planned']}{reached}")
    return "; ".join(parts) or "-"


def table(figures: Figures, control: str = "baseline", published: dict[str, tuple[float, float]] | None = None) -> str:
    """One line a label: the control, the paper's variants in its order, the others."""
    found = dict.fromkeys(run["label"] for run in figures.values())  # in the order in which they were trained
    labels = dict.fromkeys([control, *(label for label in VARIANTS if label in found), *found])
    runs = {label: runs_of(figures, label) for label in labels}
    runs = {label: r for label, r in runs.items() if r}
    columns = ["", "parameters", "seeds", "best epoch", "α KL", "validation", "test", f"change to {name_of(control)}"]
    columns += ["paper: validation", "test", "change"] if published else []
    rows, change = [], changes(runs, control)
    for label, of_label in runs.items():
        done = [run for run in of_label if run.done]
        row = [name_of(label), f"{of_label[0].result['parameters']:,}", str(len(done))]
        row += ["/".join(str(run.result["best_epoch"]) for run in done) or "-"]
        row.append(number(strength(done), ".1f", "%"))
        row += [perplexity(of_label, "valid_ppl"), perplexity(of_label, "test_ppl")]
        row.append(in_words(change.get(label), of_label))
        if published:
            valid, test = published[label]
            row += [f"{valid:.1f}", f"{test:.1f}", f"{100 * (test / published[control][1] - 1):+.1f}%"]
        rows.append([*row, unfinished(of_label)])
    if all(row[-1] == "-" for row in rows):
        return markdown(columns, [row[:-1] for row in rows])
    return markdown([*columns, "unfinished"], rows)


def name_of(label: str) -> str:
    """+REAL for `real`; what is not a variant is the name of a change."""
    return VARIANTS[label].label if label in VARIANTS else f"`{label}`"


def against_paper(found: dict[str, Figures]) -> str:
    """Of each size and variant the training that is best on validation, stopped ones too, beside the published figures.

    The loss at the library's defaults or at the far end of what the paper gives, the embedding in its usual range.
    """
    columns = ["units", "", "validation", "paper", "difference", "test", "paper", "difference", "training"]
    rows = []
    for units, published in PUBLISHED.items():
        for label, paper in published.items():
            runs = [
                (run.result, experiment)
                for experiment, figures in found.items()
                for name in (label, FAR_END.get(label))
                for run in (runs_of(figures, name) if name else ())
                if UNITS.get(experiment) == units and run.result["valid_ppl"]
            ]
            best, experiment = min(runs, key=lambda pair: pair[0]["valid_ppl"], default=({}, None))
            cells, which = [], "not trained"
            for key, of_paper in zip(("valid_ppl", "test_ppl"), paper, strict=True):
                ours = best.get(key)
                difference = None if ours is None else 100 * (ours / of_paper - 1)
                cells += [number(ours, ".2f"), f"{of_paper:.1f}", number(difference, "+.1f", "%")]
            if best:
                stopped = "" if best["status"] == "done" else f", stopped after {best['epochs_done']:.0f}"
                strength = ", τ = {temperature:g}, γ = {gamma:g}"
                loss = "" if best["label"] == label else strength.format(**best["settings"])
                which = f"`{experiment}`{loss}, seed {best['seed']}, {best['epochs_planned']} epochs{stopped}"
            rows.append([f"{units:,}", name_of(label), *cells, which])
    return markdown(columns, rows)


def with_table(readme: str, new: str) -> str:
    """The text of examples/ptb/README.md with its table of the paper's figures as it should be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"README.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def by_fraction(found: dict[str, Figures]) -> list[str]:
    """The change of each variant by how much of the training text there was."""
    columns, rows = ["training text", "tokens", "baseline, test"], []
    others = [label for label in PAPER_VARIANTS if label != "baseline"]
    for experiment, fraction in (("sixteenth", "1/16"), ("quarter", "1/4"), ("small", "all")):
        figures = found.get(experiment, {})
        runs = {label: r for label in PAPER_VARIANTS if (r := runs_of(figures, label))}
        change = changes(runs, "baseline")
        if change:
            tokens = next(iter(figures.values()))["text"]["tokens"]["train"]
            cells = [in_words(change.get(label), runs.get(label, [])) for label in others]
            rows.append([fraction, f"{tokens:,}", perplexity(runs["baseline"], "test_ppl"), *cells])
    columns += map(name_of, others)
    return ["## By amount of training text", markdown(columns, rows), FRACTIONS] if rows else []


def by_strength(found: dict[str, Figures]) -> list[str]:
    """Each training with the augmented loss against the same without it, by α KL."""
    rows = []
    for experiment, figures in found.items():
        for label in dict.fromkeys(run["label"] for run in figures.values()):
            runs = runs_of(figures, label)
            about = runs[0].result
            plain = WITHOUT_LOSS.get(about["variant"])
            if plain is None:
                continue
            plain = ",".join([plain, *(part for part in label.split(",") if part.startswith(NOT_OF_THE_LOSS))])
            new, old = finished(runs), finished(runs_of(figures, plain))
            if new and old:
                check_same_training(label, list(new.values()), list(old.values()))
            seeds = [seed for seed in new if seed in old]
            share = strength([new[seed] for seed in seeds])
            if share is None:
                continue
            ratios = [
                geometric_mean(new[seed].result[key] / old[seed].result[key] for seed in seeds)
                for key in ("valid_ppl", "test_ppl")
            ]
            cells = [number(100 * (ratio - 1), "+.1f", "%") for ratio in ratios]
            row = [f"{share:.1f}%", experiment, name_of(label), name_of(plain), str(len(seeds)), *cells]
            rows.append((share, row))
    rows.sort(key=lambda pair: pair[0])
    columns = ["α KL", "experiment", "with the loss", "against", "seeds", "validation", "test"]
    table_of_all = markdown(columns, [row for _, row in rows])
    return ["## By strength of the augmented loss", STRENGTHS, table_of_all] if rows else []


def check_same_training(label: str, new: list[Run], old: list[Run]) -> None:
    """Raise ValueError where runs of `label` differ from those they are compared with in more than the loss.

    Products may be rounded differently; the notes on an experiment say so.
    """
    free = {"temperature", "gamma", "target_grad", "label_smoothing", "seed", "overrides", "tf32"}
    mine, other = (
        [{k: v for k, v in (LATER | run.result["settings"]).items() if k not in free} for run in runs]
        for runs in (new, old)
    )
    if any(settings != other[0] for settings in mine + other):
        raise ValueError(f"{label} differs from what it is compared with in more than the loss")


def on_tying(found: dict[str, Figures]) -> list[str]:
    """What a loss other than cross-entropy does for +RE, where there are several seeds."""
    rows = []
    for experiment, figures in found.items():
        tied = dict.fromkeys(run["label"] for run in figures.values() if VARIANTS[run["variant"]].tied)
        labels = [x for x in tied if not any(part.startswith(NOT_OF_THE_LOSS) for part in x.split(","))]
        runs = {label: r for label in labels if len(finished(r := runs_of(figures, label))) > 1}
        if "re" not in runs:
            continue
        against_plain, against_smoothed = changes(runs, "re"), changes(runs, SMOOTHED)
        for label, change in against_plain.items():
            check_same_training(label, runs[label], runs["re"])
            cells = [f"{widest(change)['p_holm']:.3f}", in_words(against_smoothed.get(label), runs[label])]
            rows.append([experiment, name_of(label), in_words(change, runs[label]), *cells])
    columns = ["experiment", "tied, with", f"change to {name_of('re')}", "p (Holm)", f"change to {name_of(SMOOTHED)}"]
    return ["## What a loss does on top of tying", ON_TYING, markdown(columns, rows)] if rows else []


def by_epoch(figures: Figures) -> str:
    """Validation perplexity after each epoch, of many epochs after some: means over the seeds."""
    labels = dict.fromkeys(run["label"] for run in figures.values())
    curves = {label: [run.result["curves"] for run in runs_of(figures, label)] for label in labels}
    longest = max(len(curve) for of_label in curves.values() for curve in of_label)
    epochs = range(1, longest + 1) if longest <= 10 else [1, 2, 5, *range(10, longest + 1, 10)]
    rows = []
    for label, of_label in curves.items():
        there = [[curve[epoch - 1]["valid_ppl"] for curve in of_label if len(curve) >= epoch] for epoch in epochs]
        rows.append([name_of(label), *(f"{geometric_mean(found):.1f}" if found else "-" for found in there)])
    return markdown(["validation after epoch", *map(str, epochs)], rows)


def picture(experiment: str, figures: Figures) -> str:
    """Validation perplexity by epoch of the four variants, an SVG file."""
    report = {
        "variants": {
            name: {"label": variant.label, "curves": mean_curves(runs)}
            for name, variant in VARIANTS.items()
            if (runs := runs_of(figures, name))
        }
    }
    return plots.curve(report, "valid_ppl", TITLES[experiment], "validation perplexity", log=True)


def with_one_change(figures: Figures, control: str) -> Figures:
    """The runs of a variant under all its labels; none where it has only its own."""
    kept = {name: run for name, run in figures.items() if run["variant"] == control}
    return kept if len({run["label"] for run in kept.values()}) > 1 else {}


def picture_of_changes(figures: Figures, control: str) -> str:
    """The change of test perplexity of each label against its control with the intervals, an SVG file."""
    labels = dict.fromkeys(run["label"] for run in figures.values())
    found = changes({label: runs_of(figures, label) for label in labels}, control)
    report = {"variants": {label: {"label": label, "evidence": change} for label, change in found.items()}}
    title = f"{name_of(control)} with one change at a time"
    return plots.changes(report, title, colours=dict.fromkeys(found, COLOURS[control]), linear_to=5.0)


def parts_of(experiment: str, figures: Figures) -> Iterator[str]:
    """The section of an experiment."""
    yield f"## {TITLES[experiment]}"
    if experiment in NOTES:
        yield NOTES[experiment]
    if experiment in ("readings", "small40", "small42", "small64", "small100", "long"):
        yield by_epoch(figures)
    four = {name: run for name, run in figures.items() if run["label"] in VARIANTS}
    if four:
        yield table(four, published=PUBLISHED.get(UNITS.get(experiment, 0)))
        yield f"![Validation perplexity]({experiment}.svg)"
    for control in CONTROLS if four else ():
        if kept := with_one_change(figures, control):
            yield f"{name_of(control)} with one change at a time:"
            yield table(kept, control)
            if experiment == "sixteenth":
                yield f"![Change of test perplexity]({experiment}-{control}.svg)"
    yield source(f"run.py {experiment}", (run["stamp"] for run in figures.values()))


def all_figures(results: Path) -> dict[str, Figures]:
    """The runs of every experiment that has any."""
    return {experiment: figures for experiment in TITLES if (figures := read(results / f"{experiment}.json"))}


def page(results: Path) -> tuple[str, dict[str, Callable[[], str]]]:
    """The text of README.md, and by file name what paints its pictures, of everything that has figures."""
    pictures: dict[str, Callable[[], str]] = {}
    parts = ["# Results", ABOUT]
    found = all_figures(results)
    for experiment, figures in found.items():
        parts += parts_of(experiment, figures)
        if any(run["label"] in VARIANTS for run in figures.values()):
            pictures[f"{experiment}.svg"] = partial(picture, experiment, figures)
    for control in CONTROLS:
        if kept := with_one_change(found.get("sixteenth", {}), control):
            pictures[f"sixteenth-{control}.svg"] = partial(picture_of_changes, kept, control)
    parts += by_fraction(found)
    parts += on_tying(found)
    parts += by_strength(found)
    if predicted := read(results / "predictions.json"):
        parts += predictions.section(predicted)
    if spaces := read(results / "subspaces.json"):
        parts += subspaces.section(spaces)
        pictures["subspaces.svg"] = partial(subspaces.picture, spaces)
    return "\n\n".join(parts) + "\n", pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 when a page is not what the figures give"
    )
    args = parser.parse_args()
    text, pictures = page(args.results)
    pages = {args.results / "README.md": text}
    if args.results == RESULTS:
        pages[README] = with_table(README.read_text("utf-8"), against_paper(all_figures(RESULTS)))
    if args.check:
        return int(any(not file.exists() or file.read_text("utf-8") != new for file, new in pages.items()))
    for file, new in pages.items():
        file.write_text(new, "utf-8")
    for name, paint in pictures.items():
        (args.results / name).write_text(as_file(paint()), "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
