"""What a launch needs beyond its tensors: the architecture, tiles, grids, and the device-side list of targets."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tiedkl.plan import Programs, busy

from . import config
from .config import Tile, tiles
from .exponential import INTERPRETED

REGISTERS, MOST_REGISTERS = 1 << 16, 255  # of a multiprocessor, of a thread


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, "interpreter", or "unknown" """
    if INTERPRETED.value:
        return "interpreter"
    if device.type != "cuda" or torch.version.hip:
        return "unknown"
    major, minor = torch.cuda.get_device_capability(device)
    exact = f"sm_{major}{minor}"
    return {"sm_86": "sm_80", "sm_89": "sm_80", "sm_87": "sm_80", "sm_103": "sm_100"}.get(exact, exact)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few for the interpreter, so that the vocabulary is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class Launch(NamedTuple):
    """Tile and grid of a product kernel."""

    tile: Tile
    constants: dict[str, Any]  # constexpr arguments that follow from the tile; shared, not to be changed


def compiler_options(tile: Tile, whole: bool = False) -> dict[str, int]:
    """What Triton is to compile a tile with; `whole`: a kernel that needs more than its share of the registers."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.resident > 1 and not whole:
        share = REGISTERS // (32 * tile.warps * tile.resident)
        options["maxnreg"] = min(MOST_REGISTERS, share // 8 * 8)
    return options


def fast(x: Tensor) -> bool:
    """Whether the exponential unit's precision is enough for inputs of this dtype."""
    return x.element_size() == 2 and not torch.version.hip


def launch(
    x: Tensor, which: Literal["statistics", "gradient", "similarity"], stored: bool = False, whole: bool = False
) -> Launch:
    """For products of x (rows, D) with rows of a matrix of the same width and dtype, or for tiles of stored ones."""
    arch = architecture(x.device)
    size = x.element_size()
    row = config.STORED[size] if stored and arch != "interpreter" else tiles(arch, size)
    tile: Tile = getattr(row, which)
    float32 = x.dtype == torch.float32 and not torch.version.hip
    # allow_tf32 raises once this has been set
    tf32 = float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Launch(tile, _constants(tile, x.shape[1] % tile.depth == 0, "tf32" if tf32 else "ieee", whole))


@functools.cache
def _constants(tile: Tile, even: bool, precision: str, whole: bool) -> dict[str, Any]:
    return {
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.cols,
        "BLOCK_D": tile.depth,
        "EVEN_D": even,
        "PRECISION": precision,
        **compiler_options(tile, whole),
    }


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU, whichever its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` is one for kernels too, and takes ten microseconds."""
    return -(-a // b)


def programs(tile: Tile, device: torch.device) -> Programs:
    """What a block of logits is to fill."""
    return Programs(tile.rows, tile.cols, processors(device) * tile.resident)


@functools.lru_cache(1024)
def splits(row_tiles: int, vocab: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """(splits of the vocabulary, tiles per split): some four programs a multiprocessor, few idle at the end."""
    places = processors(device) * tile.resident
    tiles, wanted = cdiv(vocab, tile.cols), cdiv(max(4 * processors(device), places), row_tiles)
    some = range(max(1, wanted // 2), max(2, wanted * 3 // 2))
    best = max(some, key=lambda n: busy(row_tiles * n, places))
    share = cdiv(tiles, min(best, tiles))
    return cdiv(tiles, share), share


class Targets(NamedTuple):
    """The distinct targets of some tokens. Their number stays on the device: nothing waits for it."""

    ids: Tensor  # (capacity,) int64, `count` of them meant, the rest zero
    count: Tensor  # () int64
    which: Tensor  # (N,) int64 place of each token's target in `ids`; of no meaning for skipped tokens
    capacity: int


def distinct(y: Tensor, vocab: int) -> Targets:
    """The distinct non-negative values of y (N,) int64, in increasing order."""
    capacity = min(len(y), vocab)
    slot = torch.where(y >= 0, y, vocab)
    seen = torch.zeros(vocab + 1, dtype=torch.int32, device=y.device).index_fill_(0, slot, 1)
    rank = seen.cumsum(0)  # int64
    which = (rank[slot] - 1).clamp_(min=0)
    ids = torch.zeros(capacity + 1, dtype=torch.int64, device=y.device)
    ids.scatter_(0, torch.where(y >= 0, which, capacity), y)  # equal targets write equal values
    return Targets(ids[:capacity], rank[vocab - 1], which, capacity)
