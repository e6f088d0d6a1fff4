"""The report as one HTML page (template: report.html.j2) that needs nothing from outside."""

from __future__ import annotations

from typing import Any

from .. import page
from .plots import COLOURS, curve
from .report import COLUMNS, DRAW, rows

HINTS = {
    "valid ppl": "perplexity on the validation split, best epoch",
    "test ppl": "perplexity on the test split, with the weights of that epoch",
    "change": "test perplexity against the baseline",
    "loss layer MiB": "scratch and gradients of tiedkl's loss layer",
    "eager MiB": "what the same layer would take in plain PyTorch",
    "tokens/s": "training speed",
    "seconds": "training and evaluation",
}

TEMPLATE = "report.html.j2"

PLOTS = (
    (
        "valid_ppl",
        "Validation perplexity",
        "perplexity",
        True,
        "Less is better: how well unseen text is predicted after each epoch.",
    ),
    (
        "train_ce",
        "Training cross-entropy",
        "nats a token",
        False,
        "The loss on the training text, with dropout. A variant whose curve falls here but not above overfits.",
    ),
    (
        "train_kl",
        "Distance from the similarity target (KL)",
        "nats a token",
        False,
        "The second part of the augmented loss, before its weight; only +AL and +REAL have it.",
    ),
)


def render(report: dict[str, Any]) -> str:
    """The report (see report.py) as HTML."""
    config, variants = report["config"], report["variants"]
    done = {name: v for name, v in variants.items() if v["status"] == "done"}
    plots = [(title, text, curve(report, key, title, label, log=log)) for key, title, label, log, text in PLOTS]
    kind = "LSTM" if config["model"] == "lstm" else "Transformer"
    return page.render(
        __package__,
        TEMPLATE,
        report=report,
        better=any((v["change"]["test_ppl"] or 0.0) <= -DRAW for v in variants.values()),
        model=f"{config['layers']}-layer {kind} of {config['hidden']} units",
        columns=COLUMNS,
        hints=HINTS,
        table=list(zip(variants, rows(report), strict=True)),
        best=min(done, key=lambda name: done[name]["test_ppl"]) if len(done) > 1 else None,
        colours=COLOURS,
        plots=[plot for plot in plots if plot[2]],
        record=[
            ("Text", page.facts(report["corpus"])),
            ("Settings", page.facts(config)),
            ("Machine", page.facts(report["environment"])),
        ],
    )
