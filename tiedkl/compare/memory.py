"""How many bytes the loss layer needs, and how many it would need written out in plain PyTorch.

Counted are the gradients of hidden states, output matrix and bias that the layer hands back, with `target_grad` that of
an input embedding of its own too, plus its scratch as `tiedkl.explain` plans it. Eager PyTorch keeps whole (N, V)
matrices alive instead: 3 at the peak of forward and backward for the cross-entropy, 7 with the augmented loss (peak
resident size less that before, divided by N * V * 4; torch 2.13, CPU).
"""

from __future__ import annotations

from typing import Any

import torch

from .models import LanguageModel, VariantLoss

EAGER_MATRICES = {False: 3, True: 7}  # by: augmented? Label smoothing needs no more


def loss_memory(model: LanguageModel, loss: VariantLoss, n_tokens: int) -> dict[str, Any]:
    """Bytes of the loss layer for `n_tokens` tokens in float32: scratch, gradients, total, and eager's total."""
    weight = model.weight
    n_vocab, width = weight.shape
    plan = loss.plan(model, n_tokens)
    matrices_back = 2 if loss.arguments["target_grad"] and not loss.variant.tied else 1
    gradients = 4 * (n_tokens * width + matrices_back * n_vocab * width + (0 if model.bias is None else n_vocab))
    matrices = EAGER_MATRICES[loss.variant.augmented]
    return {
        "tokens": n_tokens,
        "impl": plan.impl,
        "scratch_bytes": plan.scratch_bytes,
        "gradient_bytes": gradients,
        "total_bytes": plan.scratch_bytes + gradients,
        "eager_matrices": matrices,
        "eager_bytes": matrices * n_tokens * n_vocab * 4 + gradients,
    }


def training_memory(model: LanguageModel, optimizer: torch.optim.Optimizer, loss: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a training step, and of plain PyTorch's: parameters, their gradients, optimiser, and the loss layer.

    `loss` is what `loss_memory` gave; its gradients of output matrix and bias are gradients of parameters and counted
    once. Activations of the network are left out: they are the same for every variant. AdamW keeps two numbers a
    parameter, stochastic gradient descent none.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    state = 2 * parameters if isinstance(optimizer, torch.optim.AdamW) else 0
    fixed = 2 * parameters + state + 4 * loss["tokens"] * model.weight.shape[1]
    return {
        "parameter_bytes": parameters,
        "gradient_bytes": parameters,
        "optimizer_bytes": state,
        "total_bytes": fixed + loss["scratch_bytes"],
        "eager_bytes": fixed + loss["eager_bytes"] - loss["gradient_bytes"],
    }
