"""Which strategy, which block sizes, how much scratch: arithmetic on shapes and a budget, no tensors.

The walk covers the (N, V) rectangle in blocks of C tokens by B vocabulary rows (docs/design.md, "Strategies").

    token_blocks   B = V: a block's logits are computed once and become their own gradient: 3 + rho GEMMs
    vocab_blocks   B < V: one pass for the statistics, a second that computes the logits again: 4 + 2 rho GEMMs

rho = (distinct targets) / N is unknown here; a similarity block of Cw rows goes with every logits block of C rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

MIB = 1 << 20
DEFAULT_WORKSPACE = 64 * MIB
WELL_FILLED = 0.8  # of a device's time
TOKEN_BLOCKS, VOCAB_BLOCKS = "token_blocks", "vocab_blocks"


@dataclass(frozen=True)
class Shape:
    """What a plan depends on. Sizes are element counts; `acc_bytes` is 4, or 8 for float64."""

    tokens: int  # N
    vocab: int  # V
    width: int  # D
    teacher_width: int  # D'
    kl: bool = True
    grad: bool = True
    target_grad: bool = False
    weight_grad: bool = True  # of the gradients, that of the matrix is wanted
    acc_bytes: int = 4
    half: bool = False  # inputs narrower than the accumulation dtype
    threads: int = 1

    @property
    def through_target(self) -> bool:
        """Whether a gradient flows through the similarity target."""
        return self.kl and self.grad and self.target_grad


def busy(programs: int, places: int) -> float:
    """Share of the time of a device with so many places that programs of equal length use."""
    return programs / (-(-programs // places) * places)


class Programs(NamedTuple):
    """Rows and columns of logits of one program, and how many programs a device runs at a time."""

    rows: int
    cols: int
    places: int

    def busy(self, rows: int, columns: int) -> float:
        """Share of the device's time that a block of logits uses."""
        return busy(-(-rows // self.rows) * -(-columns // self.cols), self.places)

    def filling(self, rows: int, columns: int) -> int:
        """Columns of a block of so many rows, at most `columns`, that idle least.

        They are over three quarters of `columns`, or over half of them where none of those fills the device well.
        """
        most = -(-columns // self.cols)
        for least in (most * 3 // 4, most // 2):
            widths = [min(columns, n * self.cols) for n in range(most, least, -1)]
            best = max(widths, key=lambda width: self.busy(rows, width))
            if self.busy(rows, best) >= WELL_FILLED:
                break
        return best


@dataclass(frozen=True)
class Tuning:
    """What a backend's row arithmetic needs and likes; data, one per backend."""

    z_buffers: float  # blocks of C x B alive at once, in units of the accumulation dtype
    s_buffers: int  # blocks of Cw x B alive at once
    row_buffers: int  # rows of B per thread
    token_block: int  # C of token_blocks beyond which larger ones gain nothing; 0: vocab_blocks only
    min_token_block: int  # C below which vocab_blocks is cheaper
    min_vocab_block: int  # B below which GEMMs are inefficient
    panel: int  # vocabulary rows per GEMM
    widened: int = 2  # panels of half-precision weights held in the accumulation dtype
    kept_buffers: float = 0  # blocks of C x V more in token_blocks
    delta_buffers: float = 0  # blocks of C x B more with target_grad
    targets_per_token: float = 0.5  # Cw / C
    shared_rows: bool = False  # tokens and targets of a block share C + Cw rows in any proportion
    block_bytes: int = 1 << 62  # logits blocks beyond this leave the cache
    row_copies: bool = True  # rows of h and of the similarity source are gathered in the accumulation dtype
    target_copies: float = 0  # without that: the similarity source's are, in units of the accumulation dtype
    all_targets: bool = False  # similarities are computed as if every token had a target of its own
    all_target_grads: bool = False  # the target gradient's products are taken likewise
    # B from which one block of all tokens is preferred where it fills the device, since d_w is then complete at once.
    # 0: never
    whole_block: int = 0
    programs: Programs | None = None  # what B of vocab_blocks is to fill
    token_multiple: int = 1  # C likewise, where there are several blocks of tokens
    vocab_multiple: int = 1  # B in whole multiples of this, where it is that large: alignment


@dataclass(frozen=True)
class Plan:
    """How one evaluation runs. Sizes are element counts, memory is in bytes."""

    impl: str
    strategy: str
    token_block: int  # C
    target_block: int  # Cw
    vocab_block: int  # B
    panel: int
    scratch_bytes: int  # peak beyond inputs, O(N) vectors and gradients
    workspace_bytes: int  # the budget
    gemms: str
    skipped: dict[str, str] = field(default_factory=dict)  # other backend -> why it was passed over

    def __str__(self) -> str:
        lines = [
            f"impl       {self.impl}",
            f"strategy   {self.strategy}: {self.gemms} GEMMs of N x V x D",
            f"blocks     {self.token_block} tokens x {self.vocab_block} vocabulary rows, {self.target_block} targets",
            f"scratch    {self.scratch_bytes / MIB:.1f} MiB of {self.workspace_bytes / MIB:.1f} MiB",
        ]
        return "\n".join(lines + [f"not {name:<10} {why}" for name, why in self.skipped.items()])


def scratch_bytes(shape: Shape, tuning: Tuning, tokens: int, targets: int, vocab: int) -> int:
    """Bytes of scratch for blocks of `tokens` x `vocab` with `targets` similarity rows."""
    kl, target_grad = shape.kl, shape.through_target
    columns = tuning.z_buffers * tokens
    if tuning.token_block and vocab >= shape.vocab:
        columns += tuning.kept_buffers * tokens
    if target_grad:
        columns += tuning.delta_buffers * tokens
    if kl:
        columns += tuning.s_buffers * targets + tuning.row_buffers * shape.threads * (3 if target_grad else 1)
    if kl and tuning.shared_rows:
        tokens, targets = tokens + targets, (tokens + targets) // 2  # the most there can be of either
    rows = tokens * shape.width * (2 if shape.grad else 1) if tuning.row_copies else 0  # gathered h, and its gradient
    if kl and (tuning.row_copies or target_grad):
        rows += targets * shape.teacher_width * (2 if target_grad else 1)
    elif kl:
        rows += math.ceil(targets * shape.teacher_width * tuning.target_copies)
    if tuning.whole_block and _rounds_w(shape) and tokens >= shape.tokens and vocab < shape.vocab:
        rows += vocab * shape.width  # a block of d_w before it is rounded
    if shape.half:
        rows += tuning.widened * min(tuning.panel, vocab) * max(shape.width, shape.teacher_width)
    return shape.acc_bytes * (math.ceil(columns * vocab) + rows)


def _rounds_w(shape: Shape) -> bool:
    """Whether blocks of all tokens complete d_w, which may then be rounded block by block."""
    return shape.grad and shape.weight_grad and not shape.through_target


def _targets(tuning: Tuning, tokens: int) -> int:
    return max(1, int(tokens * tuning.targets_per_token))


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [1, limit] for which the monotone `fits(n)` holds, or 1."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gemms(shape: Shape, strategy: str, tuning: Tuning) -> str:
    """Matrix products in units of N x V x D, rho the share of distinct targets."""
    target_grad = shape.through_target
    walks = 1  # of the logits and the similarities
    if strategy == VOCAB_BLOCKS:
        walks += (1 if shape.grad else 0) + (1 if shape.kl and (target_grad or not shape.grad) else 0)
    units, rho = walks + (2 if shape.grad else 0), 0
    for products, all_rows in (
        (walks if shape.kl else 0, tuning.all_targets),
        (2 if target_grad else 0, tuning.all_target_grads),
    ):
        units, rho = (units + products, rho) if all_rows else (units, rho + products)
    return f"{units} + {rho if rho > 1 else ''}{' ' if rho > 1 else ''}rho" if rho else f"{units}"


def make_plan(impl: str, shape: Shape, tuning: Tuning, workspace_bytes: int | None = None) -> Plan:
    """The cheapest strategy whose scratch fits `workspace_bytes` (default 64 MiB), or the smallest blocks there are."""
    budget = DEFAULT_WORKSPACE if workspace_bytes is None else workspace_bytes
    n, v = max(shape.tokens, 1), max(shape.vocab, 1)

    def fits(tokens: int, vocab: int) -> bool:
        return scratch_bytes(shape, tuning, tokens, _targets(tuning, tokens), vocab) <= budget

    def even(tokens: int) -> int:
        """As many blocks as before, of equal size, or one more where multiples ask for it."""
        size, m = -(-n // -(-n // tokens)), tuning.token_multiple
        if size >= n or tokens < m:
            return size
        return min(-(-size // m), tokens // m) * m

    cap = min(n, tuning.token_block, max(tuning.min_token_block, tuning.block_bytes // (shape.acc_bytes * v)))
    tokens = _largest(cap, lambda c: fits(c, v)) if tuning.token_block else 0
    if tokens >= min(n, tuning.min_token_block) and fits(tokens, v):
        vocab = v
        if not tuning.shared_rows:  # or the walk evens its blocks out, knowing how many targets are distinct
            tokens = even(tokens)
    else:  # Strict: as many tokens as a useful number of columns allows, then as many columns as still fit.
        columns = min(v, tuning.min_vocab_block)
        # Fewer than all columns where there are token blocks: the choice above is monotone in the budget, and stands.
        limit, programs = max(1, v - 1) if tuning.token_block else v, tuning.programs

        def width(tokens: int) -> int:
            found = _largest(limit, lambda b: fits(tokens, b))
            if tuning.vocab_multiple < found < v:
                found -= found % tuning.vocab_multiple
            return programs.filling(tokens, found) if programs and found < v else found

        whole = min(v, tuning.whole_block)
        one_block = whole and _rounds_w(shape) and fits(n, whole)
        if one_block and programs:
            found = width(n)
            one_block = found >= whole and programs.busy(n, found) >= WELL_FILLED
        tokens = n if one_block else even(_largest(n, lambda c: fits(c, columns)))
        vocab = width(tokens)
    strategy = TOKEN_BLOCKS if vocab >= v and tuning.token_block else VOCAB_BLOCKS
    targets = _targets(tuning, tokens)
    if tuning.shared_rows and tokens == n and vocab == v:  # one block for all, were every target another
        targets = max(targets, _largest(n, lambda u: scratch_bytes(shape, tuning, n, u, v) <= budget))
    return Plan(
        impl=impl,
        strategy=strategy,
        token_block=tokens,
        target_block=targets,
        vocab_block=vocab,
        panel=min(tuning.panel, vocab),
        scratch_bytes=scratch_bytes(shape, tuning, tokens, targets, vocab),
        workspace_bytes=budget,
        gemms=_gemms(shape, strategy, tuning),
    )
