"""A trainer whose augmented loss differs in one thing from the library's: for the ablations only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tiedkl
from tiedkl.compare.training import Trainer

AVERAGE_DECAY = 0.999  # of the moving average of the embedding, a step


class AblatedTrainer(Trainer):
    """`options`, each optional:

    target_grad: the gradient flows through the similarity target.
    label_smoothing: of the cross-entropy.
    temperatures: (first, last) of a straight line over the training steps; alpha = gamma * temperature follows.
    similarity: "average", an exponential moving average of the embedding, or "frozen", the embedding of another model
        (`vectors`, (V, D)), as source of the similarity target.
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
        self.loss.inputs = self._inputs  # type: ignore[method-assign]

    def _set_loss(self) -> None:
        s, o = self.settings, self.options
        first, last = o.get("temperatures", (s["temperature"], s["temperature"]))
        share = self.steps_done / max(1, self.steps_per_epoch * s["epochs"] - 1)
        temperature = first + (last - first) * share
        self.loss.loss = tiedkl.FusedTiedLoss(
            temperature=temperature,
            alpha=s["gamma"] * temperature if self.variant.augmented else 0.0,
            target_grad=o.get("target_grad", False),
            label_smoothing=o.get("label_smoothing", 0.0),
            impl=s["impl"],
            reduction="sum",
            return_terms=True,
        )

    def _inputs(self, model: Any, hidden: Tensor, target: Tensor) -> dict[str, Any]:
        call: dict[str, Any] = {"input": hidden, "weight": model.weight, "target": target, "bias": model.bias}
        if self.source is not None:
            call["target_weight"] = self.source
        elif self.variant.augmented and not self.variant.tied:
            source = model.embedding.weight
            call["target_weight"] = source if self.options.get("target_grad") else source.detach()
        return call

    def _train_step(self) -> None:
        if "temperatures" in self.options:
            self._set_loss()
        super()._train_step()
        if self.options.get("similarity") == "average" and self.source is not None:
            with torch.no_grad():
                self.source.lerp_(self.model.embedding.weight, 1 - AVERAGE_DECAY)
