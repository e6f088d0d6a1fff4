"""The compiled walk, driven directly: odd sizes, every block size, every instruction set.

Small, as it also runs under sanitizers.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import tiedkl
from tiedkl import reference, testing
from tiedkl.bench.candidates import eager
from tiedkl.bench.shapes import Workload
from tiedkl.bench.steps import inputs, relative, truth
from tiedkl.problem import Needs, Options, Problem

_C: Any = pytest.importorskip("tiedkl._C")

SHAPES = [(1, 1, 1), (1, 2, 3), (5, 3, 1), (2, 17, 5), (13, 31, 7), (33, 129, 9), (7, 2051, 3)]
EVERYTHING = Options(3.0, 2.0, 0.1, 0.01, 4.0, True)
OPTIONS = {
    "default": Options(2.0, 5.0),
    "plain": Options(alpha=0.0),
    "everything": EVERYTHING,
    "target_grad": Options(1.5, 2.0, target_grad=True),
}
# Where the processor multiplies bfloat16 the gradient block is rounded to it, like the results; elsewhere to float32.
GRADIENT = {
    torch.float32: 3e-5,
    torch.float16: 3e-5,
    torch.bfloat16: 2**-8 if _C.build_info()["bf16_products"] else 3e-5,
}
# tokens, distinct targets, vocabulary rows, panel: all at once, nothing at once, sizes that divide nothing
BLOCKS = [(1 << 40, 1 << 40, 1 << 40, 1 << 40), (1, 1, 1, 1), (3, 2, 5, 2), (4, 1, 1000, 7), (2, 5, 16, 1000)]


def problem(n: int, v: int, d: int, options: Options, dtype: torch.dtype, *, extras: bool = True) -> Problem:
    return testing.random_problem(n, v, d, options, dtype, extras, seed=0)


def walk(p: Problem, g: Tensor | None, needs: Needs, blocks: tuple[int, ...]) -> list[Tensor | None]:
    o = p.options
    return _C.walk(
        p.h, p.w, p.y, p.b, p.t, g, o.temperature, o.alpha, o.label_smoothing, o.z_loss, o.softcap, o.target_grad,
        (needs.h, needs.w, needs.b, needs.t), blocks,
    )  # fmt: skip


def check(p: Problem, needs: Needs, blocks: tuple[int, ...], rtol: float, grad_rtol: float | None = None) -> None:
    grad_rtol = rtol if grad_rtol is None else grad_rtol
    g = torch.where(p.y >= 0, torch.linspace(0.5, 2.0, len(p.y)), 0.0).to(p.acc)
    want_terms, want = reference.backward(p.to(torch.float64), g.double(), needs)
    terms, *grads = walk(p, g, needs, blocks)
    assert terms is not None
    torch.testing.assert_close(terms.double(), torch.stack(want_terms), rtol=rtol, atol=rtol)
    for got, right in zip(grads, want, strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            assert got.dtype == p.acc
            scale = float(1 + right.abs().max())
            torch.testing.assert_close(got.double(), right, rtol=grad_rtol, atol=grad_rtol * scale)
    [alone, *none] = walk(p, None, Needs(), blocks)
    assert none == [None] * 4
    assert alone is not None
    torch.testing.assert_close(alone.double(), torch.stack(want_terms), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_block_size_gives_the_same(name: str, blocks: tuple[int, ...]) -> None:
    for n, v, d in SHAPES[:-1]:
        for extras in (False, True):
            p = problem(n, v, d, OPTIONS[name], torch.float64, extras=extras)
            check(p, Needs(True, True, extras, extras), blocks, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks", [BLOCKS[0], BLOCKS[2]], ids=str)
def test_dtypes(dtype: torch.dtype, blocks: tuple[int, ...]) -> None:
    for (n, v, d), options in itertools.product(SHAPES[1:-1], OPTIONS.values()):
        check(problem(n, v, d, options, dtype), Needs(True, True, True, True), blocks, 3e-5, GRADIENT[dtype])


@pytest.mark.parametrize("name", ["default", "everything"])
def test_products_larger_than_any_block_of_theirs(name: str) -> None:
    # csrc/cpu/gemm_bf16.cpp: 516 rows, 1024 columns, 512 steps
    p = problem(530, 1043, 519, OPTIONS[name], torch.bfloat16, extras=False)
    p.h.div_(16)
    for blocks in (BLOCKS[0], (529, 300, 1031, 1031)):
        check(p, Needs(True, True), blocks, 3e-5, GRADIENT[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["default", "everything"])
@pytest.mark.parametrize("width", [523, 200, 33])
def test_wide_products(width: int, name: str, dtype: torch.dtype) -> None:
    # csrc/cpu/gemm_f32.cpp: from 256 columns, or 32 on Zen 5, and 8 rows on; blocks of 128 rows, up to 256 steps
    p = problem(141, 619, width, OPTIONS[name], dtype, extras=False)
    p.h.div_(16)
    for blocks in (BLOCKS[0], (59, 30, 271, 100), (6, 2, 619, 619)):
        check(p, Needs(True, True), blocks, 3e-5)


@pytest.mark.parametrize("width", [512, 200])
@pytest.mark.parametrize("tokens", [448, 64])
def test_gradients_of_wide_products_round_no_more_than_eager(tokens: int, width: int) -> None:
    # d_w in one chain of 448 sums, one of which weighs more than all others, had 1.6 times the error of eager.
    w = Workload(448, 4000, width)
    h, weight, y = inputs(w)
    right = truth(w, h, weight, y, kl=True)

    def errors(loss: Tensor) -> list[float]:
        found = torch.autograd.grad(loss, (h, weight))
        return [relative(x, right[name]) for x, name in zip(found, ("dh", "dw"), strict=True)]

    budget = int(tokens * 1.7 * w.vocab * 4)
    ours = errors(tiedkl.fused_tied_loss(h, weight, y, alpha=w.alpha, impl="cpp", workspace_bytes=budget))
    for error, others in zip(ours, errors(eager(w, kl=True)(h, weight, y)), strict=True):
        assert error <= 1.1 * others


def test_wide_products_of_any_stride() -> None:
    p = problem(33, 257, 260, EVERYTHING, torch.float32)
    p.h.div_(16)
    assert p.t is not None
    layouts = (
        (p.w.T.contiguous().T, p.t.T.contiguous().T),
        (torch.stack((p.w, p.w), -1)[..., 0], p.t),
        (p.w[:1].expand(p.w.shape), p.t[:, :1].expand(p.t.shape)),
        (torch.cat((p.w, p.w), 1)[:, : p.w.shape[1]], p.t),
    )
    for w, t in layouts:
        strided = Problem(p.h.T.contiguous().T, w, p.y, p.b, t, p.options)
        for blocks in (BLOCKS[0], (20, 9, 130, 70)):
            check(strided, Needs(True, True, True, True), blocks, 1e-4)


def test_blocks_share_their_rows_among_tokens_and_targets() -> None:
    p = problem(40, 50, 6, OPTIONS["target_grad"], torch.float64, extras=False)
    for y in (torch.arange(40), torch.full((40,), 7), torch.arange(40) // 9):
        for rows in (2, 3, 17, 41, 80):
            check(Problem(p.h, p.w, y, None, None, p.options), Needs(True, True), (rows - 1, 1, 50, 50), 1e-9)


def test_a_small_kl_keeps_its_digits_where_logits_are_large() -> None:
    g = torch.Generator().manual_seed(6)
    w, y = torch.randn(300, 48, generator=g) * 0.8, torch.randint(300, (64,), generator=g)
    h = w[y] + 0.01 * torch.randn(64, 48, generator=g)
    p = Problem(h, w, y, None, None, Options(10.0, 1.0))
    want = reference.forward(p.to(torch.float64)).kl
    [terms, *_] = walk(p, None, Needs(), BLOCKS[0])
    assert terms is not None
    s, z = p.w[y] @ p.w.T, p.h @ p.w.T  # float32 products, exact from there on: off by 5e-5
    log_q, log_r = (torch.log_softmax(x.double() / 10, -1) for x in (s, z))
    rounded = (log_q.exp() * (log_q - log_r)).sum(-1)
    assert float(((rounded - want) / want).abs().max()) > 2e-5
    assert float(((terms[1].double() - want) / want).abs().max()) < 1e-5


def test_bf16_weights_of_any_stride() -> None:
    p = problem(13, 31, 8, EVERYTHING, torch.bfloat16)
    assert p.t is not None
    layouts = (
        (p.w.T.contiguous().T, p.t.T.contiguous().T),
        (torch.stack((p.w, p.w), -1)[..., 0], p.t),
        (p.w, torch.stack((p.t, p.t), -1)[..., 0]),
    )
    for w, t in layouts:
        strided = Problem(p.h.T.contiguous().T, w, p.y, p.b, t, p.options)
        check(strided, Needs(True, True, True, True), BLOCKS[2], 3e-5, GRADIENT[torch.bfloat16])


def test_rows_longer_than_a_chunk() -> None:
    n, v, d = SHAPES[-1]
    for options in OPTIONS.values():
        for blocks in (BLOCKS[0], (3, 2, 2049, 700)):
            check(problem(n, v, d, options, torch.float32), Needs(True, True, True, True), blocks, 3e-5)


def test_every_subset_of_gradients() -> None:
    p = problem(13, 31, 7, EVERYTHING, torch.float64)
    for wanted in itertools.product((False, True), repeat=4):
        for blocks in (BLOCKS[0], BLOCKS[2]):
            check(p, Needs(*wanted), blocks, 1e-10)


def test_no_token_and_no_valid_token() -> None:
    for n in (0, 4):
        p = problem(n, 9, 3, EVERYTHING, torch.float32)
        p.y.fill_(-1)
        for blocks in (BLOCKS[0], BLOCKS[2]):
            for x in walk(p, torch.zeros(n), Needs(True, True, True, True), blocks):
                assert x is not None
                assert float(x.abs().sum()) == 0


def test_strides() -> None:
    p = problem(13, 31, 8, EVERYTHING, torch.float32)
    needs = Needs(True, True, True, True)
    g = torch.where(p.y >= 0, 1.0, 0.0)
    want = walk(p, g, needs, BLOCKS[2])
    assert p.b is not None
    assert p.t is not None
    strided = Problem(
        p.h.T.contiguous().T,
        torch.stack((p.w, p.w), -1)[..., 0],
        p.y,
        torch.stack((p.b, p.b), -1)[:, 1],
        p.t.T.contiguous().T,
        p.options,
    )
    assert not any(x.is_contiguous() for x in (strided.h, strided.w, strided.b, strided.t) if x is not None)
    for a, b in zip(want, walk(strided, g, needs, BLOCKS[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_extreme_values_are_survived() -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-40):
        for blocks in (BLOCKS[0], BLOCKS[2]):
            p = problem(6, 40, 4, OPTIONS["target_grad"], torch.float32)
            p.h[2, 1] = value
            p.w[3, 0] = value
            terms, *_ = walk(p, torch.ones(6), Needs(True, True, True, True), blocks)
            assert terms is not None
            assert terms.shape == (5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor([0, 1, 9])}, "outside"),
        ({"y": torch.tensor([0, 1])}, "y must be"),
        ({"y": torch.tensor([0, 1, 2], dtype=torch.int32)}, "y must be"),
        ({"w": torch.ones(9, 5)}, "do not match"),
        ({"b": torch.ones(8)}, "b must be"),
        ({"t": torch.ones(8, 2)}, "t must be"),
        ({"g": torch.ones(2)}, "g must be"),
        ({"g": torch.ones(3).double()}, "g must be"),
        ({"g": None}, "gradients need g"),
        ({"blocks": (0, 1, 1, 1)}, "positive"),
        ({"blocks": (1, 1, -4, 1)}, "positive"),
        ({"blocks": (1, 1, 1, 0)}, "positive"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    values = {"h": torch.randn(3, 4), "w": torch.randn(9, 4), "y": torch.tensor([0, 1, 2]), "b": None, "t": None}
    values |= {"g": torch.ones(3), "blocks": (2, 2, 4, 4)} | change
    g, blocks = values.pop("g"), values.pop("blocks")
    with pytest.raises(ValueError, match=message):
        walk(Problem(**values, options=Options()), g, Needs(True, True), blocks)


def test_build_info() -> None:
    info = _C.build_info()
    assert info["capability"] in ("DEFAULT", "AVX2", "AVX512")
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["bf16_products"] in (False, info["capability"] == "AVX512")
    assert info["f32_products"] in (False, info["capability"] == "AVX512")
    assert info["f32_columns"] in (32, 256)


CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]


def lowered(capability: str, run: str) -> str:
    """What a process prints that has the choice lowered to `capability` and runs `run` with the extension as `c`."""
    env = {**os.environ, "TIEDKL_CPU_CAPABILITY": capability.lower(), "PYTEST_ADDOPTS": ""}
    code = f"import sys, pytest, tiedkl._C as c\nprint('capability', c.build_info()['capability'])\n{run}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    """This file again with the choice lowered; what the processor lacks falls back to what it has."""
    if os.environ.get("TIEDKL_CPU_CAPABILITY"):
        pytest.skip("already lowered")
    best = _C.build_info()["capability"]
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        assert lowered(capability, "") == f"capability {best}\n"  # with which the other tests run
        return
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", __file__]
    assert f"capability {capability}\n" in lowered(capability, f"sys.exit(pytest.main({arguments!r}))")
