"""Supervised fine-tuning with TRL's SFTTrainer: prompts are not learnt from, completions are, with CE + alpha KL.

SFTTrainer (trl 1.x) computes a cross-entropy of its own from the hidden states and never asks the model for a loss. One
line in a subclass makes it take the model's, which `patch_model` has made the fused one.

    python examples/trl_sft.py [--smoke]
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from small import LENGTH, corpus, gpt2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

import tiedkl
from tiedkl.integrations.transformers import log_terms, patch_model


class TiedSFTTrainer(SFTTrainer):
    """SFTTrainer with the loss of the model."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def examples(stream: torch.Tensor, count: int) -> Dataset:
    """Pieces of the text; the first half is the prompt and has no labels."""
    rows = stream[: count * LENGTH].view(-1, LENGTH).tolist()
    masks = [[0] * (LENGTH // 2) + [1] * (LENGTH - LENGTH // 2)] * len(rows)
    return Dataset.from_dict({"input_ids": rows, "completion_mask": masks})


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; the log history of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    steps = 30 if parser.parse_args(argv).smoke else 300

    text = corpus()
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(text.words)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    model = patch_model(gpt2(len(text.words)), tiedkl.FusedTiedLoss(temperature=5.0, gamma=0.5))

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            completion_only_loss=True,
            max_length=LENGTH,
            loss_type="nll",
            learning_rate=3e-3,
            logging_steps=steps // 6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        trainer = TiedSFTTrainer(
            model=model, args=arguments, train_dataset=examples(text.train, 1000), processing_class=tokenizer
        )
        log_terms(trainer)
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
