"""Does a model compute what head.py reads off its configuration? Asked once, of three tokens, when it is patched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head import EVERYTHING, Head, default_device, tapped

TOKENS = 3
LARGEST = 60.0  # of the probe's logits: softcaps are around 30, and rounding to bfloat16 stays below 0.25


def probe(head: Head) -> Tensor:
    """Hidden states (1, 3, D) whose products with the output layer reach up to `LARGEST`, all positions different."""
    width = head.weight.shape[1]
    h = torch.cos(torch.arange(TOKENS * width, device=head.weight.device, dtype=torch.float32) ** 1.5)
    h = h.view(1, TOKENS, width).to(head.weight.dtype)
    top = F.linear(h, head.weight).abs().amax().float()
    return h * (LARGEST / top.clamp_min(1e-20)).to(h.dtype)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random numbers are as before afterwards."""
    training = [m for m in model.modules() if m.training]
    with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        model.eval()
        try:
            yield
        finally:
            for m in training:
                m.training = True


def verify(model: Any, forward: Any, head: Head, scale: float, cap: float, *, hidden_states: bool = False) -> None:
    """Compare the model's own logits and loss, on hidden states of our choice, with what we take them for.

    Args:
        forward: the model's own forward as a function of the model and keyword arguments.
        hidden_states: also check that `outputs.hidden_states[-1]` is what the output layer is given.

    Raises:
        ValueError: when they differ, or the weights are not there (meta device, sharded), with what to do.
    """
    name = type(model).__name__
    if head.weight.device.type == "meta" or not head.weight.numel():
        raise ValueError(
            f"the weights of {name} are not loaded (meta device or sharded), so that its logits cannot be compared: "
            "patch the model before it is sharded, or pass verify=False"
        )
    device, n_words = default_device(model), head.weight.shape[0]
    ids = torch.arange(TOKENS, device=device).clamp_max(n_words - 1)[None]
    labels = torch.tensor([[0, n_words // 3, n_words - 1]], device=device)
    with undisturbed(model, device), torch.autocast(head.weight.device.type, enabled=False):
        given = probe(head)
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True}
        if hidden_states:
            kwargs["output_hidden_states"] = True
        with tapped(head.module, EVERYTHING, instead=given) as tap:
            out = forward(model, labels=labels, **kwargs)
        hidden = tap.only(model)
        wanted = scale * F.linear(given, head.weight, head.bias).double()
        if cap:
            wanted = cap * torch.tanh(wanted / cap)
        # Three roundings to the model's dtype: of the product, its scaling, and its softcap.
        tolerance = 4 * torch.finfo(head.weight.dtype).eps
        if out.logits is None or out.logits.shape != wanted.shape:
            shape = None if out.logits is None else tuple(out.logits.shape)
            raise ValueError(f"{name}: logits of shape {shape}, expected {tuple(wanted.shape)}; {ADVICE}")
        off = float((out.logits.double() - wanted).abs().max() / wanted.abs().max())
        if not off <= tolerance:
            raise ValueError(
                f"{name} does not compute softcap({scale:g} (h w^T + b)) with softcap {cap or None}: its logits are "
                f"off by {off:.2g} of their largest. {ADVICE}"
            )
        ce = F.cross_entropy(wanted[0, :-1], labels[0, 1:].to(wanted.device))
        # Where a router adds to the loss, the logits alone have to do.
        if out.loss is not None and not isinstance(getattr(out, "aux_loss", None), Tensor):
            off = abs(float(out.loss) - float(ce)) / max(1.0, abs(float(ce)))
            if not off <= max(tolerance, 1e-5):
                raise ValueError(
                    f"the loss of {name} is {float(out.loss):.6g}, not the cross-entropy of the next token, "
                    f"{float(ce):.6g}: is it a causal language model? {ADVICE}"
                )
        if hidden_states and not torch.equal(out.hidden_states[-1], hidden):
            raise ValueError(
                f"the output layer of {name} is not given outputs.hidden_states[-1]: use patch_model, which takes what "
                "it is given"
            )


ADVICE = (
    "Pass logit_scale=... to patch_model and softcap=... to the loss if the architecture has them under names that "
    "tiedkl does not know; verify=False goes without this check"
)
