"""`tiedkl bench` from the command line's side: what it prints, writes, refuses and returns."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiedkl import backends
from tiedkl.bench import measure, peers, shapes
from tiedkl.bench.candidates import Candidate
from tiedkl.cli import main

TOY = ["bench", "--shapes", "40,300,24", "--impl", "torch", "--no-compile", "--rounds", "2"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of its own, and of the peers only one that is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "peers", lambda w: {"abacus CE": Candidate(None, False, "abacus is not installed")})
    monkeypatch.setattr(sys, "argv", ["tiedkl", *TOY])
    return tmp_path


def kept(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "tiedkl-bench.json").read_text())
    assert isinstance(found, dict)
    return found


def test_without_arguments(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    head = shapes.Head("a toy", 200, 16, 30)
    monkeypatch.setitem(shapes.HEADS, "toy", head)
    monkeypatch.setattr(shapes, "DEFAULT", {"cpu": ("toy",), "cuda": ("toy",)})
    monkeypatch.setattr(measure, "COMPILE_SECONDS", 1e9)  # no time for that in a test
    assert main(["bench", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Results are kept in tiedkl-bench.json as they come: Ctrl-C loses nothing")
    for text in ("Output layer of a toy: 30 tokens", "eager CE+KL", "tiedkl torch", "help texts", "GEMM", "medians"):
        assert text in out, text
    assert "torch.compile CE+KL; torch.compile CE: no time was left" in out
    assert "abacus CE: abacus is not installed" in out
    report = kept(here)
    assert report["finished"]
    assert report["stamp"]["command"].startswith("tiedkl bench")
    assert [(r["N"], r["dtype"], r["mode"]) for r in report["results"]] == [(30, "float32", "fwd+bwd")]


def test_every_option(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    (here / "corpus.txt").write_text("one two three two one " * 20)
    options = [
        *TOY, "--dtype", "float32", "--dtype", "bfloat16", "--device", "cpu", "--mode", "fwd", "--loss", "ce",
        "--targets", "corpus.txt", "--ignored", "0.3", "--sweep", "N=10,20,40", "--json", "o.json", "--csv", "o.csv",
        "--plot", "plots", "--html", "o.html", "--budget-seconds", "100", "--threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    assert main(options) == 0
    report = json.loads((here / "o.json").read_text())
    found = [(r["N"], r["dtype"], r["loss"], r["mode"], r["ignored"]) for r in report["results"]]
    assert found == [(n, t, "ce", "fwd", 0.3) for t in ("float32", "bfloat16") for n in (10, 20, 40)]
    assert all(r["targets"] == "from corpus.txt" for r in report["results"])
    lines = list(csv.DictReader((here / "o.csv").open()))
    assert len(lines) == sum(len(r["rows"]) for r in report["results"])
    assert {line["status"] for line in lines} == {"ok", "absent"}
    eager = next(line for line in lines if line["name"] == "eager CE")
    assert float(eager["error_vs_eager_loss"]) == 1
    assert eager["error_dw"] == "", "there is no gradient in forward"
    assert any("time-N" in file.name for file in (here / "plots").iterdir())
    assert "tiedkl torch CE" in (here / "o.html").read_text()
    assert not (here / "tiedkl-bench.json").exists()
    assert "wrote o.json, o.csv, plots" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--shapes", "bert"], "--shapes bert: expected N,V,D or NAME"),
        (["--sweep", "W"], "--sweep W"),
        (["--targets", "missing.txt"], "--targets missing.txt"),
        (["--ignored", "1"], "--ignored 1: expected a share in [0, 1)"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--margin", "-1"], "--margin -1"),
        (["--device", "tpu"], "--device tpu: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds"),
        (["--json", "no/file.json"], "--json no/file.json: no such directory"),
        (["--csv", "."], "--csv .: is a directory"),
        (["--against", "missing.json"], "missing.json"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_is_refused_before_any_work(
    here: Path, wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TOY, *wrong]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("tiedkl bench: ")
    assert named in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not list(here.glob("*.json"))


@pytest.mark.parametrize("wrong", [["--dtype", "int8"], ["--impl", "abacus"], ["--mode", "sideways"], ["--loss", "l2"]])
def test_what_the_parser_refuses(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*TOY, *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_named_backend_that_cannot_run_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends.load("torch"), "unsupported", lambda device, dtype: "it is a holiday")
    assert main(TOY) == 2
    assert "--impl torch cannot run: it is a holiday" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "missing"), [("--html", "jinja2"), ("--plot", "matplotlib"), ("", "")])
def test_the_table_needs_no_extra(
    here: Path, option: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("jinja2", "matplotlib", "tqdm"):
        if name == missing or not missing:
            monkeypatch.setitem(sys.modules, name, None)
    arguments = [*TOY, option, "there"] if option else TOY
    assert main(arguments) == (1 if option else 0)
    if option:
        err = capsys.readouterr().err
        assert f"tiedkl bench needs {missing}, which is not installed: pip install 'tiedkl[bench]'" in err
        assert not list(here.glob("*.json")), "noticed before the measurement"


def test_ctrl_c_keeps_what_was_measured(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, rounds = measure.once, 0

    def once(*args: Any) -> float:
        nonlocal rounds
        rounds += 1
        if rounds == 6:  # product, tiedkl, eager twice; then the second round's product, and tiedkl
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(measure, "once", once)
    assert main([*TOY, "--csv", "o.csv"]) == 130
    out, err = capsys.readouterr()
    assert "what was measured is kept" in err
    assert "eager CE+KL" in out
    report = kept(here)
    assert report["interrupted"]
    rows = report["results"][0]["rows"]
    assert [rows[n]["samples"] for n in ("tiedkl torch", "eager CE+KL", "eager CE")] == [1, 1, 1]
    assert (here / "o.csv").exists()


def test_a_wrong_result_is_an_error(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = backends.load("torch")
    honest = backend.backward

    def backward(problem, plan, g, needs):
        terms, d = honest(problem, plan, g, needs)
        return terms, d._replace(w=d.w * 1.01)

    monkeypatch.setattr(backend, "backward", backward)
    assert main(TOY) == 1
    out, err = capsys.readouterr()
    assert "tiedkl torch at N=40 V=300 D=24 float32 wrong" in err
    assert "dw 0.01" in err
    assert "tiedkl torch: wrong" in out


def test_against_an_older_result(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TOY) == 0
    older = kept(here)
    row = older["results"][0]["rows"]["tiedkl torch"]
    (here / "same.json").write_text(json.dumps(older))
    row["gemm_units"] /= 1e6
    (here / "faster.json").write_text(json.dumps(older))
    assert main([*TOY, "--against", "same.json", "--margin", "1e6"]) == 0
    assert "0 of 1 rows are slower" in capsys.readouterr().out
    assert main([*TOY, "--against", "faster.json"]) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_inputs_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shapes", "1,1000000,20000000", "30,200,16", *TOY[3:]]) == 0
    report = kept(here)
    assert report["too_large"] == ["N=1 V=1000000 D=20000000 float32"]
    assert [r["N"] for r in report["results"]] == [30]
    assert "alone do not fit the memory" in capsys.readouterr().out


def test_no_time_for_the_second_shape(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shapes", "40,300,24", "30,200,16", *TOY[3:], "--budget-seconds", "0.0001"]
    assert main(arguments) == 0
    report = kept(here)
    assert not report["finished"]
    assert report["left_out"]
    assert f"no time was left for {report['left_out'][-1]}" in capsys.readouterr().out
