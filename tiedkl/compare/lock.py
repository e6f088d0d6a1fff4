"""Who works in an output directory: one command at a time, or one process after another."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .settings import CompareError


@contextmanager
def locked(out: Path, name: str, command: str, option: str = "--out") -> Iterator[None]:
    """Hold the directory `out` for `command`, by a lock on the file `name` in it, which stays there.

    `option` is how a user chooses another directory.

    The directory is made where there is none. Raises CompareError when another process works there, or it cannot be
    used. The system drops the lock of a process that was killed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / name, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise CompareError(f"{out}: cannot write there ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompareError(
                f"{out}: another {command} is at work there; wait for it, or choose another {option}"
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def in_turn(out: Path) -> Iterator[None]:
    """One process after another with what is in the directory `out`: others wait. Not for use within `in_turn`."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # on the folder: closing a file of SQLite's would drop its own locks
        yield
    finally:
        os.close(handle)
