"""A training loop of your own with accelerate: accumulated batches give the update of one large batch.

Each micro-batch divides its sum by the tokens of all of them (`num_items_in_batch`), however they are distributed.

    python examples/accelerate_loop.py [--smoke]
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from small import LENGTH, corpus, gpt2
from torch import Tensor, nn

import tiedkl
from tiedkl.integrations.transformers import loss_totals, patch_model

IGNORED = -100


def batches(stream: Tensor, size: int) -> list[Tensor]:
    """Labels (size, LENGTH); every other sequence is learnt from in its last quarter alone."""
    pieces = stream[: len(stream) // (size * LENGTH) * size * LENGTH].view(-1, size, LENGTH).clone()
    pieces[1::2, :, : LENGTH * 3 // 4] = IGNORED
    return list(pieces)


def train(model: nn.Module, ids: list[Tensor], labels: list[Tensor], accumulate: int, lr: float = 3e-3) -> list[float]:
    """One update for every `accumulate` batches; the loss of each update."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for first in range(0, len(ids) - accumulate + 1, accumulate):
        group = range(first, first + accumulate)
        # A causal model has no prediction for the first token of a sequence.
        items = sum((labels[i][:, 1:] != IGNORED).sum() for i in group)
        items = accelerator.gather(items.to(accelerator.device)).sum()
        total = 0.0
        for i in group:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids[i], labels=labels[i], num_items_in_batch=items).loss
                # accelerator.backward divides by the accumulated steps, and processes average their gradients.
                accelerator.backward(loss * accumulate * accelerator.num_processes)
                optimizer.step()
                optimizer.zero_grad()
                total += float(loss.detach())
        losses.append(total)
    return losses


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    """Train, then compare one update; the losses, and the largest difference in any parameter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    updates = 15 if parser.parse_args(argv).smoke else 150

    text = corpus()
    loss = tiedkl.FusedTiedLoss(temperature=5.0, gamma=0.5)
    model = patch_model(gpt2(len(text.words)), loss)
    stream = text.train[: updates * 4 * 4 * LENGTH]
    labels = batches(stream, 4)
    ids = list(stream.view(-1, 4, LENGTH))
    losses = []
    for chunk in range(0, len(ids), 12):
        losses += train(model, ids[chunk : chunk + 12], labels[chunk : chunk + 12], accumulate=4)
        ce, kl, _ = loss_totals(model, reset=True)
        print(f"update {len(losses):4}   loss {losses[-1]:.4f}   ce {ce:.4f}   kl {kl:.6f}")

    # One update from four micro-batches, beside one from all of them at once. SGD: Adam divides by |gradient|.
    one, four = (patch_model(gpt2(len(text.words)), loss).double() for _ in range(2))
    start = gpt2(len(text.words)).double()
    for model, parts in ((one, 1), (four, 4)):
        accelerator = Accelerator(gradient_accumulation_steps=parts, cpu=True)
        items = sum((x[:, 1:] != IGNORED).sum() for x in labels[:4])
        for x, y in zip(torch.cat(ids[:4]).chunk(parts), torch.cat(labels[:4]).chunk(parts), strict=True):
            accelerator.backward(model(input_ids=x, labels=y, num_items_in_batch=items).loss * parts)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    pairs = list(zip(one.parameters(), four.parameters(), start.parameters(), strict=True))
    difference = max(float((a - b).detach().abs().max()) for a, b, _ in pairs)
    update = max(float((a - c).detach().abs().max()) for a, _, c in pairs)
    print(
        f"largest change of a parameter {update:.3g}, between 4 x 4 and 1 x 16 sequences it differs by {difference:.3g}"
    )
    return losses, difference / update


if __name__ == "__main__":
    main()
