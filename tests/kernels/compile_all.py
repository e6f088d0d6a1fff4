"""Compiles every kernel in every configuration of kernels/config.py, on all processors; one JSON line each.

python tests/kernels/compile_all.py sm_80 sm_90 sm_100
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import triton
from tiedkl.kernels import config, grads, launch, lstm, products, scale, stats
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INPUTS = {"h", "w", "t", "x", "left", "right", "bias", "grad"}  # in the input dtype; but h where it is products
OUT_INPUTS = {"target_gradient_kernel"}  # whose `out` is, too
INTEGERS = {"y", "ids", "row_ids", "count", "which", "order", "start"}
DOUBLES = {"targets", "zys", "selves"}
OUT_DOUBLES = {"finish_targets_kernel", "target_dots_kernel"}
FLOATS = {"inv_t", "softcap", "alpha", "smoothing", "z_loss"}
SIZES = {"n", "N", "V", "D", "capacity", "v0", "M", "K", "share", "n_splits", "width", "H"}
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma")
NARROW_STORE = re.compile(r"st\.global\.b(?:16|32) ")  # one element, not a vector of them


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """`kernel` for 16-byte aligned pointers, and strides and D that are multiples of 16."""
    signature, constexprs, attributes = {}, {}, {}
    name = kernel.__name__
    for i, argument in enumerate(kernel.arg_names):
        aligned = False
        if argument in constants:
            signature[argument], constexprs[(i,)] = "constexpr", constants[argument]
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif argument in SIZES or argument.startswith("stride"):
            signature[argument] = "i32"
            aligned = argument in ("n", "D", "V", "width") or argument.startswith("stride")
        else:
            inputs = argument in INPUTS or (argument == "out" and name in OUT_INPUTS)
            inputs &= argument != "h" or not constants["STORED"]
            inputs &= argument not in ("left", "out") or dtype != "fp16"  # T, which float16 does not hold
            doubles = argument in DOUBLES or (argument == "out" and name in OUT_DOUBLES)
            element = dtype if inputs else "i64" if argument in INTEGERS else "fp64" if doubles else "fp32"
            signature[argument], aligned = f"*{element}", True
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def options(names: str, *chosen: str) -> list[dict[str, bool]]:
    """Constants by name, those of each choice true."""
    return [{name: name in some.split() for name in names.split()} for some in chosen]


# Those with most to do first, then the usual ones. All of them in bfloat16 for sm_90; ELSEWHERE of them for the other
# architectures, whose products and tiles differ but not what is done to an element; two in float32. Where D is no
# multiple of the tile's depth, for tf32 and for float16, which differs from bfloat16 in conversions alone, the first.
ELSEWHERE = 4
TOKEN_OPTIONS = options(
    "HAS_BIAS SOFTCAP SMOOTHING KL", "HAS_BIAS SOFTCAP SMOOTHING KL", "KL", "", "HAS_BIAS", "SOFTCAP KL", "SMOOTHING KL"
)
GRADIENT_OPTIONS = options(
    "HAS_BIAS SOFTCAP KL SUM_KL WRITE TARGET", "HAS_BIAS SOFTCAP KL WRITE TARGET", "HAS_BIAS SOFTCAP KL SUM_KL WRITE",
    "KL SUM_KL WRITE", "WRITE", "HAS_BIAS SOFTCAP WRITE", "HAS_BIAS SOFTCAP KL SUM_KL", "KL WRITE TARGET",
)  # fmt: skip


def others() -> Iterator[tuple[Any, str, config.Tile | None, dict[str, Any]]]:
    """Kernels without products of their own, in the dtypes that matter to them."""

    def size_of(tile: config.Tile) -> dict[str, Any]:
        return {
            "BLOCK_N": tile.rows, "BLOCK_V": tile.cols, "BLOCK_D": tile.depth, "EVEN_D": True, "PRECISION": "ieee",
            "STORED": True,
        }  # fmt: skip

    for element_size in config.STORED:
        tile = config.STORED[element_size].statistics
        size = size_of(tile) | {"FAST": element_size == 2}
        yield stats.target_stats_kernel, "fp32", tile, size
        for some in TOKEN_OPTIONS[:3]:
            yield stats.token_stats_kernel, "fp32", tile, {**size, **some}
    for dtype in ("bf16", "fp16", "fp32"):
        tile = config.STORED[4 if dtype == "fp32" else 2].gradient
        for some in GRADIENT_OPTIONS[: 1 if dtype == "fp16" else 4]:
            yield grads.gradient_kernel, dtype, tile, {**size_of(tile), **some}
        yield scale.scale_kernel, dtype, None, {"BLOCK": scale.BLOCK}
        yield grads.target_gradient_kernel, dtype, None, {"BLOCK_V": grads.ROW_COLUMNS, "TOKENS": grads.ROW_TOKENS}
        for some in options("HAS_ROWS HAS_BIAS SOFTCAP", "HAS_ROWS", "HAS_BIAS SOFTCAP"):
            size_d = {"BLOCK_N": stats.DOT_TILE[0], "BLOCK_D": stats.DOT_TILE[1]}
            yield stats.target_dots_kernel, dtype, None, {**size_d, **some}
    yield stats.finish_targets_kernel, "fp32", None, {"BLOCK_N": config.SMALL_ROWS}
    for kernel in (lstm.lstm_cell_kernel, lstm.lstm_cell_gradient_kernel):
        yield kernel, "fp32", None, {"HAS_MASK": True, "BLOCK": lstm.COLUMNS}
    for some in options("KL SMOOTHING", "KL", "KL SMOOTHING", ""):
        yield stats.finish_tokens_kernel, "fp32", None, {"BLOCK_N": config.SMALL_ROWS, **some}


def configurations(architecture: str) -> Iterator[tuple[Any, str, config.Tile | None, dict[str, Any]]]:
    """Kernel, dtype, tile and constants. Of the options, those that matter together."""
    yield from others()
    in_bf16 = None if architecture == "sm_90" else ELSEWHERE
    if architecture == "sm_80":  # what unknown GPUs get
        tile = config.SAFE.gradient
        product = {
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.cols,
            "BLOCK_D": tile.depth,
            "EVEN_D": False,
            "PRECISION": "ieee",
        }
        yield stats.token_stats_kernel, "bf16", tile, {**product, **TOKEN_OPTIONS[0], "STORED": False}
        # Triton makes constants of sizes that are 1.
        yield products.counted_product_kernel, "fp32", tile, {**product, "INNER": True, "stride_left": 1, "D": 1}
        yield grads.gradient_kernel, "bf16", tile, {**product, **GRADIENT_OPTIONS[0], "STORED": False}
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            row = config.tiles(architecture, size)
            for which, tile in (
                ("statistics", row.statistics), ("gradient", row.gradient), ("similarity", row.similarity)
            ):  # fmt: skip
                for even in (True, False) if dtype != "fp16" and precision == "ieee" else (True,):
                    product = {
                        "BLOCK_N": tile.rows, "BLOCK_V": tile.cols, "BLOCK_D": tile.depth, "EVEN_D": even,
                        "PRECISION": precision,
                    }  # fmt: skip
                    fewest = not even or precision == "tf32" or dtype == "fp16"
                    n_options = 1 if fewest else in_bf16 if dtype == "bf16" else 2
                    if which == "similarity":
                        yield stats.target_stats_kernel, dtype, tile, {**product, "STORED": False}
                        yield grads.similarity_kernel, dtype, tile, product
                    elif which == "statistics":
                        for some in TOKEN_OPTIONS[:n_options]:
                            yield stats.token_stats_kernel, dtype, tile, {**product, **some, "STORED": False}
                    else:
                        for one, inner in (("stride_left", True), ("stride_left_k", False)):
                            exact = {"PRECISION": "tf32"} if dtype == "fp16" else {}
                            some = {**product, **exact, "INNER": inner, one: 1}
                            yield products.counted_product_kernel, dtype, tile, some
                        for some in GRADIENT_OPTIONS[:n_options]:
                            yield grads.gradient_kernel, dtype, tile, {**product, **some, "STORED": False}


def compile_once(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> tuple[Any, int, int]:
    """(compiled kernel, registers, bytes spilled), the last two as ptxas says in the one run that compiling takes."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options=options)
    said = log.getvalue()
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    if not (spills and registers):
        raise RuntimeError(f"ptxas says nothing of registers and spills: {said!r}")
    return compiled, int(registers[1]), int(spills[1]) + int(spills[2])


def compile_at(architecture: str, index: int) -> str:
    """The line of one configuration."""
    kernel, dtype, tile, constants = next(islice(configurations(architecture), index, None))
    if "FAST" in kernel.arg_names:
        constants.setdefault("FAST", dtype != "fp32")
    options = scale.OPTIONS if kernel is scale.scale_kernel else {}
    if tile is not None:
        options = launch.compiler_options(tile, whole=constants.get("SOFTCAP", "INNER" in constants))
    target = GPUTarget("cuda", int(architecture[3:]), 32)
    compiled, registers, spills = compile_once(source(kernel, dtype, constants), target, options)
    return json.dumps({
        "architecture": architecture, "kernel": kernel.__name__, "dtype": dtype, "tile": tile, "constants": constants,
        "registers": registers, "spills": spills, "shared": compiled.metadata.shared,
        "narrow_stores": len(NARROW_STORE.findall(compiled.asm["ptx"])),
        "instructions": [x for x in INSTRUCTIONS if x in compiled.asm["ptx"]],
    })  # fmt: skip


def main() -> None:
    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.disable_line_info = True  # a third of the time; the code is the same
    todo = [(a, i) for a in sys.argv[1:] for i, _ in enumerate(configurations(a))]
    with multiprocessing.get_context("fork").Pool() as pool:  # what is imported is imported once
        for line in pool.starmap(compile_at, todo, chunksize=1):
            print(line)


if __name__ == "__main__":
    main()
