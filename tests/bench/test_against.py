"""A slow-down is found in matrix products of its own run, and only tiedkl's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiedkl.bench.against import compare
from tiedkl.bench.errors import BenchError
from tiedkl.bench.store import read_json, write_csv, write_json


def report(units: float, seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    row = {"status": "ok", "kl": True, "note": "", "errors": {}, "seconds": seconds, "gemm_units": units}
    peer = row | {"gemm_units": 100 * units}
    result = {"N": 8, "V": 9, "D": 4, "dtype": "float32", "rows": {"tiedkl cpp": row, "eager CE": peer}}
    return {"results": [result | changes]}


@pytest.mark.parametrize(("units", "slower"), [(4.0, False), (4.5, False), (4.7, True), (1.0, False)])
def test_a_slow_down_is_one_beyond_the_margin(units: float, slower: bool) -> None:
    text, found = compare(report(4.0), report(units, seconds=50.0), 0.15)
    assert found == slower
    assert ("SLOWER" in text) == slower
    assert "eager CE" not in text
    assert f"{units / 4 - 1:+.1%}" in text


def test_another_machine_at_half_the_speed_is_no_slow_down() -> None:
    assert not compare(report(4.0, seconds=1.0), report(4.0, seconds=2.0))[1]


def test_only_the_same_workload_is_compared() -> None:
    for changes in ({"N": 16}, {"dtype": "bfloat16"}, {"mode": "fwd"}, {"ignored": 0.3}, {"temperature": 5.0}):
        text, failed = compare(report(4.0), report(4.0, **changes))
        assert failed, "a comparison of nothing must not pass"
        assert "Nothing to compare" in text
    assert not compare(report(4.0), report(4.0, mode="fwd+bwd", temperature=20.0))[1]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_json(file, report(float("nan")))
    assert read_json(file)["results"][0]["rows"]["tiedkl cpp"]["gemm_units"] is None
    write_csv(tmp_path / "r.csv", report(4.0))
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3
    file.write_text('{"results": [{"N": 1}]}')
    for wrong in (file, tmp_path / "missing.json", tmp_path):
        with pytest.raises(BenchError, match=str(wrong)):
            read_json(wrong)
    with pytest.raises(BenchError, match="cannot be written"):
        write_json(tmp_path / "no" / "r.json", {})
