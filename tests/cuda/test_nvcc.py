"""nvcc compiles the CUDA kernels for each generation of GPUs: no spills, no stack, registers that leave room for warps.

Needs nvcc, no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("80", "90a", "100")
REGISTERS = 128  # of 65,536: two thread blocks of 256 at the least
KERNELS = {
    "begin_tokens_kernel": 3,  # dtypes
    "begin_targets_kernel": 3,
    "token_stats_kernel": 2,  # with and without KL
    "teacher_stats_kernel": 1,
    "similarity_kernel": 4,  # two dtypes, with rows that start at multiples of 16 bytes or do not
    "finish_tokens_kernel": 1,
    "gradient_kernel": 7,  # dtypes times KL or not, and one that writes nothing
    "target_gradient_kernel": 3,
}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def resources(said: str) -> list[tuple[str, int, int, int]]:
    """(kernel, registers, bytes of stack, bytes spilled) of every kernel, as ptxas -v reports them."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        (next(k for k in sorted(KERNELS, key=len, reverse=True) if k in name), int(used), int(stack), int(a) + int(b))
        for name, stack, a, b, used in pattern.findall(said)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel(architecture: str, tmp_path: Path) -> None:
    found = []
    for source in ("row_kernels", "similarity", "target_kernels"):
        done = subprocess.run(
            [
                "nvcc", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings",
                f"-arch=sm_{architecture}", str(CSRC / f"cuda/{source}.cu"), "-o", str(tmp_path / source),
            ],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found += resources(done.stdout + done.stderr)
    names = [name for name, *_ in found]
    assert {name: names.count(name) for name in KERNELS} == KERNELS
    for name, registers, stack, spilled in found:
        assert (stack, spilled) == (0, 0), name
        assert registers <= REGISTERS, name


def test_a_spill_would_be_noticed(tmp_path: Path) -> None:
    """The same sources with too few registers."""
    done = subprocess.run(
        [
            "nvcc", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", "-arch=sm_80", "-maxrregcount=24",
            str(CSRC / "cuda/row_kernels.cu"), "-o", str(tmp_path / "spills"),
        ],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert any(spilled for *_, spilled in resources(done.stdout + done.stderr))
