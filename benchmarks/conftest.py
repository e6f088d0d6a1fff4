"""pytest-benchmark suites of every backend and kernel: `pytest benchmarks`; `pytest` alone collects tests/ only.

    pytest benchmarks                                   toy size, a few seconds: each still runs, and is right
    pytest benchmarks --size full --benchmark-json=b.json
    pytest benchmarks --size full --benchmark-autosave  and, later, --benchmark-compare

Each checks its result before it is timed. Slow-downs are flagged in units of a matrix product of the same run by
`benchmarks/bench_cpu.py --against`, since absolute times of two runs say little on a shared machine.
"""

from __future__ import annotations

import pytest

SIZES = {"toy": (48, 500, 32), "full": (2048, 32000, 512)}  # N, V, D


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=tuple(SIZES), default="toy", help="of the benchmarks in this folder")


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return SIZES[request.config.getoption("--size")]
