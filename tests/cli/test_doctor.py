"""`tiedkl doctor` reports a broken installation without breaking, and the dispatcher's exit statuses."""

from __future__ import annotations

import argparse
import builtins
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable

import pytest
import torch

import tiedkl
from tiedkl import backends, cli
from tiedkl.cli import doctor


@pytest.fixture
def broken_extension(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an extension in place of the real one: a module, or the exception that its import raises."""

    def put(stand_in: object, replaced: str = "tiedkl._C") -> None:
        real_find, real_import = importlib.util.find_spec, doctor.importlib.import_module

        def find_spec(name: str, package: str | None = None) -> object:
            if name != replaced:
                return real_find(name, package)
            return stand_in and importlib.machinery.ModuleSpec(name, None, origin="somewhere/_C.so")

        def import_module(name: str, package: str | None = None) -> types.ModuleType:
            if name != replaced:
                return real_import(name, package)
            if isinstance(stand_in, Exception):
                raise stand_in
            return stand_in  # type: ignore[return-value]

        monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(doctor.importlib, "import_module", import_module)

    return put


def extension_built_for(version: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(build_info=lambda: {"torch": version, "compiler": "12.2", "capability": "AVX2"})


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert tiedkl.__version__ in text
    assert torch.__version__ in text
    assert "broken" not in text
    for name in backends.BACKENDS:
        assert f"cpu  {name}" in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert set(report["backends"]["cpu"]) == set(backends.BACKENDS)
    assert report["backends"]["cpu"]["reference"]["float32"] is None


def test_extension_absent(broken_extension: Callable[[object], None]) -> None:
    broken_extension(None)
    report = doctor.collect()
    assert report["extension"]["path"] is None
    assert "pip install --no-build-isolation" in report["extension"]["problem"]
    assert "tiedkl._C is not built" in doctor.render(report)


def test_extension_built_for_another_torch(broken_extension: Callable[[object], None]) -> None:
    broken_extension(extension_built_for("1.0.0+cpu"))
    assert "built for torch 1.0.0+cpu" in doctor.collect()["extension"]["problem"]
    broken_extension(extension_built_for(torch.__version__))
    assert doctor.collect()["extension"]["problem"] is None


def test_extension_cannot_be_loaded(broken_extension: Callable[[object], None]) -> None:
    broken_extension(ImportError("undefined symbol: _ZN2at4mm_outE"))
    report = doctor.collect()
    assert "undefined symbol" in report["extension"]["problem"]
    assert "undefined symbol" in doctor.render(report)


def test_cuda_extension(broken_extension: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, for another torch, for other devices, as it should be."""
    broken_extension(None, "tiedkl._C_cuda")
    text = doctor.render(doctor.collect())
    assert "tiedkl._C_cuda is not built" in text
    assert ("is a build without CUDA" in text) == (torch.version.cuda is None)

    def built(version: str) -> types.SimpleNamespace:
        info = {"torch": version, "compiler": "12.2", "nvcc": "13.0", "architectures": "sm_80 sm_90"}
        return types.SimpleNamespace(build_info=lambda: info)

    broken_extension(built("1.0.0"), "tiedkl._C_cuda")
    assert "built for torch 1.0.0" in doctor.collect()["cuda_ext"]["problem"]
    broken_extension(built(torch.__version__), "tiedkl._C_cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "device 0 has capability 12.0" in doctor._cuda_extension()["problem"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert doctor._cuda_extension()["problem"] is None
    assert "nvcc 13.0, for sm_80 sm_90" in "".join(doctor._render_cuda_extension(doctor._cuda_extension()))


def test_backend_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for what runs, one for each reason why something does not; a failing import is a reason."""

    def load(name: str) -> types.SimpleNamespace:
        if name == "gone":
            raise ImportError("no such file")
        half = (torch.bfloat16, torch.float16)
        return types.SimpleNamespace(unsupported=lambda device, dtype: "no half precision" if dtype in half else None)

    monkeypatch.setattr(backends, "BACKENDS", ("some", "gone"))
    monkeypatch.setattr(backends, "load", load)
    text = doctor.render(doctor.collect())
    assert "cpu  some       yes  float32 float64\n" in text
    assert "cpu  some       no   bfloat16 float16: no half precision\n" in text
    assert "cpu  gone       no   ImportError: no such file" in text


def test_broken_torch_is_the_only_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends, "load", lambda name: 1 / 0)
    monkeypatch.setattr(doctor, "_triton", lambda: 1 / 0)
    assert doctor.run(argparse.Namespace(json=False)) == 0
    assert "triton     broken: ZeroDivisionError" in capsys.readouterr().out

    monkeypatch.setattr(torch, "ones", lambda *_: 1 / 0)
    assert doctor.run(argparse.Namespace(json=False)) == 1


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(_: argparse.Namespace) -> int:
        raise error

    return run


def test_dispatcher_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130


def test_dispatcher_broken_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert cli.main(["doctor"]) == 141


def test_dispatcher_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def without_jinja2(name: str, *args: object, **kwargs: object) -> types.ModuleType:
        if name.split(".")[0] == "jinja2":
            raise ModuleNotFoundError("No module named 'jinja2'", name=name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        def run(_: argparse.Namespace) -> int:
            import jinja2  # noqa: F401

            return 0

        subparsers.add_parser("compare").set_defaults(func=run)

    monkeypatch.setitem(sys.modules, "tiedkl.cli.compare", types.SimpleNamespace(add_parser=add_parser))
    monkeypatch.setattr(builtins, "__import__", without_jinja2)
    assert cli.main(["compare"]) == 1
    assert "pip install 'tiedkl[compare]'" in capsys.readouterr().err


def test_dispatcher_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["no-such-command"])
    assert error.value.code == 2
    assert "doctor" in capsys.readouterr().err
