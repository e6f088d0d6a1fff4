"""Builds the CUDA extension for the host: its walk as it is, its kernels under cuda_on_host.h, all for CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).parent
NAME = "tiedkl_cuda_on_host"
FORWARD, BACKWARD, SHUFFLED = range(3)  # cuda_on_host::Order
UNITS = {  # source -> flags
    "csrc/cuda/walk.cpp": ["-O1"],
    "csrc/cuda/bindings.cpp": ["-O0"],
    "csrc/cuda/row_kernels.cu": ["-O2", "-x", "c++", "-include", "cuda_on_host.h"],
    "csrc/cuda/similarity.cu": ["-O2", "-x", "c++", "-include", "cuda_on_host.h"],
    "csrc/cuda/target_kernels.cu": ["-O2", "-x", "c++", "-include", "cuda_on_host.h"],
    "tests/cuda/entries.cpp": ["-O1"],
}


def has_fma() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " fma " in cpuinfo.read_text()


def flags() -> list[str]:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    macros = {"TORCH_VERSION": torch.__version__, "NVCC_VERSION": "", "ARCHITECTURES": "host"}
    return [
        "-std=c++20" if version >= (2, 13) else "-std=c++17",
        *("-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(("-mfma", "-ffp-contract=fast") if has_fma() else ()),  # nvcc fuses multiplications and additions, too
        "-U_FORTIFY_SOURCE",  # it takes a longjmp to another fiber's stack for an error
        f"-DTORCH_EXTENSION_NAME={NAME}",
        *(f'-DTIEDKL_{name}="{value}"' for name, value in macros.items()),
        f"-I{HERE}",
        *(f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))),
    ]


def build() -> Path:
    """The library, in a folder named after everything it depends on."""
    sources = sorted([*(ROOT / "csrc").rglob("*.*"), *HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__)])
    told = [str((torch.__version__, sys.version_info, os.environ.get("CXX")))]
    text = "".join([*told, *(str(path) + path.read_text() for path in sources)])
    folder = ROOT / "build" / "cuda-on-host" / hashlib.sha256(text.encode()).hexdigest()[:16]
    library = folder / f"{NAME}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")

    def run(*arguments: str) -> None:
        done = subprocess.run([compiler, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compile_into(source: str) -> str:
        out = str(folder / Path(source).with_suffix(".o").name)
        run(*flags(), *UNITS[source], "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS") or 2)) as pool:
        objects = list(pool.map(compile_into, UNITS))
    lib = Path(torch.__file__).parent / "lib"
    unfinished = library.with_suffix(f".{os.getpid()}")
    run(
        "-shared", *objects, "-o", str(unfinished), f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu",
        "-ltorch_python",
    )  # fmt: skip
    unfinished.replace(library)
    return library


def load() -> ModuleType:
    library = build()
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries = ctypes.CDLL(str(library))
    entries.similarities.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    module.set_order = entries.set_order  # type: ignore[attr-defined]
    module.similarities = entries.similarities  # type: ignore[attr-defined]
    return module
