"""The fused loss of one model: its options, the scale and softcap of the model's logits, and sums for the logs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...loss import FusedTiedLoss, TiedLossOutput
from . import head as heads


class LossTotals(NamedTuple):
    """Means over tokens, in nats, of what a model computed since the totals were last reset; NaN for no tokens."""

    ce: float
    kl: float
    tokens: int


@dataclass
class ModelLoss:
    """What a patched model carries. The loss is no submodule of it: the model's modules and state stay the same."""

    loss: FusedTiedLoss  # with return_terms, and the model's softcap
    scale: float  # of the logits
    tied: bool
    return_logits: bool | None
    totals: dict[tuple[bool, torch.device], Tensor] = field(default_factory=dict)  # (training, device) -> (3,) float64

    @property
    def kl(self) -> bool:
        return self.loss.settings.scalars.options.alpha != 0

    def __call__(
        self, model: Any, head: heads.Head, hidden: Tensor, target: Tensor, shift: int, num_items: Any
    ) -> TiedLossOutput:
        """The loss of hidden states (B, T, D) for targets (B, T); its terms go into the totals."""
        weight = head.weight
        hidden, target = hidden.to(weight.device), target.to(weight.device)
        bias, similarity = head.bias, head.similarity
        if self.scale != 1.0:
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        if similarity is not None:
            similarity = similarity.to(weight.device)  # a device_map may keep embedding and output layer apart
        out = self.loss(hidden, weight, target, bias, target_weight=similarity, num_items=num_items, shift=shift)
        with torch.no_grad():
            tokens = (target[..., shift:] != self.loss.settings.scalars.ignore_index).sum().double()
            n = tokens if num_items is None else torch.as_tensor(num_items, dtype=torch.float64, device=weight.device)
            sums = torch.stack([out.ce.double() * n, out.kl.double() * n, tokens])
            key = model.training, weight.device
            if key in self.totals:
                self.totals[key] += sums
            else:
                self.totals[key] = sums
        return out


def model_loss(
    model: Any, loss: FusedTiedLoss | None, tied: bool, logit_scale: float | None, return_logits: bool | None
) -> ModelLoss:
    """The loss for one model, with what its configuration says of its logits. TypeError, ValueError: `patch_model`."""
    loss = FusedTiedLoss() if loss is None else loss
    if not isinstance(loss, FusedTiedLoss):
        raise TypeError(f"loss must be a tiedkl.FusedTiedLoss, got {type(loss).__name__}")
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{type(model).__name__} is an encoder-decoder model; patch_model takes causal language models")
    scalars = loss.settings.scalars
    if scalars.reduction != ops.MEAN:
        raise ValueError(
            f"the loss has reduction={ops.REDUCTIONS[scalars.reduction]!r}, but a model's loss is a mean over tokens "
            "or over num_items_in_batch: use reduction='mean'"
        )
    cap, asked = heads.softcap(config), scalars.options.softcap
    if cap and asked and cap != asked:
        raise ValueError(
            f"the loss has softcap={asked:g}, but config.{heads.SOFTCAP}={cap:g}: leave softcap out for the model's"
        )
    bound = copy.copy(loss)
    options = replace(scalars.options, softcap=asked or cap)
    bound.settings = loss.settings._replace(scalars=scalars._replace(options=options), return_terms=True)
    scale = heads.logit_scale(config) if logit_scale is None else float(logit_scale)
    return ModelLoss(bound, scale, tied, return_logits)
