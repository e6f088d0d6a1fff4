"""The report as one HTML page (template: report.html.j2) that needs nothing from outside."""

from __future__ import annotations

from typing import Any

from .. import page
from .evidence import SAYS
from .per_variant import settings_table
from .plots import COLOURS, changes, curve
from .tables import certainty, compared, quality, size, speed
from .verdict import best
from .vocabulary import vocabulary

HINTS = {
    "change": "test perplexity against the baseline",
    "95% of change": "interval of the change over seeds and text; with one seed, over text",
    "p": "chance of such a change if there were none, after Holm's correction for several comparisons",
    "test ppl": "perplexity on the test split, with the weights of the best epoch",
    "95% (seeds)": "interval of the test perplexity over seeds",
    "valid ppl": "perplexity on the validation split, best epoch",
}
SIZE_HINTS = {
    "loss MiB": "scratch and gradients of tiedkl's loss layer",
    "training MiB": "parameters, gradients, optimiser and loss layer, without activations of the network",
    "eager": "the same with plain PyTorch's loss",
    "inference MiB": "parameters",
}
SPEED_HINTS = {
    "ms/token": "generating one token, batch 1 (half of the rounds lay in the brackets)",
    "scored/s": "tokens scored a second (the same)",
    "trained/s": "tokens trained a second (slowest and fastest epoch)",
    "s/1M tokens": "training time for a million tokens",
    "price/1M": "the same at your price",
    "seconds": "training and evaluation, all seeds",
}
OWN_HINTS = {
    "lr": "learning rate",
    "dropout": "probability of dropping a unit",
    "embedding_range": "of the embedding's initial weights, on either side of 0",
    "temperature": "of the augmented loss",
    "gamma": "weight of the augmented loss, in units of the temperature",
    "target_grad": "whether its gradient flows through the similarity target too",
    "label_smoothing": "part of the target that +LS and +RE+LS spread over all words",
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
        "The loss on the training text, with dropout, and of +LS and +RE+LS with label smoothing. A variant whose "
        "curve falls here but not above overfits.",
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
    plots = [(title, text, curve(report, key, title, label, log=log)) for key, title, label, log, text in PLOTS]
    title, text = "Change against the baseline", "95% intervals; left of the line is better than the baseline."
    plots.insert(0, (title, text, changes(report, title)))
    kind = "LSTM" if config["model"] == "lstm" else "Transformer"
    facts, unknown = vocabulary(report["corpus"])
    names = list(variants)
    pairs = [name for name, _ in compared(report)]
    own = settings_table(report)
    return page.render(
        __package__,
        TEMPLATE,
        report=report,
        better=report["outcome"] == "yes",
        model=f"{config['layers']}-layer {kind} of {config['hidden']} units",
        tables=[
            ("Results", quality(report), HINTS, names),
            ("Memory", size(report), SIZE_HINTS, names),
            ("Speed and cost", speed(report), SPEED_HINTS, names),
            *([("Settings that differ", own, OWN_HINTS, names)] if own else []),
        ],
        own=own,
        certainty=(certainty(report), pairs) if pairs else None,
        says=SAYS,
        best=best(report["variants"]) if report["outcome"] == "yes" else None,
        colours=COLOURS,
        plots=[plot for plot in plots if plot[2]],
        vocabulary=facts,
        unknown=unknown,
        record=[
            (
                "Text",
                page.facts({k: v for k, v in report["corpus"].items() if not k.startswith(("unknown", "vocabulary_"))}),
            ),
            ("Settings", page.facts(config)),
            ("Machine", page.facts(report["environment"])),
        ],
    )
