"""A trainer whose augmented loss differs in one thing from the library's: for the ablations only.

`target_grad` and `label_smoothing` are settings of `tiedkl compare` too; here they stay options, by which the runs in
results/ are known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tiedkl
from tiedkl.compare.training import Trainer

AVERAGE_DECAY = 0.999  # of the moving average of the embedding, a step; less in the first, so that it forgets its start


class BiasInCrossEntropy(torch.nn.Module):
    """`FusedTiedLoss` with a bias that the KL does not see: CE with it, and CE + KL without it, less CE without it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        sums = {"reduction": "sum", "return_terms": True}
        self.both = tiedkl.FusedTiedLoss(**options, **sums)
        self.ce = tiedkl.FusedTiedLoss(**options | {"alpha": 0.0, "target_grad": False}, **sums)

    def forward(self, *, bias: Tensor, target_weight: Tensor | None = None, **call: Any) -> tiedkl.TiedLossOutput:
        ce = self.ce(**call, bias=bias)
        both = self.both(**call, target_weight=target_weight)
        return ce._replace(loss=ce.loss + both.loss - self.ce(**call).loss, kl=both.kl)


class AblatedTrainer(Trainer):
    """`options`, each optional:

    target_grad: the gradient flows through the similarity target.
    label_smoothing: of the cross-entropy.
    temperatures: (first, last) of a straight line over the training steps; alpha = gamma * temperature follows.
    similarity: "average", an exponential moving average of the embedding, or "frozen", the embedding of another model
        (`vectors`, (V, D)), as source of the similarity target; whose it is run.py reads from "vectors".
    kl_bias: False leaves the output bias out of the prediction in the KL, softmax(h w^T / temperature), as the paper
        writes it and its Keras reimplementation computes it.
    """

    _PLAIN = (*Trainer._PLAIN, "source")

    def __init__(self, *args: Any, options: dict[str, Any], vectors: Tensor | None = None) -> None:
        super().__init__(*args)
        self.options = options
        self.source: Tensor | None = None
        similarity = options.get("similarity")
        if similarity == "average":
            self.source = self.model.embedding.weight.detach().clone()
        elif similarity == "frozen":
            if vectors is None:
                raise ValueError("similarity='frozen' needs vectors")
            self.source = vectors.to(self.device)
        elif similarity is not None:
            raise ValueError(f"similarity={similarity!r}: expected 'average' or 'frozen'")
        self._set_loss()
        self._plain_inputs = self.loss.inputs
        self.loss.inputs = self._inputs  # type: ignore[method-assign]

    def _set_loss(self) -> None:
        o = self.options
        options = self.loss.arguments | {name: o[name] for name in ("target_grad", "label_smoothing") if name in o}
        if "temperatures" in o:
            options |= self._annealed(*o["temperatures"])
        self.loss.loss = (
            tiedkl.FusedTiedLoss(**options, reduction="sum", return_terms=True)
            if o.get("kl_bias", True)
            else BiasInCrossEntropy(**options)
        )

    def _annealed(self, first: float, last: float) -> dict[str, float]:
        s = self.settings
        share = self.steps_done / max(1, self.steps_per_epoch * s["epochs"] - 1)
        temperature = first + (last - first) * share
        return {"temperature": temperature, "alpha": s["gamma"] * temperature if self.variant.augmented else 0.0}

    def _inputs(self, model: Any, hidden: Tensor, target: Tensor) -> dict[str, Any]:
        call = self._plain_inputs(model, hidden, target)
        if self.source is not None:
            call["target_weight"] = self.source
        elif self.options.get("target_grad") and "target_weight" in call:
            call["target_weight"] = model.embedding.weight
        return call

    def _capturable(self, call: Any) -> bool:
        """A CUDA graph would keep the first temperature."""
        return "temperatures" not in self.options and super()._capturable(call)

    def _train_step(self) -> None:
        if "temperatures" in self.options:
            self._set_loss()
        super()._train_step()
        if self.options.get("similarity") == "average" and self.source is not None:
            with torch.no_grad():
                decay = min(AVERAGE_DECAY, (1 + self.steps_done) / (10 + self.steps_done))
                self.source.lerp_(self.model.embedding.weight, 1 - decay)
