"""The language model of each variant, and the one loss that serves all.

            output matrix     bias   weight of the KL        similarity metric
baseline    its own (V, D)    yes    0                       -
+AL         its own (V, D)    yes    gamma * temperature     the input embedding
+RE         the embedding     yes    0                       -
+REAL       the embedding     yes    gamma * temperature     the embedding (that is, the output matrix)

+LS and +RE+LS are the baseline and +RE with label smoothing in the cross-entropy they are trained on.

The paper gives reused embeddings no bias (`tied_bias=False`). Here all have one: without it the tied models must
learn word frequencies through the embedding, which costs them the first epochs and makes a short comparison unfair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tiedkl

from ..plan import Plan
from .lstm import State, VariationalLSTM
from .settings import INITIAL_RANGE, Variant
from .transformer import Transformer


class LanguageModel(nn.Module):
    """Embedding (V, D), body (T, B, D) -> (T, B, D), and the output matrix, which is the embedding when `tied`."""

    def __init__(self, n_vocab: int, settings: dict[str, Any], *, tied: bool) -> None:
        super().__init__()
        width, layers, dropout = settings["hidden"], settings["layers"], settings["dropout"]
        self.embedding = nn.Embedding(n_vocab, width)
        self.body: VariationalLSTM | Transformer = (
            VariationalLSTM(width, layers, dropout, triton=settings["impl"] in ("auto", "triton"))
            if settings["model"] == "lstm"
            else Transformer(width, layers, dropout, settings["bptt"])
        )
        self.output = None if tied else nn.Linear(width, n_vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_vocab)) if settings["tied_bias"] or not tied else None
        others = settings.get("initial_range", INITIAL_RANGE)
        self._initialise(settings["seed"], settings["model"], (settings["embedding_range"], others, others))

    def _initialise(self, seed: int, kind: str, ranges: tuple[float, float, float]) -> None:
        """Draw every parameter from its own stream, so that what two variants share starts equal.

        LSTM: uniform, each of embedding, body and output in + and - its range. Transformer: normal of deviation 0.02,
        norms one, biases zero.
        """
        with torch.no_grad():
            for k, part in enumerate((self.embedding, self.body, self.output)):
                if part is None:
                    continue
                generator = torch.Generator().manual_seed(seed * 3 + k)
                for name, p in part.named_parameters():
                    if kind == "lstm":
                        p.uniform_(-ranges[k], ranges[k], generator=generator)
                    elif p.dim() > 1:
                        p.normal_(0.0, 0.02, generator=generator)
                    else:
                        p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)

    @property
    def weight(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.embedding.weight if self.output is None else self.output.weight

    def forward(self, tokens: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """tokens (T, B) int64 -> hidden states (T, B, D) and the state to carry on, detached."""
        hidden, state = self.body(self.embedding(tokens), state, generator)
        return hidden, state


class VariantLoss(nn.Module):
    """The loss of a variant: the sum over a window's tokens, and the terms of `TiedLossOutput`, summed too."""

    def __init__(self, variant: Variant, settings: dict[str, Any]) -> None:
        super().__init__()
        self.variant = variant
        self.arguments = {
            "temperature": settings["temperature"],
            "alpha": settings["gamma"] * settings["temperature"] if variant.augmented else 0.0,
            "target_grad": settings["target_grad"] and variant.augmented,
            "label_smoothing": settings["label_smoothing"] if variant.smoothed else 0.0,
            "impl": settings["impl"],
        }
        self.loss = tiedkl.FusedTiedLoss(**self.arguments, reduction="sum", return_terms=True)
        self.plain = tiedkl.FusedTiedLoss(alpha=0.0, impl=settings["impl"], reduction="sum", return_terms=True)
        self.by_token = tiedkl.FusedTiedLoss(alpha=0.0, impl=settings["impl"], reduction="none")

    def inputs(self, model: LanguageModel, hidden: Tensor, target: Tensor) -> dict[str, Any]:
        """The arguments of the loss; without `target_grad` the similarity target is a constant, its metric detached."""
        call = {"input": hidden, "weight": model.weight, "target": target, "bias": model.bias}
        if self.variant.augmented and not self.variant.tied:
            metric = model.embedding.weight
            call["target_weight"] = metric if self.arguments["target_grad"] else metric.detach()
        return call

    def plan(self, model: LanguageModel, n_tokens: int) -> Plan:
        """How the loss of a window of `n_tokens` tokens, and its gradient, are computed."""
        hidden = model.weight.new_zeros(n_tokens, model.weight.shape[1]).requires_grad_()
        target = torch.zeros(n_tokens, dtype=torch.int64, device=hidden.device)
        call = self.inputs(model, hidden, target)
        return tiedkl.explain(**call, **self.arguments, reduction="sum", return_terms=True)

    def forward(self, model: LanguageModel, hidden: Tensor, target: Tensor) -> Any:
        """hidden (T, B, D), target (T, B) -> TiedLossOutput."""
        return self.loss(**self.inputs(model, hidden, target))

    def cross_entropy(self, model: LanguageModel, hidden: Tensor, target: Tensor) -> Tensor:
        """Plain cross-entropy, summed: what every variant is judged by."""
        return self.plain(hidden, model.weight, target, model.bias).ce

    def token_cross_entropy(self, model: LanguageModel, hidden: Tensor, target: Tensor) -> Tensor:
        """Plain cross-entropy of each token, shaped like `target`; 0 where that is ignored."""
        return self.by_token(hidden, model.weight, target, model.bias)
