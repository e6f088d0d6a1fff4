"""The output directory: settings, checkpoints and reports, each written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from .settings import INITIAL_RANGE, VARIANTS, CompareError, Settings

CONFIG, LOCK = "config.json", "compare.lock"
REPORTS = ("report.json", "report.html", "report.md")
# settings that earlier versions did not have
LATER = {"embedding_range": INITIAL_RANGE, "label_smoothing": Settings.label_smoothing, "target_grad": False}
PLAN = "plan"  # what `--budget` decided: kept, not compared
CHECKPOINT = re.compile(rf"({'|'.join(VARIANTS)})(?:-(-?\d+))?\.pt")


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
    """Settings that differ, in words, the plan apart; "" for none. One that is missing counts as None.

    Where `old` was written by an earlier version, settings that are newer had the values of `LATER`.
    """
    old = LATER | old
    changed = [k for k in sorted((old.keys() | new.keys()) - {PLAN}) if old.get(k) != new.get(k)]
    return "; ".join("the text" if k == "corpus" else f"{k}={old.get(k)}, now {new.get(k)}" for k in changed)


def checkpoint_name(variant: str, seed: int, first: int) -> str:
    """`real` for the first seed of a comparison, `real-2` for another."""
    return variant if seed == first else f"{variant}-{seed}"


class Store:
    """Files of one comparison under `out`."""

    def __init__(self, out: str) -> None:
        self.path = Path(out).expanduser()

    def earlier(self, config: dict[str, Any], *, fresh: bool) -> dict[str, Any] | None:
        """What an earlier run of the same configuration wrote; None where there is none, or `fresh` discards it.

        A budget that is not repeated counts as the same. Raises CompareError when the directory belongs to another
        configuration, or holds files that `begin` would replace and that are not of a comparison.
        """
        old = self.config()
        if old is None or fresh:
            return None
        if old.get(PLAN) and config["budget"] is None:
            config = config | {"budget": old["budget"]}
        what = differences(old, config)
        if not what:
            return old
        if self._own() == [CONFIG]:  # nothing is lost
            return None
        if not differences(old | {"threads": config["threads"]}, config):
            raise CompareError(
                f"{self.path} holds a comparison with another number of CPU threads: --threads {old['threads']} "
                "continues it; --fresh starts again, another --out leaves it alone"
            )
        raise CompareError(
            f"{self.path} holds a comparison with other settings ({what}): "
            "start again with --fresh, or choose another --out, to which --reuse brings the runs that are the same"
        )

    def begin(self, config: dict[str, Any]) -> None:
        """Remove what an earlier run left and write `config`. To be called after `earlier` has found None."""
        try:
            for name in self._own():
                (self.path / name).unlink()
        except OSError as error:
            raise CompareError(f"{self.path}: cannot write there ({error.strerror})") from None
        write_atomically(self.path / CONFIG, json.dumps(config, indent=1).encode())

    def checkpoints(self, first: int) -> list[tuple[int, str]]:
        """Seed and variant of each checkpoint there; `first` is the seed that names do not have in them."""
        found = [CHECKPOINT.fullmatch(name) for name in self._own()]
        return [(int(match[2] or first), match[1]) for match in found if match]

    def _own(self) -> list[str]:
        """Files that are there under the names of a comparison, config.json last."""
        checkpoints = sorted(f.name for f in self.path.glob("*.pt") if CHECKPOINT.fullmatch(f.name))
        return [*checkpoints, *(name for name in (*REPORTS, CONFIG) if (self.path / name).exists())]

    def config(self) -> dict[str, Any] | None:
        """The content of config.json, None where a comparison would be the first one there."""
        own = self._own()
        if not own:
            return None
        try:
            old = json.loads((self.path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError):
            old = None
        if not isinstance(old, dict) or "corpus" not in old:
            raise CompareError(
                f"{self.path / own[-1]} is not of a comparison, or damaged: move it away, or choose another --out"
            )
        budget = old.get("budget")
        if isinstance(budget, str) and budget.replace(".", "", 1).isdigit():
            old["budget"] = f"{budget}s"  # of a version that took seconds without a unit
        return old

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
