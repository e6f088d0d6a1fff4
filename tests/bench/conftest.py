"""Small tables for the tests of tiedkl.bench."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tiedkl.bench import peers
from tiedkl.bench.candidates import Candidate
from tiedkl.bench.shapes import Workload


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """As `tiedkl bench` does: every row collects garbage first, half a second among all that tests import."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """None but one that is missing: importing those that are installed takes seconds."""
    absent = Candidate(None, False, "abacus is not installed")
    monkeypatch.setattr(peers, "peers", lambda w: {"abacus CE": absent})


@pytest.fixture
def small() -> Workload:
    return Workload(40, 300, 24, targets="zipf")
