"""From this test to production: a checklist in three stages, with the numbers of the report at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .command import compare_command, tune_command, tuned_compare_command
from .evidence import widest
from .memory import EAGER_MATRICES
from .settings import CONTROLS, VARIANTS, Settings, of_variant
from .tables import number, span
from .verdict import MARGIN, YES, best, diverged

MIB = 1 << 20
PRODUCTION_TOKENS = 8192  # of one step, for the memory to expect
BUDGET_MIB = 64  # scratch of the loss layer unless `workspace_bytes` says otherwise
SEEDS = 3
# per cent of test perplexity on all of the Penn Treebank, with 200, 650 and 1500 units (Inan et al. 2017, Table 1)
PUBLISHED = {"al": (5.0, 3.9, 1.9), "re": (2.5, 4.9, 5.0), "real": (5.3, 5.8, 5.6)}
# of the same with 200 units: examples/ptb/results, `small` and, one seed, `small64`
REPEATED = {"al": 0.2, "re": 1.5, "real": 1.4}
LONGER = {"al": 1.4, "re": 3.3, "real": 3.4}


def checklist(report: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Three stages, each with `stage`, and texts or lists: `seen`, `commands`, `go_on_if`, `monitor`, `memory`.

    settings: of this run, for commands that repeat or enlarge it.
    """
    variants = report["variants"]
    name = best(variants)
    if name is None:
        return []
    v = variants[name]
    return [
        _small(report, v, settings, name),
        _real(report, v, settings, name),
        _production(report, v, name),
    ]


def _small(report: dict[str, Any], v: dict[str, Any], settings: Settings, name: str) -> dict[str, Any]:
    evidence = v["evidence"]
    n = len(evidence["seeds"])
    seen = [
        f"{v['label']} changed test perplexity by {number(evidence['percent'], '+.1f', '%')} "
        f"(95% interval {span(widest(evidence)['percent'], '+.1f', '%')}, {n} seed{'' if n == 1 else 's'}).",
        f"Parameters {v['change']['parameters']:+.0f}%; training speed {_speed(report, v)}.",
        f"Vocabulary {report['corpus']['vocabulary']:,}; {100 * report['corpus']['oov_rate']['test']:.1f}% of the test "
        "tokens are unknown to it.",
    ]
    planned = max(SEEDS, len(report["config"]["seeds"]))
    lost = diverged(report["variants"], name, "baseline")
    commands, note = [], ""
    if lost:
        note = (
            "A training diverged, and is not tried again: begin anew with a smaller --lr or --clip, and another --out."
        )
    elif n < SEEDS:
        commands, note = [compare_command(settings, seeds=planned)], "It trains only what is missing."
    return {
        "stage": "Small A/B test (this report)",
        "seen": seen,
        "commands": commands,
        "note": note,
        "go_on_if": f"The answer is Yes, that is, {YES} (here: {report['outcome']}); and the change is worth the "
        "training time it costs.",
        "monitor": [
            "Unknown words: above some 5% of the test tokens, enlarge --vocab-size or use --tokenizer, unless the text "
            "itself has <unk> in their place."
        ],
        "memory": f"{v['training_memory']['total_bytes'] / MIB:,.0f} MiB in training without activations "
        f"(plain PyTorch: {v['training_memory']['eager_bytes'] / MIB:,.0f} MiB).",
    }


def _speed(report: dict[str, Any], v: dict[str, Any]) -> str:
    base = report["variants"]["baseline"]
    if not base["tokens_per_second"]:
        return "unknown"
    change = f"{100 * (v['tokens_per_second'] / base['tokens_per_second'] - 1):+.0f}%"
    mine, its = v["tokens_per_second_range"], base["tokens_per_second_range"]
    if mine and its and mine[0] <= its[1] and its[0] <= mine[1]:
        change += ", though some epochs of each were as fast as some of the other's"
    return change


def _real(report: dict[str, Any], v: dict[str, Any], settings: Settings, name: str) -> dict[str, Any]:
    config = report["config"]
    scratch = v["loss_memory"]["scratch_bytes"]
    per_parameter = (v["training_memory"]["total_bytes"] - scratch) / max(1, v["parameters"])
    width = 650 if config["hidden"] < 650 else 2 * config["hidden"]
    # beside the augmented loss its control: label smoothing may do as much, for less
    arms = tuple(filter(None, ("baseline", name, CONTROLS.get(name))))
    larger = {"variants": arms, "hidden": width, "seeds": SEEDS, "out": f"tiedkl-compare-{width}"}
    larger |= {"budget": None, "max_tokens": None}
    change = v["evidence"]["percent"]
    if report["outcome"] == "yes":
        gain = f"the answer is Yes at this width too, the gain is at least half of the {-change:.1f}% seen here"
    else:
        gain = f"the answer is Yes at this width, which it was not here ({number(change, '+.1f', '%')})"
    if name in CONTROLS:
        gain += f", {v['label']} is better than {VARIANTS[CONTROLS[name]].label}, its control"
    small = [flag for flag, value in (("--budget", settings.budget), ("--max-tokens", settings.max_tokens)) if value]
    return {
        "stage": "Your real data, a larger model",
        "seen": [
            f"Tested so far: {config['layers']} layers of {config['hidden']} units.{_elsewhere(v['label'], name)}",
        ],
        "commands": [
            *(tune_command(replace(settings, hidden=width), variant) for variant in arms),
            tuned_compare_command(settings, **larger),
        ],
        "note": f"On all of the text, without the {' and '.join(small)} of this run." if small else "",
        "go_on_if": f"With {SEEDS} seeds {gain}, and training is not slower than you can pay.",
        "monitor": [
            "Validation perplexity of every arm after every epoch; stop an arm that diverges.",
            f"KL on the training text: here it went {_kl(v)}." if v["augmented"] else
            "Validation perplexity that rises again is overfitting." if v["smoothed"] else
            "Training cross-entropy against validation: a gap that grows is overfitting.",
        ],
        "memory": f"About {per_parameter:.0f} bytes a parameter in training here, without activations, and the scratch "
        f"of the loss, {scratch / MIB:,.0f} MiB here and within {BUDGET_MIB} MiB at any width.",
    }  # fmt: skip


def _elsewhere(label: str, name: str) -> str:
    """What the variant gained on the Penn Treebank, by size."""
    if name not in PUBLISHED:
        return ""
    small, medium, large = PUBLISHED[name]
    return (
        f" In the paper the gain of {label} on Penn Treebank was {small}% at 200 units, {medium}% at 650 and {large}% "
        f"at 1500; in this library's own runs (examples/ptb) it was {REPEATED[name]}% at 200 units in 11 epochs, "
        f"{LONGER[name]}% in 64 (one seed), and was not measured at the others."
    )


def _kl(v: dict[str, Any]) -> str:
    values = [row["train_kl"] for row in v["curves"] if row["train_kl"] is not None]
    return f"from {values[0]:.3g} to {values[-1]:.3g} nats a token" if values else "unrecorded"


def _production(report: dict[str, Any], v: dict[str, Any], name: str) -> dict[str, Any]:
    config, n_vocab = of_variant(report["config"], name), report["corpus"]["vocabulary"]
    eager = EAGER_MATRICES[v["augmented"]] * PRODUCTION_TOKENS * n_vocab * 4 / MIB
    about = VARIANTS[name]
    keywords = ", ".join(
        f"{key}={value if value is True else f'{value:g}'}" for key, value in about.loss_keywords(config).items()
    )
    weight = "weight" if about.tied else "target_weight" if about.augmented else ""
    cost = report["cost"].get(name, {})
    return {
        "stage": "Production",
        "seen": [
            f"Here a million training tokens took {cost.get('seconds_per_million', 0):,.0f} s"
            + (f" ({cost['price_per_million']:.3g} at your price)." if cost.get("price_per_million") else "."),
        ],
        "commands": [
            "tiedkl doctor",
            "tiedkl verify",
            f"tiedkl bench --shapes {PRODUCTION_TOKENS},{n_vocab},{config['hidden']}",
        ],
        "note": f"In the training code: tiedkl.FusedTiedLoss({keywords}, return_terms=True)"
        + (f", with the embedding as its {weight}" if weight else "")
        + (", and an output bias, which the models here had." if config["tied_bias"] or not about.tied else "."),
        "go_on_if": "A training of full length in both arms, on one part of the real traffic, is better in your own "
        "measure of quality, not only in perplexity; keep the old model ready until then.",
        "monitor": [
            "loss, ce and kl of TiedLossOutput, each apart; ce is what compares with the old model"
            + (", once label_smoothing is 0." if about.smoothed else "."),
            "Gradient norm and the share of clipped steps in the first thousand steps.",
            "Tokens a second and peak memory against the old model.",
            f"Go back if validation perplexity at the same number of tokens is more than {MARGIN:.0f}% above the old "
            "model's.",
        ],
        "memory": f"For a step of {PRODUCTION_TOKENS:,} tokens with this vocabulary plain PyTorch would hold "
        f"{eager:,.0f} MiB of logits and probabilities; tiedkl keeps its scratch within {BUDGET_MIB} MiB. "
        f"To use the model: {4 * v['parameters'] / MIB:,.1f} MiB of float32 parameters.",
    }
