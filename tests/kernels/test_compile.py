"""Every kernel configuration compiled ahead of time: no spills, shared memory within the device, tensor cores in use.

Compilation needs no GPU. It runs in a process of its own, because the interpreter of the other tests replaces kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_all.py")
SHARED_LIMIT = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
}  # bytes a block can have; sm_86 takes the rows of sm_80
BLOCKS_OUT = ("gradient_kernel", "similarity_kernel", "target_gradient_kernel", "scale_kernel")
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `compile_all.py` prints for all architectures."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *SHARED_LIMIT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
def test_every_configuration(architecture: str, compiled: list[dict[str, Any]]) -> None:
    kernels = [k for k in compiled if k["architecture"] == architecture]
    assert len({k["kernel"] for k in kernels}) == 12
    for k in kernels:
        assert k["spills"] == 0, k
        assert k["shared"] <= SHARED_LIMIT[architecture], k
        if k["kernel"] in BLOCKS_OUT:
            assert k["narrow_stores"] <= 1, k  # the share of KL is a column
        exact = k["dtype"] == "fp32" and k["constants"].get("PRECISION") == "ieee"  # on the multiprocessor's own units
        multiplies = k["tile"] is not None and not k["constants"].get("STORED") and not exact
        assert (TENSOR_CORES[architecture] in k["instructions"]) == multiplies, k
