"""Tests of what only a GPU shows. Everything here is marked `gpu`, and skipped without a CUDA device."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiedkl import backends

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures at once: a run that its time limit ends may not come to its summary."""
    if report.failed and "tests/gpu/" in report.nodeid:
        sys.stderr.write(f"\n{report.nodeid}\n{report.longreprtext}\n")


@pytest.fixture(params=["triton", "cuda"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend for GPUs that can run here; a module's IMPL, if it has one, is set to its name."""
    name = str(request.param)
    why = backends.load(name).unsupported(torch.device("cuda"), torch.float32)
    if why:
        pytest.skip(why)
    if hasattr(request.module, "IMPL"):
        monkeypatch.setattr(request.module, "IMPL", name)
    return name


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Whatever a test leaves behind, the next one finds the device's memory free and its settings as they were."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
