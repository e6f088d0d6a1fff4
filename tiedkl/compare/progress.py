"""The progress bar and the epoch lines, on standard error."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """One bar over the steps of all runs, with the time left; silent when `quiet`."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        self._bar: Any = None
        if not quiet:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr, disable=None)

    def step(self, label: str, epoch: int, epochs: int) -> None:
        """One more training step."""
        if self._bar is not None:
            self._bar.set_description_str(f"{label} epoch {epoch}/{epochs}", refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def epoch(self, label: str, row: dict[str, Any], epochs: int) -> None:
        """What an epoch gave."""
        kl = "" if row["train_kl"] is None else f"  KL {row['train_kl']:.5f}"
        self.say(
            f"{label:<8} epoch {row['epoch']:>2}/{epochs}  valid ppl {row['valid_ppl']:8.2f}"
            f"  train CE {row['train_ce']:.3f}{kl}  lr {row['lr']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
