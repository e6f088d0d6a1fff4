"""`tiedkl verify` from the command line's side: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tiedkl import backends, testing
from tiedkl.backends import reference
from tiedkl.cli import main, verify

FEW = ["verify", "--impl", "reference", "--dtype", "float32", "--cases", "12"]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference backend with a gradient that is 0.1% too large."""
    honest = reference.backward

    def backward(problem, plan, g, needs):
        terms, d = honest(problem, plan, g, needs)
        return terms, d._replace(w=None if d.w is None else d.w * 1.001)

    monkeypatch.setattr(backends.load("reference"), "backward", backward)


def test_a_table_and_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FEW) == 0
    out, err = capsys.readouterr()
    for quantity in ("loss", "ce", "kl", "dh", "dw"):
        assert re.search(
            rf"^reference +float32 +{quantity} +\d\.\d+ \+- \d\.\d+ +\d\.\d\d  tiedkl verify --impl", out, re.M
        ), out
    assert "12 of 12 problems" in out
    assert "Every bound holds." in out
    assert err == "", "no progress line where standard error is no terminal"


def test_a_breach_is_named_and_fails(wrong: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FEW) == 1
    out = capsys.readouterr().out
    assert "BREACHES" in out
    assert re.search(r"^0-\d+-float32 \(\w+\) reference dw: (rms|max) error", out, re.M)
    command = re.search(r"^reference +float32 +dw .*  tiedkl (verify .*) BREACH$", out, re.M)
    assert command is not None
    assert main(command[1].split()) == 1, "the printed command reproduces the breach"
    assert "1 of 1 problems" in capsys.readouterr().out


def test_every_measurement_is_written(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main([*FEW, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["breaches"] == []
    assert report["interrupted"] is False
    assert [case["id"] for case in report["cases"]] == [case.id for case in testing.cases(12, 0, ("float32",))]
    assert {"error", "eager", "ulp", "bound_used"} == set(report["cases"][0]["quantities"]["dw"])
    assert {"impl", "dtype", "quantity", "value", "standard_error", "cases"} == set(report["suite"][0])


def test_an_interrupt_keeps_what_was_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = 0

    def judge(*args):
        nonlocal done
        if done == 5:
            raise KeyboardInterrupt
        done += 1
        return testing.judge(*args)

    monkeypatch.setattr(verify, "judge", judge)
    file = tmp_path / "report.json"
    assert main([*FEW, "--json", str(file)]) == 130
    assert "5 of 12 problems" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["interrupted"] is True
    assert len(report["cases"]) == 5


def test_a_backend_that_cannot_run_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends.load("torch"), "unsupported", lambda device, dtype: "it is a holiday")
    arguments = ["verify", "--impl", "torch", "--impl", "reference", "--dtype", "float64", "--cases", "3"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "torch in float64 is left out: it is a holiday" in err
    assert not re.search(r"^torch ", out, re.M)
    assert main(["verify", "--impl", "torch", "--cases", "3"]) == 2


def test_a_missing_directory_is_noticed_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*FEW, "--json", str(tmp_path / "no" / "report.json")]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--cases", "0"], ["--case", "0-1-int8"], ["--impl", "abacus"], ["--dtype", "int8"]], ids=" ".join
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err
