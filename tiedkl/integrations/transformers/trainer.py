"""CE and KL in the logs of transformers' Trainer, beside the loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .patch import loss_totals


class LossTermsCallback(TrainerCallback):
    """Adds `ce` and `kl` to logs with a `loss`, `eval_ce` and `eval_kl` to those with an `eval_loss`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Forget what was computed before. ValueError when the model is not patched."""
        loss_totals(model, reset=True)
        loss_totals(model, training=False, reset=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        """RuntimeError when the trainer got its loss from elsewhere than the patched forward."""
        found: dict[str, float] = {}
        for name in logs or {}:
            if name == "train_loss" or not (name == "loss" or name.endswith("_loss")):
                continue
            totals = loss_totals(model, training=name == "loss", reset=True)
            if not totals.tokens and name == "loss":
                raise RuntimeError(
                    "the trainer did not take its loss from the patched model: leave out label_smoothing_factor (use "
                    "FusedTiedLoss(label_smoothing=...)), use_liger_kernel and compute_loss_func"
                )
            if totals.tokens:
                found |= {f"{name[:-4]}ce": totals.ce, f"{name[:-4]}kl": totals.kl}
        if found:
            logs.update(found)
            if state.log_history:  # a copy of the logs from before the callbacks
                state.log_history[-1].update(found)


def log_terms(trainer: Any) -> None:
    """Let a Trainer with a patched model log mean CE and KL (nats a token, of this process) with every loss.

    The callback goes in front of those that write logs (console, TensorBoard, ...), which
    `Trainer(callbacks=[...])` would not do.

    Raises ValueError when training starts with a model that is not patched, and RuntimeError at the first log when
    the trainer bypassed the patched forward.
    """
    trainer.callback_handler.callbacks.insert(0, LossTermsCallback())
