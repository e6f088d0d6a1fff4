"""The tables and curves in results/, from the figures of run.py, predictions.py and subspaces.py.

python examples/ptb/tables.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import predictions
import subspaces
import torch
from predictions import markdown

from tiedkl.compare.evidence import Run, against, mean_curves, perplexity_interval
from tiedkl.compare.plots import curve
from tiedkl.compare.settings import VARIANTS

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {  # validation and test perplexity on the Penn Treebank, Inan et al. (2017), Table 1
    "small": {"baseline": (92.6, 87.3), "al": (86.3, 82.9), "re": (89.9, 85.1), "real": (86.3, 82.7)},
    "medium": {"baseline": (82.0, 77.7), "al": (77.4, 74.7), "re": (77.1, 73.9), "real": (75.7, 73.2)},
    "large": {"baseline": (76.8, 72.6), "al": (74.5, 71.2), "re": (72.5, 69.0), "real": (71.1, 68.5)},
}
TITLES = {
    "small": "Two layers of 200 units",
    "medium": "Two layers of 650 units",
    "large": "Two layers of 1500 units",
    "readings": "Two layers of 200 units, the dropout figure 0.7 read as a probability of dropping",
    "quarter": "Two layers of 200 units, a quarter of the training text",
    "sixteenth": "Two layers of 200 units, a sixteenth of the training text",
    "transformer": "A Transformer of two layers, a quarter of the training text",
    "help_texts": "A Transformer on Python's help texts, with the defaults of `tiedkl compare`",
}
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
    mean = math.exp(math.fsum(math.log(run.result[key]) for run in done) / len(done))
    interval = perplexity_interval(runs) if key == "test_ppl" else None
    return f"{mean:.2f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def change(runs: list[Run], control: list[Run]) -> str:
    """Of the test perplexity against the control, with the 95% interval."""
    found = against(control, runs, block=1)
    if runs is control or found is None:
        return "-"
    low, high = (found["over_both"] or found["over_text"])["percent"]
    return f"{found['percent']:+.1f}% ({low:+.1f} to {high:+.1f})"


def unfinished(runs: list[Run]) -> str:
    """Where runs stand that have not ended."""
    parts = []
    for r in (run.result for run in runs if not run.done):
        best = f", validation {r['valid_ppl']:.2f}" if r["valid_ppl"] else ""
        parts.append(f"seed {r['seed']}: epoch {r['epochs_done']:.1f} of {r['epochs_planned']}{best}")
    return "; ".join(parts) or "-"


def table(figures: Figures, control: str = "baseline", published: dict[str, tuple[float, float]] | None = None) -> str:
    """One line a label, the control first."""
    labels = [label for label in dict.fromkeys(run["label"] for run in figures.values()) if label != control]
    base = runs_of(figures, control)
    columns = ["", "parameters", "seeds", "best epoch", "validation", "test", f"change to {control}"]
    columns += ["paper: validation", "test", "change"] if published else []
    rows = []
    for label in [control] * bool(base) + labels:
        runs = base if label == control else runs_of(figures, label)
        done = [run for run in runs if run.done]
        row = [VARIANTS[label].label if label in VARIANTS else f"`{label}`", f"{runs[0].result['parameters']:,}"]
        row += [str(len(done)), "/".join(str(run.result["best_epoch"]) for run in done) or "-"]
        row += [perplexity(runs, "valid_ppl"), perplexity(runs, "test_ppl"), change(runs, base)]
        if published:
            valid, test = published[label]
            row += [f"{valid:.1f}", f"{test:.1f}", f"{100 * (test / published[control][1] - 1):+.1f}%"]
        rows.append([*row, unfinished(runs)])
    if any(row[-1] != "-" for row in rows):
        columns.append("unfinished")
    return markdown(columns, rows)


def source(experiment: str, figures: Figures) -> str:
    """Command, machine, versions, commits."""
    stamps = [run["stamp"] for run in figures.values()]
    commits = sorted({str(s["git_commit"])[:7] + "+" * str(s["git_commit"]).endswith("+") for s in stamps})
    machines = sorted({f"{s['cpu'] if s['device'] == 'cpu' else s['device']}, torch {s['torch']}" for s in stamps})
    command = f"`python examples/ptb/run.py {experiment} --data DIR`"
    return f"{command}; {'; '.join(machines)}; commit {', '.join(commits)}."


def picture(experiment: str, figures: Figures) -> str:
    """Validation perplexity by epoch of the four variants, an SVG file."""
    report = {
        "variants": {
            name: {"label": variant.label, "curves": mean_curves(runs)}
            for name, variant in VARIANTS.items()
            if (runs := runs_of(figures, name))
        }
    }
    return curve(report, "valid_ppl", TITLES[experiment], "validation perplexity", log=True)


def pages(results: Path) -> dict[str, str]:
    """File name -> content, of everything that has figures."""
    files: dict[str, str] = {}
    parts = [
        "# Results",
        "Written by `python examples/ptb/tables.py` from the JSON files beside it, which hold settings, seeds, curves\n"
        "and test losses by block. Perplexity is that of the epoch with the best validation, over several seeds the\n"
        "geometric mean. In brackets the 95% interval: of a perplexity over seeds; of a change over seeds and the\n"
        "test text, or over the text alone where there is one seed (as in `tiedkl compare`, see docs/compare.md).",
    ]
    for experiment, title in TITLES.items():
        file = results / f"{experiment}.json"
        if not file.exists():
            continue
        figures: Figures = json.loads(file.read_text())
        four = {name: run for name, run in figures.items() if run["label"] in VARIANTS}
        parts.append(f"## {title}")
        if four:
            files[f"{experiment}.svg"] = picture(experiment, four)
            parts += [table(four, published=PUBLISHED.get(experiment)), f"![Validation perplexity]({experiment}.svg)"]
        changed = {name: run for name, run in figures.items() if run["label"] not in VARIANTS}
        if changed:
            again = {name: run for name, run in four.items() if run["label"] in ("re", "real")}
            parts += ["+REAL with one change at a time:"] * bool(again)
            parts.append(table(again | changed, "real"))
        parts.append(source(experiment, figures))
    for module in (predictions, subspaces):
        file = results / f"{module.__name__}.json"
        if file.exists():
            text, pictures = module.section(json.loads(file.read_text()))
            parts += text
            files |= pictures
    files["README.md"] = "\n\n".join(parts) + "\n"
    return {name: as_file(text) if name.endswith(".svg") else text for name, text in files.items()}


def as_file(svg: str) -> str:
    """An `<svg>` element as a file that has a size of its own and can be seen on a dark page."""
    return svg.replace("<svg", '<svg width="540" height="350" style="background:#fff"', 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 when results/README.md is not current"
    )
    args = parser.parse_args()
    files = pages(args.results)
    readme = args.results / "README.md"
    if args.check:
        return int(not readme.exists() or readme.read_text("utf-8") != files["README.md"])
    for name, text in files.items():
        (args.results / name).write_text(text, "utf-8")
    print(files["README.md"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
