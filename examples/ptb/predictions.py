"""What the variants predict: the probability of <unk>, of function words, and of words near the target.

    python examples/ptb/predictions.py --data DIR [--runs ptb-runs] [--show 5]

The paper says of +REAL that it gives <unk> and very frequent words less probability, and words near the target in
embedding space more. Measured on every token of the test text with the weights that run.py left in --runs (best epoch
by validation). Near are the ten words of highest cosine similarity to the target, of the reported words only, once in
the variant's own input embedding and once in the baseline's, which is the same yardstick for all.
--show N prints contexts of the test text with the words that each variant holds most likely.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from experiments import experiments
from run import add_text_options, make_trainer
from torch import Tensor

from tiedkl.compare import corpus as corpora
from tiedkl.compare.settings import VARIANTS, CompareError
from tiedkl.compare.statistics import over_text
from tiedkl.compare.store import Store, write_atomically
from tiedkl.compare.training import Trainer
from tiedkl.environment import stamp

N_FREQUENT, N_NEAR, N_TOP, CONTEXT = 20, 10, 8, 12
UNK, EOS = 0, 1


def frequent_words(train: Tensor, n_vocab: int) -> Tensor:
    """Ids of the most frequent words of the training text, <unk> and <eos> left out: nearly all are function words."""
    counts = train.bincount(minlength=n_vocab)
    counts[[UNK, EOS]] = 0
    return counts.topk(min(N_FREQUENT, n_vocab)).indices


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
def measure(trainer: Trainer, frequent: Tensor, yardstick: Tensor) -> dict[str, Tensor]:
    """Per-token figures of the test text, each (n_tokens,) in the order of the text."""
    model = trainer.model.eval()
    own = nearest(model.embedding.weight)
    columns: dict[str, list[Tensor]] = {}
    inputs, targets = trainer.data.test
    state = model.body.start(inputs.shape[1])
    bptt = trainer.settings["bptt"]
    for x, y in zip(inputs.split(bptt), targets.split(bptt), strict=True):
        hidden, state = model(x, state, trainer.generator)
        p = torch.nn.functional.linear(hidden, model.weight, model.bias).softmax(-1)
        ids = y.clamp(min=0)
        figures = {
            "target": p.gather(-1, ids[..., None])[..., 0],
            "unk": p[..., UNK],
            "frequent": p[..., frequent].sum(-1),
            "near, own embedding": p.gather(-1, own[ids]).sum(-1),
            "near, baseline's embedding": p.gather(-1, yardstick[ids]).sum(-1),
        }
        for name, values in figures.items():
            columns.setdefault(name, []).append(values)
    keep = targets.T.reshape(-1) >= 0
    return {name: torch.cat(parts).T.reshape(-1)[keep].cpu() for name, parts in columns.items()}


def summary(tokens: dict[str, Tensor], target: Tensor, frequent: Tensor) -> dict[str, Tensor]:
    """The figures of the report: per-token values (n,) over the tokens that each speaks of."""
    is_unk, is_frequent = target == UNK, torch.isin(target, frequent)
    word = ~is_unk & (target != EOS)
    return {
        "the right word": tokens["target"],
        "`<unk>`, where it is wrong": tokens["unk"][~is_unk],
        "`<unk>`, where it is right": tokens["unk"][is_unk],
        f"the {len(frequent)} most frequent words, where they are wrong": tokens["frequent"][~is_frequent],
        f"the {len(frequent)} most frequent words, where one is right": tokens["frequent"][is_frequent],
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


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table; cells beyond the columns are left out."""
    lines = [columns, ["---"] * len(columns), *(row[: len(columns)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(found: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The part of results/README.md about the figures in predictions.json, and its pictures."""
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
        "text.\n"
        f"`python examples/ptb/predictions.py --data DIR`; commit {found['stamp']['git_commit'][:7]}.",
    ], {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.add_argument("--experiment", default="small", choices=list(experiments()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="contexts to print")
    args = parser.parse_args()
    store, trainers = Store(args.runs), {}
    for run in experiments()[args.experiment]:
        if run.seed == args.seed and run.label in VARIANTS:
            trainer = make_trainer(run, args)
            state = store.load(run.name, trainer.device)
            if state is None or not state["best"]:
                print(f"{run.name} is not in {args.runs}: train it with run.py, for an epoch at least", file=sys.stderr)
                continue
            trainer.model.load_state_dict(state["best"]["weights"])
            trainers[run.variant] = trainer
    if "baseline" not in trainers:
        raise CompareError("the baseline is what the others are compared with; it is missing")
    text = corpora.load(args.data, vocab_size=args.vocab_size)
    base = trainers["baseline"]
    frequent = frequent_words(text.train, len(text.words)).to(base.device)
    yardstick = nearest(base.model.embedding.weight)
    target = base.data.test[1].T.reshape(-1)
    target = target[target >= 0].cpu()
    figures: dict[str, dict[str, Any]] = {}
    first: dict[str, Tensor] = {}
    for name, trainer in trainers.items():
        values = summary(measure(trainer, frequent, yardstick), target, frequent.cpu())
        first = first or values
        figures[name] = {}
        for what, per_token in values.items():
            figures[name][what] = {"mean": float(per_token.double().mean())}
            if values is not first:
                interval = over_text(per_token.double() - first[what].double())
                figures[name][what]["change"] = [interval.low, interval.high]
    for what in first:
        print(
            f"{what:<70}" + "".join(f"{VARIANTS[v].label} {100 * figures[v][what]['mean']:6.2f}%   " for v in figures)
        )
    share = [float((target == UNK).double().mean()), float(torch.isin(target, frequent.cpu()).double().mean())]
    about = (
        f"{args.experiment}, seed {args.seed}, {len(target):,} tokens of {text.name}; {100 * share[0]:.1f}% of them "
        f"are `<unk>`, {100 * share[1]:.1f}% one of the most frequent: "
        f"{', '.join(text.words[i] for i in frequent.tolist())}."
    )
    print(about)
    report = {"about": about, "stamp": stamp(base.device), "variants": figures}
    args.results.mkdir(parents=True, exist_ok=True)
    write_atomically(args.results / "predictions.json", (json.dumps(report, indent=1) + "\n").encode())
    if args.show:
        show(trainers, text.words, args.show)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompareError as error:
        sys.exit(f"error: {error}")
