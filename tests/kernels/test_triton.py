"""The Triton kernels in the interpreter, with tiles so small that small problems cross every border.

tests/test_backends.py and tests/test_ops.py hold the backend to what every other one is held to.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiedkl
from tiedkl import backends, ops, reference
from tiedkl.ops import plan_for
from tiedkl.plan import TOKEN_BLOCKS, VOCAB_BLOCKS
from tiedkl.problem import Needs, Options, Problem
from tiedkl.testing import random_problem as problem

pytest.importorskip("triton")
CPU = torch.device("cpu")
backend = backends.load("triton")
if backend.unsupported(CPU, torch.float32):
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from tiedkl.kernels import config, exponential, launch, products, scale, stats, tile  # noqa: E402

OPTIONS = {
    "default": Options(2.0, 5.0),
    "plain": Options(alpha=0.0),
    "everything": Options(3.0, 2.0, 0.1, 0.01, 4.0, True),
    "target_grad": Options(1.5, 2.0, target_grad=True),
}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "INTERPRETER", config.alike(config.Tile(16, 32, 16, 1, 1)))


def run(p: Problem, needs: Needs, token_block: int, vocab_block: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """Terms and gradients in blocks of the given size, whole rows being token blocks; a forward call's are the same."""
    strategy = TOKEN_BLOCKS if vocab_block >= len(p.w) else VOCAB_BLOCKS
    plan = replace(
        plan_for(p, "triton", None, True), strategy=strategy, token_block=token_block, vocab_block=vocab_block
    )
    g = torch.where(p.y >= 0, torch.linspace(0.5, 2.0, len(p.y)), 0.0)
    terms, grads = backend.backward(p, plan, g, needs)
    for a, b in zip(terms, backend.forward(p, plan), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    want_terms, want = reference.backward(p.to(torch.float64), g.double(), needs)
    for got, right in zip(terms, want_terms, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    for got, right in zip(grads, want, strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            rtol = GRADIENT[p.h.dtype]
            torch.testing.assert_close(
                got.double(), right, rtol=rtol, atol=rtol * float(1 + right.abs().amax() if right.numel() else 1)
            )
    return list(terms), list(grads)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_of_any_size(name: str, extras: bool) -> None:
    needs = Needs(True, True, extras, extras)
    run(problem(37, 70, 19, OPTIONS[name], torch.float32, extras), needs, 37, 69)
    run(problem(19, 41, 5, OPTIONS[name], torch.float32, extras), needs, 7, 33)
    run(problem(21, 45, 19, OPTIONS[name], torch.float32, extras), needs, 12, 45)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    for token_block, vocab_block in ((21, 32), (12, 45)):
        run(problem(21, 45, 32, OPTIONS[name], dtype, True), Needs(True, True, True, True), token_block, vocab_block)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=str)
def test_d_w_of_all_tokens_at_once_is_rounded_where_the_range_allows(dtype: torch.dtype, kept: torch.dtype) -> None:
    for name, token_block, vocab_block, right in (
        ("default", 21, 32, kept),
        ("default", 12, 32, torch.float32),  # a sum over blocks
        ("default", 21, 45, torch.float32),
        ("target_grad", 21, 32, torch.float32),  # the plan has no room for it; nobody wants that of the other matrix
    ):
        p = problem(21, 45, 32, OPTIONS[name], dtype, name == "target_grad")
        _, (d_h, d_w, *_) = run(p, Needs(True, True), token_block, vocab_block)
        assert d_h is not None
        assert d_w is not None
        assert (d_h.dtype, d_w.dtype) == (torch.float32, right), (name, token_block, vocab_block)


def test_every_subset_of_gradients() -> None:
    p = problem(5, 11, 3, OPTIONS["everything"], torch.float32, True)
    for wanted in itertools.product((False, True), repeat=4):
        run(p, Needs(*wanted), 5, 11)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 16), (17, 1, 2), (16, 32, 16)], ids=str)
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    p = problem(*shape, OPTIONS["target_grad"], torch.float32, False)
    run(p, Needs(True, True), *shape[:2])


def test_no_token_and_no_valid_token() -> None:
    for n in (0, 18):
        p = problem(n, 9, 3, OPTIONS["everything"], torch.float32, True)
        p.y.fill_(-1)
        terms, grads = run(p, Needs(True, True, True, True), max(n, 1), 9)
        assert not any(float(x.abs().sum()) for x in (*terms, *grads) if x is not None)


def test_no_token_within_less_than_a_row_of_workspace() -> None:
    p = problem(0, 40, 8, OPTIONS["default"], torch.float32, False)
    plan = plan_for(p, "triton", 256, True)
    assert plan.vocab_block < 40
    terms, grads = backend.backward(p, plan, torch.zeros(0), Needs(True, True))
    assert terms.ce.shape == (0,)
    assert grads.w is not None
    assert not grads.w.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_skipped_token_has_no_gradient_whatever_the_similarities(dtype: torch.dtype) -> None:
    """What it reads of another's similarities is beyond the range of the exponential function."""
    g = torch.Generator().manual_seed(0)
    w, h = torch.randn(128, 16, generator=g) * 0.1, torch.randn(16, 16, generator=g) * 0.1
    w[3] = w[100] = 0.0
    w[3, 0], w[100, 0] = 8.0, 88.7 / 8
    y = torch.full((16,), 3)
    y[5] = -1
    _, (d_h, *_) = run(
        Problem(h.to(dtype), w.to(dtype), y, None, None, Options(temperature=1.0, alpha=1.0)), Needs(True, True), 16, 64
    )
    assert d_h is not None
    assert not d_h[5].any()


def test_strides_of_any_kind() -> None:
    p = problem(13, 31, 8, OPTIONS["everything"], torch.float32, True)
    assert p.b is not None
    assert p.t is not None
    strided = Problem(
        p.h.T.contiguous().T, torch.stack((p.w, p.w), -1)[..., 0], p.y, torch.stack((p.b, p.b), -1)[:, 1],
        torch.cat((p.t, p.t), 1)[:, : p.t.shape[1]], p.options,
    )  # fmt: skip
    needs = Needs(True, True, True, True)
    for a, b in zip(run(p, needs, 13, 31)[1], run(strided, needs, 13, 31)[1], strict=True):
        torch.testing.assert_close(a, b)


def test_reruns_give_the_same_bits() -> None:
    p = problem(21, 45, 19, OPTIONS["everything"], torch.bfloat16, True)
    runs = [run(p, Needs(True, True, True, True), 12, 32) for _ in range(2)]
    for a, b in zip(*([*terms, *grads] for terms, grads in runs), strict=True):
        assert torch.equal(a, b)


def test_a_nan_is_not_hidden() -> None:
    p = problem(20, 40, 8, OPTIONS["everything"], torch.float32, True)
    p.h[3, 2] = torch.nan
    p.y.clamp_(min=0)
    plan = plan_for(p, "triton", None, True)
    terms, grads = backend.backward(p, plan, torch.ones(20), Needs(True, True, True, True))
    for term in (terms.ce, terms.kl, terms.lse):
        assert term.isnan().nonzero().flatten().tolist() == [3]
    assert grads.h is not None
    assert grads.h[3].isnan().all()


@pytest.mark.parametrize("n", [1, 40])
def test_distinct_targets(n: int) -> None:
    y = torch.randint(-1, 7, (n,), generator=torch.Generator().manual_seed(n))
    found = launch.distinct(y, 9)
    ids = y[y >= 0].unique()
    assert int(found.count) == len(ids)
    assert found.capacity == min(n, 9)
    assert torch.equal(found.ids[: len(ids)], ids)
    assert torch.equal(found.ids[found.which][y >= 0], y[y >= 0])
    assert int(found.which.min()) >= 0


@triton.jit
def _elementwise(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    value, excess = exponential.expm1(v)
    tl.store(out + i, exponential.exp(v), mask=i < n)
    tl.store(out + n + i, value, mask=i < n)
    tl.store(out + 2 * n + i, excess, mask=i < n)
    tl.store(out + 3 * n + i, tile.tanh(v), mask=i < n)


@triton.jit
def _near_zero(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, exponential.excess_near_zero(v), mask=i < n)


def test_the_divergence_of_near_probabilities_is_accurate() -> None:
    """(e^x - 1 - x) / x^2, as far as it is used."""
    near = torch.linspace(-exponential.NEAR.value, exponential.NEAR.value, 2001, dtype=torch.float64)
    out = torch.empty(len(near))
    _near_zero[(1,)](near.float(), out, len(near), BLOCK=2048)
    series = sum(near ** (k - 2) / torch.lgamma(torch.tensor(k + 1.0, dtype=torch.float64)).exp() for k in range(2, 20))
    assert float((out.double() / series - 1).abs().max()) < 2.4e-7 + 3 * 2**-24


def test_exponentials_are_accurate() -> None:
    near = torch.logspace(-7, 0, 500)
    x = torch.cat((torch.linspace(-80, 80, 3001), near, -near, torch.tensor([0.0, 9.5, -9.5, 20.0])))
    out = torch.empty(4, len(x))
    _elementwise[(1,)](x, out, len(x), BLOCK=4096)
    d = x.double()
    series = sum(d**k / torch.lgamma(torch.tensor(k + 1.0, dtype=torch.float64)).exp() for k in range(2, 18))
    excess = torch.where(d.abs() < 0.5, series, torch.expm1(d) - d)
    for got, want, ulps in zip(out.double(), (d.exp(), d.expm1(), excess, d.tanh()), (1.5, 2.5, 6, 4), strict=True):
        error = ((got - want) / torch.where(want == 0, 1.0, want)).abs().max()
        assert float(error) <= ulps * 2**-24 * 2, float(error) / 2**-24
    assert out[:, x == 0].flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert out[3, x.abs() > 10].abs().eq(1).all()


def test_float32_products_follow_either_way_of_asking_for_tf32() -> None:
    """In a process of its own: torch refuses to answer the old question once the new setting was used."""
    code = (
        "import torch\n"
        "from tiedkl.kernels.launch import launch\n"
        "def precision(dtype): return launch(torch.empty(2, 4, dtype=dtype), 'gradient').constants['PRECISION']\n"
        "seen = [precision(torch.float32)]\n"
        "torch.backends.cuda.matmul.{setting}\n"
        "print(*seen, precision(torch.float32), precision(torch.bfloat16))\n"
    )
    for setting in ("allow_tf32 = True", "fp32_precision = 'tf32'"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(setting=setting)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["ieee", "tf32", "ieee"], setting


def test_weights_of_any_size_keep_their_digits_in_float16() -> None:
    """Entries of G are some 1/V: a token of little weight among others must not lose them."""
    p = problem(6, 3000, 16, Options(4.0, 8.0), torch.float16, False)
    p.y.clamp_(min=0)
    g = torch.tensor([1e-3, 1.0, 1.0, 1e-3, 1.0, 1e-2])
    plan = plan_for(p, "triton", None, True)
    d_h = backend.backward(p, plan, g, Needs(h=True, w=True))[1].h
    right = reference.backward(p.to(torch.float64), g.double(), Needs(h=True, w=True))[1].h
    assert d_h is not None
    assert right is not None
    error = (d_h.double() - right).norm(dim=1) / right.norm(dim=1)
    assert float(error.max()) < 2**-11, error.tolist()


def test_the_target_gradient_of_a_frequent_word_fits_into_float16() -> None:
    """Two hundred tokens have one target; what they add up to before the products is beyond 65,504."""
    random = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*size, generator=random).half() for size in ((256, 16), (40, 16)))
    y = torch.randint(40, (256,), generator=random)
    y[:200] = 0
    p = Problem(h, w / 2, y, None, None, Options(2.0, 8.0, target_grad=True))
    g = torch.full((256,), 1 / 256)
    _, got = backend.backward(p, plan_for(p, "triton", None, True), g, Needs(h=True, w=True))
    _, want = reference.backward(p.to(torch.float64), g.double(), Needs(h=True, w=True))
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.double(), b, rtol=2**-9, atol=2**-10 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.3, -7.0, 0.0, torch.nan, torch.inf])
def test_scaling_is_that_of_pytorch(factor: float, dtype: torch.dtype) -> None:
    x = torch.randn(scale.BLOCK * 20 + 3, generator=torch.Generator().manual_seed(0)).to(dtype)  # some programs loop
    by = torch.tensor([factor])
    want = (x.float() * by).to(dtype)
    assert scale.scale_(x, by) is x
    # the interpreter does not round to the nearest number of bfloat16, as a GPU does
    torch.testing.assert_close(x, want, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_large_saved_gradient_is_scaled_by_the_kernel(upstream: float, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(37, 70, 19, OPTIONS["default"], torch.float32, False)
    w = p.w.requires_grad_()
    wanted = torch.autograd.grad(tiedkl.fused_tied_loss(p.h, w, p.y, impl="triton", ignore_index=-1) * upstream, w)[0]
    calls: list[torch.Size] = []
    monkeypatch.setattr(ops, "scaled_by_kernel", lambda d: d.numel() > 0)
    monkeypatch.setattr(scale, "scale_", lambda x, by, plain=scale.scale_: calls.append(x.shape) or plain(x, by))
    got = torch.autograd.grad(tiedkl.fused_tied_loss(p.h, w, p.y, impl="triton", ignore_index=-1) * upstream, w)[0]
    assert calls == [w.shape]
    assert torch.equal(got, wanted)


@triton.jit
def _sums(x, out, n):
    total, lost = 0.0, 0.0
    plain = 0.0
    for i in range(n):
        v = tl.load(x + i)
        total, lost = stats.add(total, lost, v)
        plain += v
    tl.store(out, total + lost)
    tl.store(out + 1, plain)


def test_sums_keep_what_roundings_lose() -> None:
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0)) + 0.5
    out = torch.empty(2)
    _sums[(1,)](x, out, len(x))
    ulp = 2.0**-12  # of a number of 3,000
    error = (out.double() - x.double().sum()).abs() / ulp
    assert float(error[0]) <= 0.5
    assert float(error[1]) > 2, "a plain sum would have passed"


@triton.jit
def _visits(out, rows, cols):
    r, c = tile.tile_of(tl.program_id(0), rows, cols)
    place = out + r * cols + c
    tl.store(place, tl.load(place) + 1)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (12, 3), (25, 4), (40, 1)])
def test_every_tile_is_visited_once(rows: int, cols: int) -> None:
    out = torch.zeros(rows, cols, dtype=torch.int32)
    _visits[(rows * cols,)](out, rows, cols)
    assert out.eq(1).all()


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize("row_tiles", [1, 8, 15, 64, 200, 1000])
@pytest.mark.parametrize("vocab", [1, 129, 32_000, 256_000])
def test_splits_cover_the_vocabulary_and_the_multiprocessors(
    row_tiles: int, vocab: int, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    shape = config.Tile(128, 128, 64, 8, 4, resident)
    n, share = launch.splits(row_tiles, vocab, shape, CPU)
    assert (n - 1) * share * 128 < vocab <= n * share * 128
    if vocab == 256_000:
        programs, places = row_tiles * n, 132 * resident
        least = 0.85 if resident == 1 else 0.75  # 200 row tiles on 264 places: five splits would fill them better
        assert programs / (-(-programs // places) * places) > least, (n, share)


def test_thousands_of_like_terms_do_not_add_up_in_one_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU adds the terms of a float32 product to its accumulator one after the other; the interpreter does not."""
    from triton.runtime import interpreter

    def chain(builder, a, b, d, precision, imprecise):
        total = d.data
        for k in range(a.data.shape[1]):  # a fused multiply-add each
            total = (a.data[:, k : k + 1].astype(float) * b.data[k : k + 1] + total).astype("float32")
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", chain)
    x, y = torch.full((16, 3000), 0.1), torch.full((3000, 48), 0.3)
    out, right = torch.zeros(16, 48), x.double() @ y.double()
    products.add_counted_product(out, x, y, torch.tensor(3000), inner=True)
    assert float((out - right).abs().max()) < 2e-6 * float(right[0, 0])
    plain = torch.zeros(())
    for _ in range(3000):
        plain += 0.1 * 0.3
    assert float((plain - right[0, 0]).abs()) > 8e-6 * float(right[0, 0])  # what a chain gives
