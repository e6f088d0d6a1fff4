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
    breach = re.search(r"^(0-\d+-float32) \(\w+\) reference dw: (?:rms|max) error.*\n +tiedkl (verify .*)$", out, re.M)
    assert breach is not None
    assert breach[2].endswith(f"--impl reference --case {breach[1]}")
    assert main(breach[2].split()) == 1, "the command under a breach reproduces it"
    capsys.readouterr()
    command = re.search(r"^reference +float32 +dw .*  tiedkl (verify .*) BREACH$", out, re.M)
    assert command is not None
    assert main(command[1].split()) == 1, "the printed command reproduces the breach"
    assert "1 of 1 problems" in capsys.readouterr().out


def test_the_worst_of_all_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FEW) == 0
    out = capsys.readouterr().out
    worst = re.search(
        r"^The worst of all: (\w+) of (\S+) \(\w+\), (\d\.\d\d) of its bound:\n    tiedkl (.*)$", out, re.M
    )
    assert worst is not None
    shares = [float(used) for used in re.findall(r"^reference .* (\d\.\d\d)  tiedkl verify", out, re.M)]
    assert float(worst[3]) == max(shares)
    assert main(worst[4].split()) == 0
    assert f"The worst of all: {worst[1]} of {worst[2]}" in capsys.readouterr().out


def test_a_breach_of_the_suite_names_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "ENOUGH", 1)
    ratio = testing.Ratio(1.5, 0.1, 12)
    monkeypatch.setattr(verify, "suite_ratios", lambda done: {("reference", "float32", "dw"): ratio})
    assert main([*FEW, "--seed", "3"]) == 1
    out = capsys.readouterr().out
    assert "suite reference float32 dw: 1.500 +- 0.100 x eager's RMS" in out
    assert "    tiedkl verify --impl reference --dtype float32 --cases 12 --seed 3\n" in out


def test_every_measurement_is_written(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main([*FEW, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["breaches"] == []
    assert report["interrupted"] is False
    assert [case["id"] for case in report["cases"]] == [case.id for case in testing.cases(12, 0, ("float32",))]
    case = report["cases"][3]
    assert case["command"] == f"tiedkl verify --impl reference --case {case['id']}"
    assert {"torch", "cpu", "git_commit", "threads"} <= set(report["environment"])
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


@pytest.mark.parametrize("device", ["abacus", "cuda:x"])
def test_a_device_that_is_none_is_named(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--device", device]) == 2
    assert f"--device {device}: expected cpu, cuda or cuda:N" in capsys.readouterr().err


def test_infinite_figures_are_null_in_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ratio = testing.Ratio(float("inf"), float("nan"), 12)
    monkeypatch.setattr(verify, "suite_ratios", lambda done: {("reference", "float32", "dw"): ratio})
    file = tmp_path / "report.json"
    assert main([*FEW, "--json", str(file)]) == 0
    assert json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(text))["suite"][0]["value"] is None


@pytest.mark.parametrize(
    "wrong", [["--cases", "0"], ["--case", "0-1-int8"], ["--impl", "abacus"], ["--dtype", "int8"]], ids=" ".join
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err
