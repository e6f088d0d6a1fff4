"""What every test has in common; the markers are described in pyproject.toml."""

from __future__ import annotations

import os
import types

import pytest
import torch

if not torch.cuda.is_available():  # before the kernels are imported, which cannot be interpreted afterwards
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_triton_once()


def patch_triton_once() -> None:
    """Have Triton's interpreter replace the functions of its language once.

    By itself it looks through all of them in every call that a kernel makes, which takes a third of the time.
    """
    try:
        import triton.experimental.gluon  # noqa: F401  (as kernels/exponential.py: before anything is patched)
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return  # another version
    sees_both = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_both)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing to restore


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
