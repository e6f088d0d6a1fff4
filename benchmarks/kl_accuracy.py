"""Relative error of the KL term in float32 as it becomes small: tiedkl and eager PyTorch against float64.

    python benchmarks/kl_accuracy.py
    python benchmarks/kl_accuracy.py --smoke

Hidden states are target embeddings plus noise, so that the prediction comes close to the similarity target.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import tiedkl
from tiedkl import reference
from tiedkl.problem import Options, Problem

TAU = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy size")
    n, v, d = (8, 500, 16) if parser.parse_args().smoke else (64, 20_000, 64)
    torch.manual_seed(0)
    w, y = 0.3 * torch.randn(v, d), torch.randint(v, (n,))
    s = w[y] @ w.T
    loss_fn = tiedkl.FusedTiedLoss(temperature=TAU, alpha=1.0, reduction="none", return_terms=True)
    print(f"N={n} V={v} D={d}, tau={TAU:g}: largest relative error of a token's KL")
    print(f"{'mean KL':>10}{'eager':>10}{'tiedkl':>10}")
    for noise in (1.0, 0.1, 0.01, 0.003, 0.001):
        h = w[y] + noise * torch.randn(n, d)
        truth = reference.forward(Problem(h.double(), w.double(), y, None, None, Options(TAU, 1.0))).kl
        log_r, q = F.log_softmax(h @ w.T / TAU, -1), F.softmax(s / TAU, -1)
        eager = F.kl_div(log_r, q, reduction="none").sum(-1)
        ours = loss_fn(h, w, y).kl
        errors = [float(((x - truth) / truth).abs().max()) for x in (eager, ours)]
        print(f"{float(truth.mean()):10.1e}{errors[0]:10.1e}{errors[1]:10.1e}")


if __name__ == "__main__":
    main()
