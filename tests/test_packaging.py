"""What is installed, under which names, and that the optional parts are optional."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=cwd)


def test_imports_without_optional_parts(tmp_path: Path) -> None:
    """No triton, no extension, no numpy, no plotting: the import works and the loss still has a backend."""
    code = """
import sys
for name in ("triton", "tiedkl._C", "tiedkl._C_cuda", "tqdm", "matplotlib", "jinja2"):
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
import torch, tiedkl
h, w, y = torch.randn(6, 4), torch.randn(10, 4), torch.arange(6)
assert torch.isfinite(tiedkl.fused_tied_loss(h, w, y))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_import_leaves_optional_parts_alone(tmp_path: Path) -> None:
    code = """
import sys, tiedkl
loaded = {"matplotlib", "jinja2", "tiedkl.compare", "tiedkl.cli"} & set(sys.modules)
assert not loaded, loaded
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_kernels_only_as_tiedkl_kernels(tmp_path: Path) -> None:
    done = python("import kernels", ROOT)  # -c puts the working directory on sys.path
    assert done.returncode == 1
    assert "must be imported as 'tiedkl.kernels', not as 'kernels'" in done.stderr
    done = python("import tiedkl.kernels; print(tiedkl.kernels.__name__)", tmp_path)
    assert done.stdout.strip() == "tiedkl.kernels", done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout and finds nothing there."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("tiedkl", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


PIP = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v")


def test_wheel_contents(sources: Path, tmp_path: Path) -> None:
    nothing = {"TIEDKL_BUILD_CPU": "0", "TIEDKL_BUILD_CUDA": "0", "TIEDKL_FORCE_BUILD": "0"}
    built = run(*PIP, "-w", str(tmp_path), ".", cwd=sources, **nothing)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "tiedkl._C is NOT built: TIEDKL_BUILD_CPU=0" in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("tiedkl-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = wheel.name.rsplit("-", 3)[0] + ".dist-info"
    expected = {f"tiedkl/{p.relative_to(ROOT / 'tiedkl')}" for p in (ROOT / "tiedkl").rglob("*.py")}
    expected |= {f"tiedkl/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    pages = [p for kind in ("*.j2", "*.css") for p in (ROOT / "tiedkl").rglob(kind)]
    expected |= {f"tiedkl/{p.relative_to(ROOT / 'tiedkl')}" for p in pages}
    expected |= {"tiedkl/py.typed", f"{info}/licenses/LICENSE"}
    assert expected <= names, expected - names
    assert {name.split("/")[0] for name in names} == {"tiedkl", info}
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h"))]


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("TIEDKL_BUILD_CPU", "0", "TIEDKL_BUILD_CPU=0"), ("CXX", "no-such-compiler", "no-such-compiler")],
)
def test_force_makes_a_missing_extension_an_error(
    sources: Path, tmp_path: Path, variable: str, value: str, reason: str
) -> None:
    env = {variable: value, "TIEDKL_FORCE_BUILD": "1"}
    built = run(sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), cwd=sources, **env)
    assert built.returncode != 0
    assert "TIEDKL_FORCE_BUILD=1, but the C++ extension tiedkl._C is not built" in built.stderr
    assert reason in built.stdout + built.stderr


def test_a_failing_compiler_leaves_a_pure_python_install(sources: Path, tmp_path: Path) -> None:
    env = {"CXX": "no-such-compiler", "TIEDKL_FORCE_BUILD": "0", "TIEDKL_BUILD_CPU": "1"}
    built = run(sys.executable, "setup.py", "build", "-b", str(tmp_path), cwd=sources, **env)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "tiedkl._C is NOT built" in built.stderr
    assert "pip install --no-build-isolation" in built.stderr
    assert not list(tmp_path.rglob("*.so"))


FAKE_NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--list-gpu-code) printf 'sm_80\\nsm_90\\n' ;;
*) echo "asked to compile: $*" >&2; exit 3 ;;
esac
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> dict[str, str]:
    """Environment of a build that wants CUDA, with an nvcc that compiles nothing."""
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(FAKE_NVCC)
    compiler.chmod(0o755)
    return {
        "CUDA_HOME": str(tmp_path / "toolkit"), "TORCH_CUDA_ARCH_LIST": "", "TIEDKL_BUILD_CUDA": "1",
        "TIEDKL_BUILD_CPU": "0", "TIEDKL_FORCE_CUDA": "0", "TIEDKL_FORCE_BUILD": "0",
    }  # fmt: skip


def build_extensions(sources: Path, out: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "-b", str(out), cwd=sources, **env)


def test_a_failing_nvcc_leaves_the_other_extension(sources: Path, tmp_path: Path, fake_nvcc: dict[str, str]) -> None:
    library = tmp_path / "lib" / "tiedkl"
    library.mkdir(parents=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("_C", "_C_cuda"):
        (library / f"{name}{suffix}").touch()
    built = build_extensions(sources, tmp_path / "lib", fake_nvcc)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "tiedkl._C_cuda is NOT built: CalledProcessError" in built.stderr
    assert [path.name for path in library.iterdir()] == [f"_C{suffix}"]
    assert (
        "arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90"
        in (built.stderr)
    )


def test_architectures_can_be_chosen(sources: Path, tmp_path: Path, fake_nvcc: dict[str, str]) -> None:
    built = build_extensions(sources, tmp_path, {**fake_nvcc, "TORCH_CUDA_ARCH_LIST": "9.0a;10.0+PTX"})
    assert (
        "arch=compute_90a,code=sm_90a -gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_100," in built.stderr
    )
    built = build_extensions(sources, tmp_path, {**fake_nvcc, "TORCH_CUDA_ARCH_LIST": "Hopper"})
    assert "'Hopper' is not like 9.0" in built.stderr
    assert built.returncode == 0


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({}, "CalledProcessError"),
        ({"TIEDKL_BUILD_CUDA": "0"}, "TIEDKL_BUILD_CUDA=0"),
        ({"CUDA_HOME": "/nowhere"}, "nvcc is neither in CUDA_HOME nor on PATH"),
    ],
    ids=["failure", "unwanted", "no nvcc"],
)
def test_force_makes_a_missing_cuda_extension_an_error(
    sources: Path, tmp_path: Path, fake_nvcc: dict[str, str], env: dict[str, str], reason: str
) -> None:
    built = build_extensions(sources, tmp_path, {**fake_nvcc, **env, "TIEDKL_FORCE_CUDA": "1"})
    assert built.returncode != 0
    assert "TIEDKL_FORCE_CUDA=1, but the CUDA extension tiedkl._C_cuda is not built" in built.stderr
    assert reason in built.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a build with CUDA")
def test_without_cuda_in_torch_nothing_is_said(sources: Path, tmp_path: Path, fake_nvcc: dict[str, str]) -> None:
    built = build_extensions(sources, tmp_path, {**fake_nvcc, "TIEDKL_BUILD_CUDA": ""})
    assert built.returncode == 0, built.stderr
    assert "_C_cuda" not in built.stdout + built.stderr


@pytest.mark.parametrize("command", [(sys.executable, "-m", "tiedkl"), ("tiedkl",)], ids=["module", "script"])
def test_command_line_help(command: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which(command[0]) is None:
        command = (str(Path(sys.executable).with_name(command[0])),)
    done = run(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout
