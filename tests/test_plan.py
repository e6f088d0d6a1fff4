"""tiedkl/plan.py: arithmetic only."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiedkl import backends
from tiedkl.backends import cuda, triton
from tiedkl.backends.cpp import NATIVE_BF16
from tiedkl.plan import (
    DEFAULT_WORKSPACE,
    MIB,
    TOKEN_BLOCKS,
    VOCAB_BLOCKS,
    WELL_FILLED,
    Programs,
    Shape,
    Tuning,
    make_plan,
    scratch_bytes,
)

TUNINGS = {name: backends.load(name).TUNING for name in ("cpp", "torch")} | {"cpp bf16": NATIVE_BF16}
shapes = st.builds(
    Shape,
    tokens=st.integers(0, 200_000),
    vocab=st.integers(1, 300_000),
    width=st.integers(1, 8192),
    teacher_width=st.integers(1, 8192),
    kl=st.booleans(),
    grad=st.booleans(),
    target_grad=st.booleans(),
    acc_bytes=st.sampled_from((4, 8)),
    half=st.booleans(),
    threads=st.integers(1, 64),
)
budgets = st.one_of(st.integers(1, 1 << 34), st.none())
names = st.sampled_from(sorted(TUNINGS))


def smallest(shape: Shape, tuning: Tuning) -> int:
    return scratch_bytes(shape, tuning, 1, 1, 1)


@settings(max_examples=400, deadline=None)
@given(shapes, budgets, names)
def test_fits_the_budget_or_is_the_smallest(shape: Shape, budget: int | None, name: str) -> None:
    plan = make_plan(name, shape, TUNINGS[name], budget)
    assert plan.workspace_bytes == (DEFAULT_WORKSPACE if budget is None else budget)
    assert plan.scratch_bytes <= plan.workspace_bytes or plan.token_block == plan.vocab_block == 1
    assert plan.scratch_bytes >= smallest(shape, TUNINGS[name])
    assert plan.scratch_bytes == scratch_bytes(
        shape, TUNINGS[name], plan.token_block, plan.target_block, plan.vocab_block
    )


@settings(max_examples=400, deadline=None)
@given(shapes, budgets, names)
def test_blocks_are_usable(shape: Shape, budget: int | None, name: str) -> None:
    plan = make_plan(name, shape, TUNINGS[name], budget)
    assert 1 <= plan.token_block <= max(shape.tokens, 1)
    assert 1 <= plan.target_block <= plan.token_block
    assert 1 <= plan.vocab_block <= shape.vocab
    assert 1 <= plan.panel <= plan.vocab_block
    assert (plan.strategy == TOKEN_BLOCKS) == (plan.vocab_block == shape.vocab)
    assert plan.strategy in (TOKEN_BLOCKS, VOCAB_BLOCKS)


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(1, 1 << 32), st.integers(1, 1 << 32), names)
def test_a_larger_budget_never_gives_up_token_blocks(shape: Shape, a: int, b: int, name: str) -> None:
    small, large = (make_plan(name, shape, TUNINGS[name], x) for x in sorted((a, b)))
    if small.strategy == TOKEN_BLOCKS:
        assert large.strategy == TOKEN_BLOCKS
        # Blocks are evened out over the tokens afterwards, so compare how many there are.
        assert -(-shape.tokens // large.token_block) <= -(-shape.tokens // small.token_block)


@settings(max_examples=200, deadline=None)
@given(shapes, names, st.integers(1, 512), st.integers(1, 4096))
def test_scratch_grows_with_every_size(shape: Shape, name: str, tokens: int, vocab: int) -> None:
    tuning = TUNINGS[name]
    base = scratch_bytes(shape, tuning, tokens, tokens, vocab)
    assert scratch_bytes(shape, tuning, tokens + 1, tokens, vocab) >= base
    assert scratch_bytes(shape, tuning, tokens, tokens + 1, vocab) >= base
    assert scratch_bytes(shape, tuning, tokens, tokens, vocab + 1) >= base
    assert scratch_bytes(replace(shape, width=shape.width + 1), tuning, tokens, tokens, vocab) >= base


@pytest.mark.parametrize("name", TUNINGS)
def test_scratch_does_not_grow_with_the_tokens(name: str) -> None:
    def plan(tokens: int) -> int:
        return make_plan(name, Shape(tokens, 50257, 768, 768), TUNINGS[name]).scratch_bytes

    # Evening out the blocks may move them by one token, and columns are whole.
    assert plan(1 << 22) <= plan(1 << 15) * 1.01
    assert plan(1 << 22) <= DEFAULT_WORKSPACE


@pytest.mark.parametrize("name", TUNINGS)
def test_a_budget_picks_the_strategy(name: str) -> None:
    shape = Shape(4096, 32000, 512, 512)
    assert make_plan(name, shape, TUNINGS[name], 1 << 30).strategy == TOKEN_BLOCKS
    strict = make_plan(name, shape, TUNINGS[name], 1 * MIB)
    assert strict.strategy == VOCAB_BLOCKS
    assert strict.scratch_bytes <= 1 * MIB


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize("budget", [48 << 10, 1 << 20, 8 << 20])
def test_a_small_budget_keeps_blocks_large_in_half_precision(name: str, budget: int) -> None:
    # The copy of a panel of weights must not eat the budget: it shrinks with the block.
    plan = make_plan(name, Shape(257, 331, 17, 17, half=True), TUNINGS[name], budget)
    assert plan.vocab_block >= 64


@pytest.mark.parametrize(
    ("grad", "kl", "budget", "gemms"),
    [
        (True, True, 1 << 30, "3 + rho"),
        (True, False, 1 << 30, "3"),
        (False, True, 1 << 30, "1 + rho"),
        (False, False, 1 << 30, "1"),
        (True, True, 1 << 20, "4 + 2 rho"),
        (True, False, 1 << 20, "4"),
        (False, True, 1 << 20, "2 + 2 rho"),
        (False, False, 1 << 20, "1"),
    ],
)
def test_matrix_products_are_counted(grad: bool, kl: bool, budget: int, gemms: str) -> None:
    shape = Shape(4096, 32000, 256, 256, kl=kl, grad=grad)
    assert make_plan("cpp", shape, TUNINGS["cpp"], budget).gemms == gemms


FUSED = {"float32": triton.FULL, "bfloat16": triton.HALF}


@settings(max_examples=400, deadline=None)
@given(shapes, budgets, st.sampled_from(sorted(FUSED)))
def test_blocks_of_the_fused_kernels_fit_and_are_whole_tiles(shape: Shape, budget: int | None, dtype: str) -> None:
    plan = make_plan("triton", shape, FUSED[dtype], budget)
    assert plan.scratch_bytes <= plan.workspace_bytes or plan.token_block == plan.vocab_block == 1
    assert plan.vocab_block < 128 or plan.vocab_block % 128 == 0 or plan.vocab_block == shape.vocab


def test_fused_kernels_copy_no_rows() -> None:
    """Nor does their scratch depend on the width. Blocks are about as wide as they are high."""
    plans = [make_plan("triton", Shape(8192, 256_000, d, d, half=True), triton.HALF, 32 * MIB) for d in (768, 4096)]
    assert plans[0] == plans[1]
    assert plans[0].token_block >= 2048
    assert plans[0].token_block % 16 == 0
    assert plans[0].vocab_block >= 1920
    through_targets = Shape(8192, 256_000, 4096, 4096, half=True, target_grad=True)
    assert scratch_bytes(through_targets, triton.HALF, 1, 1, 1) >= 4096 * 4


def test_a_large_budget_keeps_the_logits_of_the_fused_kernels() -> None:
    shape = Shape(8192, 32_001, 768, 768, half=True)
    plan = make_plan("triton", shape, triton.HALF, 1 << 30)
    assert plan.strategy == TOKEN_BLOCKS
    assert plan.gemms == "3 + rho"
    assert plan.token_block >= triton.HALF.min_token_block
    logits, gradients, similarities = 4, 2, 4  # bytes an element
    kept = plan.token_block * 32_001 * (logits + gradients + similarities)
    assert kept <= plan.scratch_bytes <= 1.02 * kept
    assert make_plan("triton", shape, triton.HALF).strategy == VOCAB_BLOCKS


H200 = Programs(128, 128, 2 * 132)


@pytest.mark.parametrize("places", [132, 264])
@pytest.mark.parametrize("rows", [1, 130, 2048, 4096, 8192])
@pytest.mark.parametrize("columns", [1, 128, 1152, 1536, 2688, 5376])
def test_blocks_that_fill_the_device(rows: int, columns: int, places: int) -> None:
    programs = H200._replace(places=places)
    found = programs.filling(rows, columns)
    assert columns / 2 < found <= columns
    wider = [width for width in range(128, columns + 1, 128) if width > max(found, 3 / 4 * columns)]
    assert found > 3 / 4 * columns or max(programs.busy(rows, width) for width in wider) < WELL_FILLED
    assert programs.busy(rows, found) >= programs.busy(rows, columns)
    if places == 264:
        wanted = {(4096, 2688): (2048, 512 / 528), (4096, 1536): (1024, 256 / 264)}
        assert (rows, columns) not in wanted or (found, programs.busy(rows, found)) == wanted[rows, columns]


def test_the_plan_says_how_wide_blocks_are() -> None:
    tuning = replace(triton.BFLOAT16, programs=H200)
    plan = make_plan("triton", Shape(8192, 128_256, 2048, 2048, half=True), tuning)
    assert (plan.token_block, plan.vocab_block) == (8192, 1024)  # 1,152 would fit: 576 programs on 264 places
    assert plan.scratch_bytes == scratch_bytes(Shape(8192, 128_256, 2048, 2048, half=True), tuning, 8192, 8192, 1024)


@pytest.mark.parametrize(
    ("tokens", "width", "one_block"),
    [
        (8192, 2048, True),
        (16_384, 2048, True),
        (17_000, 2048, False),
        (20_000, 2048, False),
        (4096, 4096, True),
        (8192, 4096, True),
        (16_384, 4096, True),
    ],
)
def test_one_block_of_all_tokens_has_to_fill_the_device(tokens: int, width: int, one_block: bool) -> None:
    """512 columns of 17,000 tokens are 532 programs, of which four run while 260 places idle."""
    tuning = replace(triton.BFLOAT16, programs=H200)
    plan = make_plan("triton", Shape(tokens, 128_256, width, width, half=True), tuning)
    assert (plan.token_block == tokens) == one_block
    assert H200.busy(plan.token_block, plan.vocab_block) >= 0.84


def test_without_a_gradient_of_the_matrix_there_is_nothing_to_round() -> None:
    shape = Shape(16_384, 128_256, 2048, 2048, half=True)
    tuning = replace(triton.BFLOAT16, programs=H200)
    whole, frozen = (make_plan("triton", replace(shape, weight_grad=x), tuning) for x in (True, False))
    assert whole.token_block == 16_384
    assert (frozen.token_block, frozen.vocab_block) == (4096, 2048)  # d_h passes through memory less often


CUDA = {"float32": cuda.FULL, "bfloat16": cuda.HALF}


@settings(max_examples=400, deadline=None)
@given(shapes, budgets, st.sampled_from(sorted(CUDA)))
def test_blocks_of_the_cuda_walk_fit(shape: Shape, budget: int | None, dtype: str) -> None:
    plan = make_plan("cuda", shape, CUDA[dtype], budget)
    assert plan.scratch_bytes <= plan.workspace_bytes or plan.token_block == plan.vocab_block == 1
    assert (plan.strategy == TOKEN_BLOCKS) == (plan.vocab_block == shape.vocab)
    assert plan.vocab_block < 128 or plan.vocab_block % 128 == 0 or plan.strategy == TOKEN_BLOCKS or shape.vocab < 256


def test_the_cuda_walk_counts_logits_similarities_and_targets() -> None:
    """Four bytes each, a target for every token; G takes the place of the logits. Only float32 rows are gathered."""
    shape = Shape(8192, 128_256, 2048, 2048, half=True)
    large, strict = (make_plan("cuda", shape, cuda.HALF, budget) for budget in (4 << 30, 32 * MIB))
    assert (large.strategy, large.gemms) == (TOKEN_BLOCKS, "3 + rho")
    assert (strict.strategy, strict.gemms) == (VOCAB_BLOCKS, "4 + 2 rho")
    for plan in (large, strict):
        assert plan.scratch_bytes == plan.token_block * 8 * plan.vocab_block
    assert large.token_block == 4096  # two even blocks
    through_targets = replace(shape, target_grad=True)
    more = scratch_bytes(through_targets, cuda.HALF, 100, 100, 1000) - scratch_bytes(shape, cuda.HALF, 100, 100, 1000)
    assert more >= 100 * (2 * 1000 + 4 * 2048), "T in the input dtype, and d_t of the targets"
    assert make_plan("cuda", replace(shape, kl=False), cuda.HALF, 4 << 30).gemms == "3"
    full = replace(shape, half=False)
    for budget, gemms in ((4 << 30, "4"), (32 * MIB, "6")):
        plan = make_plan("cuda", full, cuda.FULL, budget)
        assert plan.gemms == gemms
        assert plan.scratch_bytes == plan.token_block * (8 * plan.vocab_block + 4 * 2048)


@pytest.mark.parametrize(
    ("dtype", "budget", "gemms"),
    [
        ("bfloat16", 4 << 30, "5 + rho"),
        ("bfloat16", 32 * MIB, "7 + 3 rho"),
        ("float32", 4 << 30, "6"),
        ("float32", 32 * MIB, "10"),
    ],
)
def test_the_cuda_target_gradient_pays_for_every_target(dtype: str, budget: int, gemms: str) -> None:
    shape = Shape(8192, 128_256, 512, 512, half=dtype != "float32", target_grad=True)
    assert make_plan("cuda", shape, CUDA[dtype], budget).gemms == gemms


def test_printed_plan_is_readable() -> None:
    plan = make_plan("cpp", Shape(4096, 32000, 512, 512), TUNINGS["cpp"], 8 * MIB)
    plan.skipped["torch"] = "cpp comes first"
    text = str(plan)
    assert "cpp" in text
    assert plan.strategy in text
    assert "of 8.0 MiB" in text
    assert "cpp comes first" in text
