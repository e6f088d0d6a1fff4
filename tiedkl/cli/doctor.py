"""`tiedkl doctor`: what is installed, which backends can run here and why not the others."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Adds `tiedkl doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed, which backends can run here and why not the others",
        description="Reports what is installed, which backends can run here and why not the others.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 when torch itself does not work, else 0."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if "error" in report["torch"] else 0


def collect() -> dict[str, Any]:
    """The report, JSON-serialisable. A section that cannot be filled holds `error`."""
    sections = {
        "tiedkl": _tiedkl,
        "python": _python,
        "cpu": _cpu,
        "torch": _torch,
        "cuda": _cuda,
        "triton": _triton,
        "compilers": _compilers,
        "extension": _extension,
        "cuda_ext": _cuda_extension,
        "backends": _backends,
    }
    return {name: _guarded(section) for name, section in sections.items()}


def _guarded(section: Any) -> Any:
    """A doctor reports a broken installation: it does not break with it."""
    try:
        return section()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _tiedkl() -> dict[str, Any]:
    import tiedkl

    return {"version": tiedkl.__version__, "location": os.path.dirname(tiedkl.__file__)}


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()}


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return {"name": name, "cores": os.cpu_count()}


def _torch() -> dict[str, Any]:
    import torch

    torch.ones(2).sum().item()  # an installation with a missing library fails here at the latest
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "blas": blas[1] if blas else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }


def _cuda() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]


def _triton() -> dict[str, Any]:
    return {"version": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None}


def _compilers() -> dict[str, str | None]:
    return {tool: _tool_version(tool) for tool in ("g++", "nvcc", "ninja")}


@functools.cache
def _tool_version(tool: str) -> str | None:
    """The tool's version, None when it is not on PATH."""
    path = shutil.which(tool)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    version = re.search(r"release (\S+?),", said) or re.search(r"(\d+\.\d[\w.]*)\s*$", said.partition("\n")[0])
    return f"{version[1] if version else 'unknown version'} ({path})"


def _extension() -> dict[str, Any]:
    """`tiedkl._C`: where it is, what it was built with, and what is wrong with it."""
    return _module("tiedkl._C", _how_to_build("g++", "ninja"))


def _cuda_extension() -> dict[str, Any]:
    """`tiedkl._C_cuda`: the same, and whether it has code for the devices that are here."""
    import torch

    from tiedkl.backends.cuda import runs_on

    how = _how_to_build("g++", "ninja", "nvcc")
    if torch.version.cuda is None:
        how = f"torch {torch.__version__} is a build without CUDA; with another one, {how}"
    found = _module("tiedkl._C_cuda", how)
    if found["path"] is None or found["problem"] or not torch.cuda.is_available():
        return found
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if not runs_on((major, minor), found["architectures"]):
            found["problem"] = f"built for {found['architectures']}, device {i} has capability {major}.{minor}; {how}"
    return found


def _module(name: str, how_to_build: str) -> dict[str, Any]:
    """Where an extension is, what it was built with, and what is wrong with it."""
    import torch

    spec = importlib.util.find_spec(name)
    if spec is None:
        return {"path": None, "problem": f"not built; {how_to_build}"}
    found: dict[str, Any] = {"path": spec.origin, "problem": None}
    try:
        found |= importlib.import_module(name).build_info()
    except ImportError as error:
        return found | {"problem": f"cannot be loaded ({error}); {how_to_build}"}
    built = found.get("torch")
    if built and built.split("+")[0] != torch.__version__.split("+")[0]:
        found["problem"] = f"built for torch {built}, this is torch {torch.__version__}; {how_to_build}"
    return found


def _how_to_build(*tools: str) -> str:
    """The command that builds an extension, with what has to be installed first."""
    missing = [tool for tool in tools if _tool_version(tool) is None]
    first = f"install {' and '.join(missing)}, then " if missing else ""
    checkout = Path(__file__).resolve().parents[2]
    editable = (checkout / "setup.py").exists() and (checkout / "csrc").is_dir()
    if editable:
        return f"{first}run `pip install --no-build-isolation -e {checkout}`"
    return f"{first}run `pip install --no-build-isolation --no-deps --force-reinstall .` in a checkout of tiedkl"


def _backends() -> dict[str, dict[str, dict[str, str | None]]]:
    """device -> backend -> dtype -> None when it can run, else the reason."""
    import torch

    from tiedkl import backends

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        device: {name: _reasons(backends.load, name, torch.device(device)) for name in backends.BACKENDS}
        for device in devices
    }


def _reasons(load: Any, name: str, device: Any) -> dict[str, str | None]:
    import torch

    try:
        unsupported = load(name).unsupported
        return {dtype: unsupported(device, getattr(torch, dtype)) for dtype in DTYPES}
    except Exception as error:
        return dict.fromkeys(DTYPES, f"{type(error).__name__}: {error}")


def render(report: dict[str, Any]) -> str:
    """The report as text, one line an item."""
    lines = []
    for name, section in report.items():
        if isinstance(section, dict) and "error" in section:
            text = [f"broken: {section['error']}"]
        elif name == "backends":
            text = [line for device, found in section.items() for line in _render_backends(device, found)]
        else:
            text = RENDER[name](section)
        lines += [f"{name if i == 0 else '':<10} {line}" for i, line in enumerate(text)]
    return "\n".join(lines)


def _render_backends(device: str, found: dict[str, dict[str, str | None]]) -> list[str]:
    """`cpu  cpp  yes: float32 float64`, or the reason; a dtype that is refused for a reason of its own gets a line."""
    lines = []
    for backend, reasons in found.items():
        runs = [dtype for dtype, reason in reasons.items() if reason is None]
        refused: dict[str, list[str]] = {}
        for dtype, reason in reasons.items():
            if reason is not None:
                refused.setdefault(reason, []).append(dtype)
        verdicts = [f"yes  {' '.join(runs)}"] if runs else []
        for why, dtypes in refused.items():
            verdicts.append(f"no   {why}" if len(dtypes) == len(reasons) else f"no   {' '.join(dtypes)}: {why}")
        lines += [f"{device:<5}{backend:<10} {verdict}" for verdict in verdicts]
    return lines


def _render_extension(e: dict[str, Any]) -> list[str]:
    if e["path"] is None:
        return [f"tiedkl._C is {e['problem']}"]
    built = f"torch {e.get('torch')}, compiler {e.get('compiler')}, row kernels for {e.get('capability')}"
    if e.get("bf16_products"):
        built += ", bfloat16 products"
    if e.get("f32_products"):
        built += f", float32 products from oneDNN, of narrow embeddings from {e.get('f32_columns')} columns on"
    return [f"tiedkl._C at {e['path']}", f"problem: {e['problem']}" if e["problem"] else built]


def _render_cuda_extension(e: dict[str, Any]) -> list[str]:
    if e["path"] is None:
        return [f"tiedkl._C_cuda is {e['problem']}"]
    built = f"torch {e.get('torch')}, compiler {e.get('compiler')}, nvcc {e.get('nvcc')}, for {e.get('architectures')}"
    return [f"tiedkl._C_cuda at {e['path']}", f"problem: {e['problem']}" if e["problem"] else built]


RENDER: dict[str, Any] = {
    "tiedkl": lambda s: [f"{s['version']} at {s['location']}"],
    "python": lambda s: [f"{s['version']} at {s['executable']}, {s['platform']}"],
    "cpu": lambda s: [f"{s['name']}, {s['cores']} cores"],
    "torch": lambda s: [
        f"{s['version']}, {s['threads']} threads, BLAS {s['blas']}, "
        f"CPU capability {s['capability']}, CUDA {s['cuda'] or 'no'}"
    ],
    "cuda": lambda s: [f"{d['name']}, capability {d['capability']}, {d['memory_gib']} GiB" for d in s] or ["no device"],
    "triton": lambda s: [s["version"] or "not installed"],
    "compilers": lambda s: [f"{tool:<5} {version or 'not found'}" for tool, version in s.items()],
    "extension": _render_extension,
    "cuda_ext": _render_cuda_extension,
}
