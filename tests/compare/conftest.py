"""Toy texts and settings that train in a fraction of a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import Settings

WORDS = [f"{a}{b}" for a in "bdgklmnprst" for b in ("a", "e", "i", "o")]


def sentences(n: int, seed: int = 0) -> list[str]:
    """`n` lines in which a word is followed by one of three others."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        word, line = rng.randrange(len(WORDS)), []
        for _ in range(rng.randint(4, 9)):
            line.append(WORDS[word])
            word = (word * 5 + rng.choice((1, 2, 3))) % len(WORDS)
        lines.append(" ".join(line))
    return lines


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 1,900 tokens in one file."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(250)), encoding="utf-8")
    return path


@pytest.fixture
def toy(tmp_path: Path, text_file: Path) -> Any:
    """Builds Settings for a tiny quiet run in tmp_path/out."""

    def make(**changes: Any) -> Settings:
        values: dict[str, Any] = {
            "data": str(text_file), "out": str(tmp_path / "out"), "variants": ("baseline", "real"), "epochs": 2,
            "hidden": 16, "batch": 4, "bptt": 20, "impl": "reference", "threads": 1, "quiet": True,
        }  # fmt: skip
        return Settings(**values | changes)

    return make
