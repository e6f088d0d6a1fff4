"""Peak memory of a training step of a GPT-2 with 50,257 words, before and after `patch_model`, and the prediction.

The patched step never holds logits. What stands in for them is the scratch that `tiedkl.explain` promises.

    python examples/memory.py          (Linux, CPU)
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # or freed blocks of earlier steps would hide growth
if os.environ.get("TIEDKL_MEMORY_EXAMPLE") != "1":  # glibc reads it when a process starts
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TIEDKL_MEMORY_EXAMPLE": "1"})

import torch
from small import LENGTH, gpt2

import tiedkl
from tiedkl.bench.steps import Step, nothing, peak_bytes
from tiedkl.integrations.transformers import patch_model

MIB = 1 << 20


def step_peak(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes at the peak of forward and backward beyond what was there before; gradients are there before."""

    def step() -> tuple[torch.Tensor, None, None]:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), None, None

    step()  # makes the gradients, and the libraries' buffers
    peak, _ = peak_bytes(Step(nothing, step), torch.device("cpu"))
    if peak is None:
        raise SystemExit("the peak cannot be measured here: it needs Linux's /proc")
    return peak


def main() -> None:
    torch.set_num_threads(1)
    ids = torch.randint(50257, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    model = gpt2(50257).train()
    loss = tiedkl.FusedTiedLoss()
    before = step_peak(model, ids)
    after = step_peak(patch_model(model, loss), ids)
    weight = model.get_output_embeddings().weight
    hidden = torch.empty(*ids.shape, weight.shape[1], requires_grad=True)
    plan = tiedkl.explain(hidden, weight, ids, shift=1)
    logits = ids.numel() * weight.shape[0] * 4
    print(plan)
    found = {
        "before": before,
        "after": after,
        "logits": logits,
        "scratch": plan.scratch_bytes,
        "matrix": weight.numel() * 4,
    }
    print("  ".join(f"{k} {v / MIB:.1f} MiB" for k, v in found.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
