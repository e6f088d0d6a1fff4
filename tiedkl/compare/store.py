"""The output directory: settings, checkpoints and reports, each written whole or not at all."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from .settings import CompareError

CONFIG = "config.json"
REPORTS = ("report.json", "report.html", "report.md")
PLAN = "plan"  # what `--budget` decided: kept, not compared


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and move it into place, or raise CompareError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CompareError(f"{path}: cannot be written ({error.strerror})") from None


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Settings that differ, in words, the plan apart; "" for none. One that is missing counts as None."""
    changed = [k for k in sorted((old.keys() | new.keys()) - {PLAN}) if old.get(k) != new.get(k)]
    return "; ".join("the text" if k == "corpus" else f"{k}={old.get(k)}, now {new.get(k)}" for k in changed)


def checkpoint_name(variant: str, seed: int, first: int) -> str:
    """`real` for the first seed of a comparison, `real-2` for another."""
    return variant if seed == first else f"{variant}-{seed}"


class Store:
    """Files of one comparison under `out`."""

    def __init__(self, out: str) -> None:
        self.path = Path(out).expanduser()

    def open(self, config: dict[str, Any], *, fresh: bool) -> bool:
        """Claim the directory for `config`; True when it holds an earlier run of the same configuration.

        Raises CompareError when the directory cannot be used or belongs to another configuration.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if fresh:
                self._clear()
            file = self.path / CONFIG
            if file.exists() and any(self.path.glob("*.pt")):
                self._check(json.loads(file.read_text("utf-8")), config)
                return True
            write_atomically(file, json.dumps(config, indent=1).encode())
        except OSError as error:
            raise CompareError(f"{self.path}: cannot write there ({error.strerror})") from None
        except ValueError as error:
            if isinstance(error, CompareError):
                raise
            raise CompareError(f"{self.path / CONFIG}: not readable; use --fresh or another --out") from None
        return False

    def planned(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The plan of an earlier run of the same configuration, if there is one."""
        try:
            old = json.loads((self.path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return old.get(PLAN) if isinstance(old, dict) and not differences(old, config) else None

    def _check(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        what = differences(old, new)
        if what:
            raise CompareError(
                f"{self.path} holds a comparison with other settings ({what}): "
                "start again with --fresh, or choose another --out"
            )

    def _clear(self) -> None:
        for file in (CONFIG, *REPORTS):
            (self.path / file).unlink(missing_ok=True)
        for checkpoint in self.path.glob("*.pt"):
            checkpoint.unlink()

    def save(self, variant: str, state: dict[str, Any]) -> None:
        """Keep `state` as the variant's checkpoint."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.path / f"{variant}.pt", buffer.getvalue())

    def has(self, variant: str) -> bool:
        return (self.path / f"{variant}.pt").exists()

    def load(self, variant: str, device: torch.device) -> dict[str, Any] | None:
        """The variant's checkpoint, if there is one. Raises CompareError when it cannot be read."""
        file = self.path / f"{variant}.pt"
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            raise CompareError(
                f"{file}: not a readable checkpoint ({type(error).__name__}); move it away, or start again with --fresh"
            ) from None
        return state

    def write(self, name: str, text: str) -> Path:
        """Keep a report."""
        write_atomically(self.path / name, text.encode("utf-8"))
        return self.path / name
