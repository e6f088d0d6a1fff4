"""`tiedkl tune-kernels`: what it refuses, and a run in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tiedkl import cli
from tiedkl.backends import triton as backend
from tiedkl.cli import tune_kernels

needs_triton = pytest.mark.skipif(backend.MISSING is not None, reason=str(backend.MISSING))
SMALL = ["--device", "cpu", "--tokens", "24", "--vocab", "150", "--width", "20", "--repeats", "1"]


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune-kernels"]) == 2
    assert "the Triton kernels cannot run on cuda: " in capsys.readouterr().err


@needs_triton
def test_a_cpu_is_refused_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["tune-kernels", *SMALL]) == 2
    assert "it runs on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--width", "0"],
        ["--dtype", "float64"],
        *(["--tile", t] for t in ("64x64", "48x64x32x4x2", "64x32x32x4x2", "a")),
    ],
    ids=" ".join,
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["tune-kernels", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("element_size", [2, 4])
def test_candidates_fit(element_size: int) -> None:
    tiles = tune_kernels.candidates(element_size)
    assert len(tiles) == len(set(tiles)) > 20
    for tile in tiles:
        rows, cols, depth, warps, stages, resident = tile
        assert resident * stages * (rows + cols) * depth * element_size <= tune_kernels.SHARED_BYTES
        assert rows * cols <= tune_kernels.ACCUMULATORS * 32 * warps
        assert rows * cols * resident <= tune_kernels.ACCUMULATORS * 256
        assert tune_kernels._tile("x".join(map(str, tile))) == tile
    assert ((128, 128, 64, 8, 4, 1) in tiles) == ((128, 128, 64, 8, 3, 2) in tiles) == (element_size == 2)
    assert tune_kernels._tile("128x64x32x4x3") == (128, 64, 32, 4, 3, 1)


@needs_triton
def test_the_best_tiles_become_a_row_of_the_table() -> None:
    done = interpreted("-m", "tiedkl", "tune-kernels", *SMALL, "--tile", "16x64x16x4x1", "--tile", "32x128x32x4x2")
    assert done.returncode == 0, done.stderr
    for which in tune_kernels.PASSES:
        assert len(re.findall(rf"^{which} .* ms", done.stdout, re.M)) == 2, done.stdout
    *_, row = done.stdout.strip().splitlines()
    tile = r"Tile\((16, 64, 16, 4, 1, 1|32, 128, 32, 4, 2, 1)\)"
    assert re.fullmatch(
        rf'\("interpreter", 2\): Row\({tile}, {tile}, {tile}, "interpreter", "\d{{4}}-\d\d-\d\d"\),', row
    ), row
    from tiedkl.kernels.config import Row, Tile

    [(key, value)] = eval("{" + row + "}", {"Row": Row, "Tile": Tile}).items()
    assert key == ("interpreter", 2)
    assert isinstance(value.gradient, Tile)


SKIPS = """
import torch
from tiedkl.cli.tune_kernels import KERNELS, Tuner, _Recorder
from tiedkl.kernels import config

tuner = Tuner(24, 150, 20, torch.float32, torch.device("cpu"))
tile, table = (16, 64, 16, 4, 1), dict(config.TILES)
for which in KERNELS:
    right = getattr(tuner, which)()
    assert isinstance(tuner.measure(which, tile, right, 1), float)
    said = tuner.measure(which, tile, right + 1, 1)
    assert said.startswith("gives other results, off by 1"), said
    said = tuner.measure(which, tile, right * torch.nan, 1)
    assert said.startswith("gives other results"), said

    module, name = tuner.modules[KERNELS[which][-1][0]], KERNELS[which][-1][1]
    kernel = getattr(module, name)
    setattr(module, name, None)
    said = tuner.measure(which, tile, right, 1)
    assert said.startswith("TypeError: "), said
    assert getattr(module, name) is None  # put back
    setattr(module, name, kernel)

    honest, _Recorder.spills = _Recorder.spills, property(lambda self: 8)
    assert tuner.measure(which, tile, right, 1) == f"spills {8 * len(KERNELS[which])} registers"
    _Recorder.spills = honest
assert config.TILES == table
"""


@needs_triton
def test_a_tile_that_fails_spills_or_is_wrong_is_skipped() -> None:
    done = interpreted("-c", SKIPS)
    assert done.returncode == 0, done.stderr
