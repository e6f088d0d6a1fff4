"""transformers' Trainer with the tied CE + KL loss: one line more, and one to log CE and KL.

python examples/trainer.py [--smoke]
"""

from __future__ import annotations

import argparse
import tempfile

from small import corpus, gpt2, sequences
from transformers import Trainer, TrainingArguments

import tiedkl
from tiedkl.integrations.transformers import log_terms, patch_model


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; the log history of Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    steps = 30 if parser.parse_args(argv).smoke else 400

    text = corpus()
    model = gpt2(len(text.words))
    model = patch_model(model, tiedkl.FusedTiedLoss(temperature=5.0, gamma=0.5))  # the one line

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=steps // 6,
            eval_strategy="steps",
            eval_steps=steps // 2,
            prediction_loss_only=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=sequences(text.train, 1000),
            eval_dataset=sequences(text.valid, 32),
        )
        log_terms(trainer)
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
