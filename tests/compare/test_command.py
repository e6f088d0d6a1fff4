"""`tiedkl compare` as a command: options, exit statuses, one-line errors, Ctrl-C."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tiedkl.cli import compare as command
from tiedkl.compare import Settings, runner
from tiedkl.compare.verdict import limits

TOY = (
    "--hidden=8",
    "--batch=4",
    "--bptt=20",
    "--epochs=2",
    "--variants=baseline,+RE",
    "--impl=reference",
    "--threads=1",
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser()
    command.add_parser(top.add_subparsers())
    return top


def main(*argv: str) -> int:
    args = parser().parse_args(["compare", *argv])
    return int(args.func(args))


def test_every_setting_has_an_option_with_its_default() -> None:
    args = vars(parser().parse_args(["compare"]))
    for field in dataclasses.fields(Settings):
        value = tuple(args["variants"].split(",")) if field.name == "variants" else args[field.name]
        assert value == field.default, field.name


def test_result_on_the_terminal_and_in_files(
    text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY) == 0
    out, err = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["variant", "baseline", "+RE"]
    assert str(tmp_path / "o" / "report.html") in out
    assert "epoch  2/2  valid ppl" in err
    assert json.loads((tmp_path / "o" / "report.json").read_text())["status"] == "complete"
    assert main("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY, "--quiet") == 0
    assert capfd.readouterr().err == ""


def test_an_option_that_no_variant_uses_is_said(
    text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY, "--epochs=1")
    assert main(*common, "--label-smoothing", "0.1", "--gamma=0.5", "--lr=1", "--target-grad") == 0
    notes = sorted(line for line in capfd.readouterr().err.splitlines() if "no effect" in line)
    assert notes == [
        "tiedkl compare: --gamma has no effect on baseline,re; it is of al, real",
        "tiedkl compare: --label-smoothing has no effect on baseline,re; it is of ls, re-ls",
        "tiedkl compare: --target-grad has no effect on baseline,re; it is of al, real",
    ]
    assert main(*common, "--gamma=0.5", "--target-grad", "--variants=baseline,re,real") == 0
    assert "no effect" not in capfd.readouterr().err


def test_a_constant_target_without_a_bias_is_said_beforehand_and_in_the_report() -> None:
    def told(**changes: Any) -> bool:
        settings = Settings(**changes)
        said = list(command.notes((), settings))
        finished: dict[str, Any] = {name: {"seeds_done": [1]} for name in settings.variants}
        in_report = limits(finished, None, dataclasses.asdict(settings))
        assert [text for text in in_report if "--target-grad" in text] == said
        return bool(said)

    assert told(tied_bias=False)
    assert told(tied_bias=False, target_grad=True, overrides={"real": {"target_grad": False}})
    assert not told()
    for fine in (
        {"target_grad": True},
        {"overrides": {"real": {"target_grad": True}}},
        {"gamma": 0.0},
        {"variants": ("baseline", "re")},
        {"model": "transformer"},
    ):
        assert not told(tied_bias=False, **fine)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "{tmp}/absent"], "no such file or directory"),
        (["--data", "{tmp}"], "expected one file *.train.txt, found none"),
        (["--data", "{tmp}/empty"], "the file is empty"),
        (["--data", "{tmp}/binary"], "not UTF-8 text"),
        (["--data", "{tmp}/short"], "too short: its train split has 158 tokens, at least 350 are needed"),
        (["--variants", "baseline,best"], "unknown variant best: expected some of baseline,al,re,real"),
        (["--variants", ","], "unknown variant (none)"),
        (["--variants", "re,re"], "named twice"),
        (["--epochs", "0"], "epochs=0: expected at least 1"),
        (["--dropout", "1"], "dropout=1.0"),
        (["--temperature", "0"], "temperature=0.0"),
        (["--gamma", "nan"], "gamma=nan"),
        (["--vocab-size", "2"], "vocab_size=2"),
        (["--device", "quantum"], "unknown device 'quantum'"),
        (["--device", "cuda:99"], "sees no such GPU"),
        (["--data", "{text}", "--impl", "magic"], "magic"),
        (["--data", "{text}", "--impl", "triton"], "triton"),
        (["--data", "{text}", "--out", "{tmp}/empty"], "cannot write there"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str],
    message: str,
    text_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "short").write_text("only ten words and a full stop are here .\n" * 18)
    argv = [a.format(tmp=folder, text=text_file) for a in argv]
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "o")]
    assert main(*argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("tiedkl compare: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_package_names_the_command(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "NEEDED", ("tqdm", "no_such_package"))
    assert main("--data", str(text_file), "--out", str(tmp_path / "o")) == 2
    assert "no_such_package is not installed: pip install 'tiedkl[compare]'" in capfd.readouterr().err


def test_ctrl_c_leaves_a_report_and_status_130(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = 0

    def step(self: Any, *_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 30:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner.Progress, "step", step)
    before = signal.getsignal(signal.SIGINT)
    argv = ("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY)
    assert main(*argv) == 130
    assert signal.getsignal(signal.SIGINT) is before
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["status"] == "partial"
    assert report["variants"]["baseline"]["epochs_done"] == pytest.approx(30 / 19, abs=0.2)
    out = capfd.readouterr().out
    assert "baseline (stopped in epoch 2 of 2)" in out
    assert "+RE (not started)" in out
    assert "incomplete" in (tmp_path / "o" / "report.html").read_text()
    assert main(*argv) == 0


def test_second_ctrl_c_stops_at_once(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def step(self: Any, *_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner.Progress, "step", step)
    with pytest.raises(KeyboardInterrupt):
        main("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY)
    assert "again to stop at once" in capfd.readouterr().err
