"""The paper's Figure 1: how near the augmented loss alone brings the classifier to the embedding it does not share.

    python examples/ptb/subspaces.py --data DIR      10 runs of some minutes; repeated after an interruption it goes on

An LSTM of 300 units with an embedding L and a classifier W of its own is trained on 20,000 contiguous words, without
regularisation and with the rows of L at norm 1, on beta tau^2 |V| KL + (1 - beta) CE. Measured is how much of W lies
outside the space that the columns of L span, ||W - L L^+ W|| / ||W||: near 1 for spaces that have nothing in common
(sqrt(1 - D / V) for random ones), 0 when W is a linear map of L. Without --data the text is CPython's help texts.

W starts at 0, so that what is measured is what training put there, and L stays as it was drawn, so that there is one
space to be near to. At beta = 1 and tau = 10 a W that starts uniform in +-0.1 keeps most of that start, which hidden
states do not reach (distance 0.91 after ten epochs), and an L that learns runs ahead of W (0.34 after 16 epochs of
Adam at rate 2e-3, from a W in +-0.01). Plain gradient descent, as in the paper: Adam scales each entry of W by itself,
which leaves the space (0.15 after six epochs, where descent has 0.03).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from page import markdown, source
from torch import Tensor, nn

import tiedkl
from tiedkl.compare import corpus as corpora
from tiedkl.compare.lstm import VariationalLSTM
from tiedkl.compare.store import write_atomically
from tiedkl.environment import stamp
from tiedkl.page import figure

BETAS, TEMPERATURES = (0.0, 0.5, 0.9, 1.0), (1.0, 2.0, 10.0)
TITLE = "Distance of the classifier from the embedding"
ALMOST_ONE = 1 - 1e-9  # beta = 1 has no cross-entropy left; the loss always has some


def outside(w: Tensor, basis: Tensor) -> float:
    """The share of w (V, D) outside the column space of basis (V, D), by norm."""
    q, _ = torch.linalg.qr(basis.double())
    w = w.double()
    return float((w - q @ (q.T @ w)).norm() / w.norm())


class Model(nn.Module):
    """Embedding, fixed, with rows of norm 1; LSTM; classifier, 0 at first."""

    def __init__(self, n_vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.body = VariationalLSTM(width, layers, dropout=0.0)
        for p in self.parameters():
            nn.init.uniform_(p, -0.1, 0.1)
        self.register_buffer("embedding", nn.functional.normalize(torch.randn(n_vocab, width), dim=1))
        self.classifier = nn.Parameter(torch.zeros(n_vocab, width))


def train(words: Tensor, n_vocab: int, beta: float, tau: float, args: argparse.Namespace) -> dict[str, Any]:
    """One run; its last cross-entropy, KL and distance, and the distance after every other epoch."""
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    beta = min(beta, ALMOST_ONE)
    model = Model(n_vocab, args.hidden, args.layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    # the paper's sum is (1 - beta) (CE + alpha KL)
    loss_fn = tiedkl.FusedTiedLoss(
        temperature=tau, alpha=beta / (1 - beta) * tau**2 * n_vocab, return_terms=True, reduction="sum"
    )
    inputs, targets = corpora.batches(words, args.batch)
    generator = torch.Generator()
    curve, ce, kl = [], math.nan, math.nan
    for epoch in range(args.epochs):
        state, sums = model.body.start(args.batch), torch.zeros(3)
        for x, y in zip(inputs.split(args.bptt), targets.split(args.bptt), strict=True):
            hidden, state = model.body(nn.functional.embedding(x, model.embedding), state, generator)
            out = loss_fn(hidden, model.classifier, y, target_weight=model.embedding)
            optimizer.zero_grad(set_to_none=True)
            (out.loss * (1 - beta) / args.batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            sums += torch.tensor([float(out.ce), float(out.kl), float((y >= 0).sum())])
        schedule.step()
        ce, kl = float(sums[0] / sums[2]), float(sums[1] / sums[2])
        if (epoch + 1) % 2 == 0 or epoch + 1 == args.epochs:
            curve.append([epoch + 1, outside(model.classifier.detach(), model.embedding)])
    return {"ce": ce, "kl": kl, "distance": curve[-1][1], "curve": curve, "seconds": time.perf_counter() - began}


def distances(report: dict[str, Any]) -> tuple[list[float], dict[float, list[float]]]:
    """The values of beta, and by temperature the distance at each; NaN where there is none."""
    runs = list(report["runs"].values())
    temperatures, betas = (sorted({run[key] for run in runs}) for key in ("tau", "beta"))
    found = {(run["beta"], run["tau"]): run["distance"] for run in runs}
    for tau in temperatures:  # at beta = 0 the temperature plays no part: one run serves all
        found[0.0, tau] = found.get((0.0, temperatures[0]), math.nan)
    return betas, {tau: [found.get((beta, tau), math.nan) for beta in betas] for tau in temperatures}


def picture(report: dict[str, Any]) -> str:
    """The distance against beta, a line a temperature, an SVG file."""
    betas, found = distances(report)

    def paint(axes: Any) -> None:
        for (tau, points), marker in zip(found.items(), "os^Dv*" * len(found), strict=False):
            axes.plot(range(len(betas)), points, marker=marker, linewidth=2, label=f"τ = {tau:g}")
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set(xlabel="β", ylabel="distance", ylim=(0, 1.05))
        axes.legend(frameon=False)

    return figure("subspaces", TITLE, paint)


def section(report: dict[str, Any]) -> list[str]:
    """The part of results/README.md about the figures in subspaces.json."""
    s, (betas, found) = report["settings"], distances(report)
    rows = [[f"{beta:g}", *(f"{points[i]:.3f}" for points in found.values())] for i, beta in enumerate(betas)]
    return [
        f"## Figure 1: {TITLE.lower()} it does not share",
        markdown(["β", *(f"τ = {tau:g}" for tau in found)], rows),
        f"![{TITLE}](subspaces.svg)",
        "||W - L L⁺W|| / ||W||, L fixed, W 0 at first; "
        f"{s['words']:,} words, {s['vocabulary']:,} distinct, {s['hidden']} units, "
        f"{s['epochs']} epochs; spaces drawn at\nrandom are {s['random']:.3f} apart. "
        "The paper: near 1 at β = 0, about 0.06 at β = 1 and τ = 10.",
        source("subspaces.py", [report["stamp"]]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory or file, as for tiedkl compare")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subspaces.json")
    parser.add_argument("--words", type=int, default=20_000)
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--bptt", type=int, default=35)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="toy size")
    args = parser.parse_args()
    betas: tuple[float, ...] = BETAS
    temperatures: tuple[float, ...] = TEMPERATURES
    if args.smoke:
        args.words, args.hidden, args.epochs, args.batch = 600, 16, 2, 4
        betas, temperatures = (0.0, 1.0), (1.0, 10.0)
    text = corpora.load(args.data, vocab_size=1_000_000, min_count=1)
    start = len(text.train) // 2  # contiguous words from the middle of the text
    stream = text.train[start : start + args.words]
    words = torch.cat([stream, stream.new_tensor([0, 1])]).unique()  # <unk> and <eos> keep their ids
    ids = torch.searchsorted(words, stream)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "smoke", "data")}
    settings |= {"data": text.name, "vocabulary": len(words), "random": math.sqrt(1 - args.hidden / len(words))}
    report: dict[str, Any] = {"settings": settings, "stamp": stamp(torch.device("cpu")), "runs": {}}
    if args.out.exists():
        old = json.loads(args.out.read_text())
        if old["settings"] != settings:
            parser.error(f"{args.out} holds runs with other settings; choose another --out")
        report = old
    print(f"{len(ids):,} words, {len(words):,} of them distinct; random spaces are {settings['random']:.3f} apart")
    print(f"{'beta':>6}{'tau':>6}{'CE':>9}{'KL':>11}{'distance':>10}")
    for tau in temperatures:
        for beta in betas:
            key = f"beta={beta:g}" if beta == 0 else f"beta={beta:g} tau={tau:g}"
            if key not in report["runs"]:
                report["runs"][key] = {"beta": beta, "tau": tau} | train(ids, len(words), beta, tau, args)
                write_atomically(args.out, (json.dumps(report, indent=1) + "\n").encode())
            r = report["runs"][key]
            print(f"{beta:6g}{tau:6g}{r['ce']:9.3f}{r['kl']:11.3e}{r['distance']:10.3f}", flush=True)


if __name__ == "__main__":
    main()
