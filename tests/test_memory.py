"""Peak memory beyond inputs and gradients against what the plan promises."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from tiedkl import backends
from tiedkl.plan import TOKEN_BLOCKS, VOCAB_BLOCKS

MIB = 1 << 20
SLACK = 16 * MIB
RUNNABLE = [n for n in ("cpp", "torch") if backends.load(n).unsupported(torch.device("cpu"), torch.float32) is None]
V, D = 12_000, 48
BUDGET = {TOKEN_BLOCKS: 24 * MIB, VOCAB_BLOCKS: 2 * MIB}

# In a process of its own: VmHWM is a process's high-water mark, and freed memory of other work would hide growth.
# The first call loads code and makes the matrix library's buffers. Every block is written in full, so what is allocated
# is resident.
CODE = """
import ctypes, json, sys, torch, tiedkl
impl, v, d, runs = json.loads(sys.argv[1])
torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key + ":"))

def data(n, v, dtype, grad):
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(k, d, generator=g).to(getattr(torch, dtype)).requires_grad_(grad) for k in (n, v))
    return h, w, torch.randint(v, (n,), generator=g)

def step(h, w, y, budget):
    loss = tiedkl.fused_tied_loss(h, w, y, impl=impl, workspace_bytes=budget)
    if loss.requires_grad:
        loss.backward()

def measure(n, dtype, budget, grad):
    step(*data(300, 1000, dtype, grad), budget)
    h, w, y = data(n, v, dtype, grad)
    plan = tiedkl.explain(h, w, y, impl=impl, workspace_bytes=budget)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    step(h, w, y, budget)
    # Unscaled gradients stay in float32 until the upstream scale is known: part of the gradients, not of the scratch.
    gradients = grad * sum(x.numel() * (4 + (x.element_size() if x.element_size() < 4 else 0)) for x in (h, w))
    extra = status("VmHWM") - before - gradients
    return {"extra": extra, "scratch": plan.scratch_bytes, "strategy": plan.strategy, "logits": n * v * 4}

print(json.dumps([measure(*run) for run in runs]))
"""


Run = tuple[int, str, int, bool]  # tokens, dtype, budget, gradients
FEW, MANY = 650, 3700
RUNS: list[Run] = [
    (n, dtype, budget, grad)
    for budget in BUDGET.values()
    for n, dtype, grad in (
        (FEW, "float32", False),
        (FEW, "float32", True),
        (FEW, "bfloat16", False),
        (FEW, "bfloat16", True),
        (MANY, "float32", True),
    )
]


@functools.cache
def measured(impl: str) -> dict[Run, dict[str, int]]:
    """What each of RUNS needed, in bytes; all in one fresh process."""
    # By default glibc may keep freed blocks in the heap, where they would hide growth.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = json.dumps([impl, V, D, RUNS if impl != "reference" else RUNS[1:2]])
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(RUNS if impl != "reference" else RUNS[1:2], json.loads(done.stdout), strict=True))


pytestmark = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", BUDGET)
@pytest.mark.parametrize("impl", RUNNABLE)
def test_peak_is_within_the_plan(impl: str, strategy: str, dtype: str, grad: bool) -> None:
    found = measured(impl)[FEW, dtype, BUDGET[strategy], grad]
    assert found["strategy"] == strategy
    assert found["extra"] <= found["scratch"] + SLACK


@pytest.mark.parametrize("strategy", BUDGET)
@pytest.mark.parametrize("impl", RUNNABLE)
def test_peak_does_not_grow_with_the_tokens(impl: str, strategy: str) -> None:
    few, many = (measured(impl)[n, "float32", BUDGET[strategy], True] for n in (FEW, MANY))
    assert many["scratch"] + SLACK < many["logits"] / 4, "a bound that an (N, V) matrix would break"
    # Few tokens may leave part of the plan unused; beyond that only a few numbers per token may come on top.
    assert many["extra"] <= max(few["extra"], many["scratch"]) + 4 * MIB


def test_the_measurement_sees_a_matrix_of_logits() -> None:
    """The reference backend holds several (N, V) matrices: the bound above must not hold for it."""
    [found] = measured("reference").values()
    assert found["extra"] > 2 * found["logits"]
    assert found["extra"] > BUDGET[TOKEN_BLOCKS] + SLACK
