"""csrc/row_math.h and csrc/float_math.h, which CPU and GPU share, against numpy's long double."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
LONG = np.longdouble
if np.finfo(LONG).eps > 1e-18:
    pytest.skip("long double is no wider than double here", allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("row_math") / "row_math.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    done = subprocess.run(
        [*command, f"-I{HERE.parents[1] / 'csrc'}", str(HERE / "row_math.cpp"), "-o", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def excess(x: np.ndarray) -> np.ndarray:
    """expm1(x) - x: a series where the difference would cancel."""
    term = series = x * x / 2
    for k in range(3, 30):
        term = term * x / k
        series = series + term
    return np.where(np.abs(x) < 1, series, np.expm1(x) - x)


def test_exponentials(library: ctypes.CDLL) -> None:
    near = np.logspace(-9, 0, 4000)
    x = np.concatenate((np.linspace(-80, 80, 100_001), near, -near, [0.0, -0.0])).astype(np.float32)
    found = [np.empty_like(x) for _ in range(3)]
    library.exponentials(pointer(x), len(x), *map(pointer, found))
    wide = x.astype(LONG)
    for got, want, ulps in zip(found, (np.exp(wide), np.expm1(wide), excess(wide)), (1.5, 2.5, 6), strict=True):
        normal = np.abs(want) > np.finfo(np.float32).tiny
        error = np.abs(got[normal] - want[normal]) / np.abs(want[normal])
        assert float(error.max()) < ulps * 2.0**-24 * 2
    assert [a[-2:].tolist() for a in found] == [[1, 1], [0, 0], [0, 0]]


def test_a_nan_stays(library: ctypes.CDLL) -> None:
    x = np.array([np.nan], dtype=np.float32)
    found = [np.empty_like(x) for _ in range(3)]
    library.exponentials(pointer(x), 1, *map(pointer, found))
    assert all(np.isnan(a).all() for a in found)


@pytest.mark.parametrize("part", [1, 7, 64, 1000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 5000.0])
@pytest.mark.parametrize("ahead", [None, 0.0, 20.0, 700.0])
def test_a_row(library: ctypes.CDLL, part: int, spread: float, ahead: float | None) -> None:
    """`ahead`: by how much the target's logit exceeds all others."""
    r = np.random.default_rng(part)
    n, y, tau, smoothing, z_loss = 300, 123, 7.0, 0.1, 0.01
    z, s = r.normal(size=n) * spread, r.normal(size=n) * spread
    if ahead is not None:
        z[y] = np.delete(z, y).max() + ahead
    out = np.empty(9)
    library.row(
        pointer(z), pointer(s), n, y, part, *map(ctypes.c_double, (tau, smoothing, z_loss)), pointer(out)
    )  # fmt: skip

    def lse(x: np.ndarray) -> LONG:
        return x.max() + np.log(np.exp(x - x.max()).sum())

    wide, others = z.astype(LONG), np.delete(z, y).astype(LONG)
    l1 = lse(wide)
    below = np.log1p(np.exp(others - wide[y]).sum()) if z[y] >= others.max() else l1 - wide[y]  # l1 - z_y
    prob = np.exp(wide - l1)
    not_y = np.exp(others - l1).sum()
    entropy = -(prob * np.where(prob > 0, wide - l1, 0)).sum()
    ce = (1 - LONG(smoothing)) * below + smoothing * (l1 - wide.mean()) + z_loss * l1**2
    at_y = (smoothing - not_y) + 2 * z_loss * l1 * (1 - not_y) - LONG(smoothing) / n
    want = (ce, entropy, float(z[y] >= others.max()), l1, lse(wide / tau), not_y, at_y, lse(s.astype(LONG) / tau))
    scale = 1 + np.abs(z).max()  # an error of an ulp in z is one of |z| ulp in e^z
    names = ("ce", "entropy", "correct", "lse", "lse_t", "not_y", "at_y", "lse_s")
    for name, got, right in zip(names, out, want, strict=False):
        assert abs(got - right) <= 1e-14 * scale * max(abs(right), 1e-3 if name != "not_y" else 0), name
    assert out[8] == s.argmax()


def test_nothing_is_lost_as_the_target_becomes_certain(library: ctypes.CDLL) -> None:
    """1 - p_y = 2e-31 and a cross-entropy as small: differences of ones and of logits would be zero."""
    z, out = np.array([0.0, 70.0]), np.empty(9)
    library.row(pointer(z), pointer(z), 2, 1, 2, *map(ctypes.c_double, (1.0, 0.0, 0.0)), pointer(out))
    want = float(np.exp(LONG(-70)))
    assert out[0] == pytest.approx(want, rel=1e-14)
    assert out[5] == pytest.approx(want, rel=1e-14)
    assert out[6] == pytest.approx(-want, rel=1e-14)


@pytest.mark.parametrize("q", [1e-300, 1e-9, 0.3])
def test_divergence(library: ctypes.CDLL, q: float) -> None:
    out = np.empty(2)
    for x in (*np.linspace(-300, 300, 61), 1e-9, -1e-9, 0.999, 1.0, 1e-4):
        log_r = float(np.log(LONG(q)) + x)
        if log_r > 0:
            continue
        library.diverge(*map(ctypes.c_double, (q, x, log_r)), pointer(out))
        want = LONG(q) * np.expm1(LONG(x)), LONG(q) * excess(np.array([x], dtype=LONG))[0]
        assert out[1] == pytest.approx(float(want[0]), rel=1e-12)
        assert out[0] == pytest.approx(float(want[1]), rel=1e-6 if abs(x) < 1e-3 else 1e-11)
        assert out[0] >= 0
