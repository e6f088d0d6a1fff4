"""A LightningModule with an LSTM whose embedding is also its classifier: the loss on hidden states, no logits.

python examples/lightning_module.py [--smoke]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tiedkl
from tiedkl.compare.corpus import load

try:
    import lightning
except ImportError:
    import pytorch_lightning as lightning

LENGTH = 48


class LanguageModel(lightning.LightningModule):
    def __init__(
        self, vocab_size: int, width: int = 64, temperature: float = 5.0, gamma: float = 0.5, lr: float = 3e-3
    ):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.loss_fn = tiedkl.FusedTiedLoss(temperature=temperature, gamma=gamma, return_terms=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states (B, T, D) for token ids (B, T); logits are `hidden @ embedding.weight.T` where wanted."""
        hidden: Tensor = self.lstm(self.embedding(ids))[0]
        return hidden

    def step(self, ids: Tensor, stage: str) -> Tensor:
        out = self.loss_fn(self(ids), self.embedding.weight, ids, shift=1)
        self.log_dict({f"{stage}_loss": out.loss.detach(), f"{stage}_ce": out.ce, f"{stage}_kl": out.kl})
        loss: Tensor = out.loss
        return loss

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.step(ids, "train")

    def validation_step(self, ids: Tensor, index: int) -> None:
        self.step(ids, "valid")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train and validate; the validation metrics before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    steps = 60 if parser.parse_args(argv).smoke else 1000

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    lightning.seed_everything(0, verbose=False)
    text = load(None, vocab_size=2000)

    def loader(stream: Tensor, **kwargs: Any) -> DataLoader:
        return DataLoader(stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH), batch_size=16, **kwargs)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", limit_val_batches=8, num_sanity_val_steps=0, **quiet
    )
    model = LanguageModel(len(text.words))
    found = []
    for stage in ("before", "after"):
        if stage == "after":
            trainer.fit(model, loader(text.train, shuffle=True), loader(text.valid))
        found += trainer.validate(model, loader(text.valid), verbose=False)
        print(stage, "  ".join(f"{k} {v:.4f}" for k, v in found[-1].items()))
    return found


if __name__ == "__main__":
    main()
