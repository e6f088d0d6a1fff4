"""The fused loss inside Hugging Face transformers' causal language models: docs/transformers.md.

    model = patch_model(model, tiedkl.FusedTiedLoss(temperature=20.0, gamma=0.5))

From then on `model(input_ids, labels=labels)` takes the loss from the hidden states, without a tensor of logits.
"""

from .head import check_tied
from .patch import loss_totals, patch_model, tiedkl_loss, unpatch_model
from .trainer import log_terms

__all__ = ["check_tied", "log_terms", "loss_totals", "patch_model", "tiedkl_loss", "unpatch_model"]
