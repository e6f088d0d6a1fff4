"""Train a small tied language model whose matrix is sharded by rows of the vocabulary over the ranks.

    torchrun --nproc-per-node 2 examples/distributed.py            # --smoke: a few seconds

Each rank holds V / ranks rows as one parameter, which is its part of the embedding and of the classifier. The body is
the same on every rank. The text is Python's built-in help.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tiedkl
from tiedkl.compare import corpus
from tiedkl.distributed import VocabParallelTiedLoss


class VocabParallelEmbedding(nn.Module):
    """Rows [first, last) of the (vocab, width) matrix; all ranks together look up every token."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        rank, world = dist.get_rank(), dist.get_world_size()
        self.first, self.last = vocab * rank // world, vocab * (rank + 1) // world
        whole = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        self.weight = nn.Parameter(whole[self.first : self.last].clone())

    def forward(self, ids: Tensor) -> Tensor:
        here = (ids >= self.first) & (ids < self.last)
        rows = F.embedding(torch.where(here, ids - self.first, 0), self.weight)
        return Sum.apply(torch.where(here[..., None], rows, 0.0))


class Sum(torch.autograd.Function):
    """Over the ranks. Everything that follows is the same on all of them, and so is its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, d: Tensor) -> Tensor:
        return d


class Model(nn.Module):
    """Embedding, an LSTM, and the loss with the same matrix."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.embedding = VocabParallelEmbedding(vocab, width)
        torch.manual_seed(0)  # the same body on every rank
        self.body = nn.LSTM(width, width)
        self.loss_fn = VocabParallelTiedLoss(temperature=10.0, gamma=0.5, return_terms=True)

    def forward(self, ids: Tensor, targets: Tensor) -> tiedkl.TiedLossOutput:
        hidden, _ = self.body(self.embedding(ids))
        return self.loss_fn(hidden, self.embedding.weight, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.width, args.vocab = 12, 16, 500
    dist.init_process_group("gloo")
    torch.set_num_threads(1)

    tokens = corpus.builtin_tokens()
    words = corpus.build_vocabulary(tokens, args.vocab, 1)
    index = {word: i for i, word in enumerate(words)}
    inputs, targets = corpus.batches(torch.tensor([index.get(word, 0) for word in tokens]), n_seq=16)

    model = Model(len(words), args.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    length = 20
    for step in range(args.steps):
        first = step * length % (len(inputs) - length)
        out = model(inputs[first : first + length], targets[first : first + length])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % max(1, args.steps // 10) == 0:
            print(f"step {step:4d}  loss {out.loss:.4f}  CE {out.ce:.4f}  KL {out.kl:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
