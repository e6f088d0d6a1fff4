"""What the variants predict: the probability of <unk>, of function words, and of words near the target.

    python examples/ptb/predictions.py --data DIR [--runs ptb-runs] [--show 5]

The paper says of +REAL that it gives <unk> and very frequent function words less probability, and words near the
target in embedding space more. Measured on every token of the test text with the weights that run.py left in --runs
(best epoch by validation). Near are the ten words of highest cosine similarity to the target, once in the variant's
own input embedding and once in the baseline's, which is the same yardstick for all.
--show N prints contexts of the test text with the words that each variant holds most likely.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from experiments import experiments
from page import markdown, source
from run import add_text_options, identity_of, make_trainer, resume, settings_of, text_of
from torch import Tensor

from tiedkl.compare.corpus import Corpus
from tiedkl.compare.settings import VARIANTS, CompareError
from tiedkl.compare.statistics import over_text
from tiedkl.compare.store import write_atomically
from tiedkl.compare.training import Trainer, in_text_order
from tiedkl.environment import stamp

N_NEAR, N_TOP, CONTEXT = 10, 8, 12
UNK, EOS = 0, 1
# articles, prepositions, conjunctions, pronouns and auxiliaries, frequent in any English text
FUNCTION_WORDS = """\
the of to a in and that for is it on by at as from with was be are its an has have but or this will which he
they not we who had their would about been one more than if when there were all up out some no also can could"""


def function_words(words: list[str]) -> Tensor:
    """Ids of the function words in the vocabulary."""
    known = {word: i for i, word in enumerate(words)}
    return torch.tensor([known[word] for word in FUNCTION_WORDS.split() if word in known])


def nearest(embedding: Tensor) -> Tensor:
    """(V, N_NEAR) ids of the words of highest cosine similarity to each, itself, <unk> and <eos> left out."""
    unit = torch.nn.functional.normalize(embedding, dim=1)
    found = []
    for rows in torch.arange(len(unit), device=unit.device).split(1024):
        similarity = unit[rows] @ unit.T
        similarity[:, [UNK, EOS]] = -2
        similarity[torch.arange(len(rows)), rows] = -2
        found.append(similarity.topk(min(N_NEAR, len(unit) - 3)).indices)
    return torch.cat(found)


@torch.no_grad()
def measure(trainer: Trainer, function: Tensor, yardstick: Tensor) -> dict[str, Tensor]:
    """Per-token figures of the test text, each (n_tokens,) in the order of the text."""
    model, split = trainer.model, trainer.data.test
    own = nearest(model.embedding.weight)
    columns: dict[str, list[Tensor]] = {}
    for hidden, y in trainer.windows(split):
        p = torch.nn.functional.linear(hidden, model.weight, model.bias).softmax(-1)
        ids = y.clamp(min=0)
        figures = {
            "target": p.gather(-1, ids[..., None])[..., 0],
            "unk": p[..., UNK],
            "function": p[..., function].sum(-1),
            "near, own embedding": p.gather(-1, own[ids]).sum(-1),
            "near, baseline's embedding": p.gather(-1, yardstick[ids]).sum(-1),
        }
        for name, values in figures.items():
            columns.setdefault(name, []).append(values)
    return {name: in_text_order(torch.cat(parts), split[1]).cpu() for name, parts in columns.items()}


def summary(tokens: dict[str, Tensor], target: Tensor, function: Tensor) -> dict[str, Tensor]:
    """The figures of the report: per-token values (n,) over the tokens that each speaks of."""
    is_unk, is_function = target == UNK, torch.isin(target, function)
    word = ~is_unk & (target != EOS)
    return {
        "the right word": tokens["target"],
        "`<unk>`, where it is wrong": tokens["unk"][~is_unk],
        "`<unk>`, where it is right": tokens["unk"][is_unk],
        f"{len(function)} function words, where they are wrong": tokens["function"][~is_function],
        f"{len(function)} function words, where one is right": tokens["function"][is_function],
        f"the {N_NEAR} words nearest the right one, in the variant's embedding": tokens["near, own embedding"][word],
        f"the {N_NEAR} words nearest the right one, in the baseline's": tokens["near, baseline's embedding"][word],
    }


@torch.no_grad()
def show(trainers: dict[str, Trainer], words: list[str], n: int) -> None:
    """Print `n` contexts, evenly spread over the test text, and each variant's likeliest words."""
    inputs, targets = next(iter(trainers.values())).data.test
    column, steps = inputs[:, 0], torch.linspace(CONTEXT, len(inputs) - 1, n).long().tolist()
    tops: dict[str, Tensor] = {}
    for name, trainer in trainers.items():
        model = trainer.model.eval()
        hidden, _ = model(inputs[:, :1], model.body.start(1), trainer.generator)
        logits = torch.nn.functional.linear(hidden[steps, 0], model.weight, model.bias)
        tops[name] = logits.topk(N_TOP).indices
    for k, t in enumerate(steps):
        context = " ".join(words[i] for i in column[t + 1 - CONTEXT : t + 1].tolist())
        print(f"\n... {context} [{words[int(targets[t, 0])]}]")
        for name, top in tops.items():
            print(f"    {VARIANTS[name].label:<9}{', '.join(words[i] for i in top[k].tolist())}")


def section(found: dict[str, Any]) -> list[str]:
    """The part of results/README.md about the figures in predictions.json."""
    rows = []
    for what in next(iter(found["variants"].values())):
        row = [what]
        for figures in found["variants"].values():
            cell = f"{100 * figures[what]['mean']:.2f}%"
            if "change" in figures[what]:
                low, high = figures[what]["change"]
                cell += f" ({100 * low:+.2f} to {100 * high:+.2f})"
            row.append(cell)
        rows.append(row)
    labels = [VARIANTS[name].label for name in found["variants"]]
    return [
        "## What the variants predict",
        markdown(["mean probability on the test text", *labels], rows),
        f"{found['about']}\nIn brackets the 95% interval of the difference to the first column, in points, over the "
        "text.",
        source("predictions.py", [found["stamp"]]),
    ]


def trained(args: argparse.Namespace) -> tuple[dict[str, Trainer], Corpus]:
    """The trained variants, the baseline first, and their text."""
    trainers, runs = {}, experiments()[args.experiment]
    text = text_of(runs[0], args)  # all runs of an experiment have the same
    for run in runs:
        if run.seed != args.seed or run.label not in VARIANTS:
            continue
        trainer = make_trainer(run, text, args)
        resume(trainer, run, identity_of(run, text, settings_of(run, text, args)), args.runs)
        if not trainer.done:
            print(f"{run.name} has not been trained to its end in {args.runs}: left out", file=sys.stderr)
            continue
        trainer.model.load_state_dict(trainer.best["weights"])
        trainers[run.variant] = trainer
    if "baseline" not in trainers:
        raise CompareError(f"the baseline of {args.experiment}, seed {args.seed}, is missing: run.py trains it")
    return trainers, text


def compare(trainers: dict[str, Trainer], target: Tensor, function: Tensor) -> dict[str, dict[str, Any]]:
    """Each variant's mean of every figure, and the interval of its difference to the baseline's.

    target: the test text (n_tokens,); function: ids of function words.
    """
    yardstick = nearest(trainers["baseline"].model.embedding.weight)
    figures: dict[str, dict[str, Any]] = {}
    first: dict[str, Tensor] = {}
    for name, trainer in trainers.items():
        values = summary(measure(trainer, function, yardstick), target, function.cpu())
        first = first or values
        figures[name] = {what: {"mean": float(per_token.double().mean())} for what, per_token in values.items()}
        if values is not first:
            for what, per_token in values.items():
                interval = over_text(per_token.double() - first[what].double())
                figures[name][what]["change"] = [interval.low, interval.high]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.add_argument("--experiment", default="small", choices=list(experiments()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="contexts to print")
    args = parser.parse_args()
    trainers, text = trained(args)
    device = trainers["baseline"].device
    function = function_words(text.words).to(device)
    figures = compare(trainers, text.test, function)
    shares = [100 * float(torch.isin(text.test, ids.cpu()).double().mean()) for ids in (torch.tensor([UNK]), function)]
    about = (
        f"{args.experiment}, seed {args.seed} alone, {len(text.test):,} tokens of {text.name}; {shares[0]:.1f}% of "
        f"them are `<unk>`, {shares[1]:.1f}% function words: {', '.join(text.words[i] for i in function.tolist())}."
    )
    report = {"about": about, "stamp": stamp(device), "variants": figures}
    args.results.mkdir(parents=True, exist_ok=True)
    write_atomically(args.results / "predictions.json", (json.dumps(report, indent=1) + "\n").encode())
    print("\n\n".join(section(report)[0]))
    if args.show:
        show(trainers, text.words, args.show)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompareError as error:
        sys.exit(f"error: {error}")
