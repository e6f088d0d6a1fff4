"""The CUDA backend without a GPU: `tiedkl._C_cuda` with its kernels on the host, on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tiedkl
from tiedkl import backends, ops


def _on_host() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_host", Path(__file__).with_name("on_host.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled() -> ModuleType:
    """The extension compiled for the host, with `set_order` of its threads and `similarities`."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    return _on_host().load()


@pytest.fixture
def extension(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The same as what `impl="cuda"` runs."""
    monkeypatch.setitem(sys.modules, "tiedkl._C_cuda", compiled)
    monkeypatch.setattr(tiedkl, "_C_cuda", compiled, raising=False)
    backend = backends.load("cuda")

    def forget() -> None:
        for cached in (backend.extension, ops._plan):
            cached.cache_clear()

    forget()
    yield compiled
    compiled.set_order(0)
    forget()
