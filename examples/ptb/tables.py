"""The tables in results/README.md, from the figures of run.py; --check compares only.

python examples/ptb/tables.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tiedkl.compare.statistics import over_seeds

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
    "readings": "Dropout 0.7 read as a probability of dropping",
    "data": "On a part of the training text",
    "ablations": "What the augmented loss does: small +REAL on a quarter of the text, one change at a time",
    "transformer": "A Transformer",
}


def interval(values: list[float]) -> str:
    """Mean of perplexities, with the half width of its 95% interval over seeds."""
    found = over_seeds(values)
    return f"{values[0]:.2f}" if found is None else f"{found.mean:.2f} ± {found.high - found.mean:.2f}"


def table(experiment: str, figures: dict[str, Any]) -> str:
    """One line a label: finished seeds, perplexities, those published, and where unfinished runs stand."""
    published = PUBLISHED.get(experiment)
    head = [
        "",
        "seeds",
        "validation",
        "test",
        *(["paper, validation", "paper, test"] if published else []),
        "epoch",
        "unfinished",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label in dict.fromkeys(run["label"] for run in figures.values()):
        runs = [run for run in figures.values() if run["label"] == label]
        done = [run for run in runs if run["status"] == "done"]
        cells = [f"`{label}`", str(len(done))]
        cells += [interval([r[key] for r in done]) if done else "-" for key in ("valid_ppl", "test_ppl")]
        if published:
            cells += [f"{x:.1f}" for x in published.get(label, (math.nan, math.nan))]
        cells.append("/".join(str(r["best_epoch"]) for r in done) or "-")
        parts = [
            f"seed {r['seed']}: epoch {r['epochs_done']:.1f} of {r['epochs_planned']}"
            + (f", validation {r['valid_ppl']:.2f}" if r["valid_ppl"] else "")
            for r in runs
            if r["status"] != "done"
        ]
        cells.append("; ".join(parts) or "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source(figures: dict[str, Any]) -> str:
    """Machine, versions, commits."""
    stamps = [run["stamp"] for run in figures.values()]
    commits = sorted({_short(str(s["git_commit"])) for s in stamps})
    machines = sorted({f"{s['cpu'] if s['device'] == 'cpu' else s['device']}, torch {s['torch']}" for s in stamps})
    return f"{'; '.join(machines)}; commit {', '.join(commits)}."


def _short(commit: str) -> str:
    return commit[:7] + ("+" if commit.endswith("+") else "")


def page(results: Path) -> str:
    """All experiments that have figures."""
    parts = [
        "# Results",
        "From `python examples/ptb/tables.py` and the JSON files beside it (settings, seeds, curves). Perplexity of\n"
        "the epoch with the best validation; ± is half of the 95% interval of the mean over seeds (Student's t).",
    ]
    for experiment, title in TITLES.items():
        file = results / f"{experiment}.json"
        if file.exists():
            figures = json.loads(file.read_text())
            command = f"`python examples/ptb/run.py {experiment} --data DIR`"
            parts += [f"## {title}", table(experiment, figures), f"{command}; {source(figures)}"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    file, text = args.results / "README.md", page(args.results)
    if args.check:
        return int(not file.exists() or file.read_text("utf-8") != text)
    file.write_text(text, "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
