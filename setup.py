"""Finds the packages and builds the optional extensions; everything declarative is in pyproject.toml.

`tiedkl._C` is for CPUs, `tiedkl._C_cuda` for NVIDIA GPUs: the latter is built where torch is a CUDA build and nvcc is
found, and needs no GPU for that. Without torch at build time, without a compiler, or when compilation fails, the
install goes on with what there is and says so; a failure of one extension leaves the other.

    TIEDKL_BUILD_CPU=0                    do not build tiedkl._C
    TIEDKL_FORCE_BUILD=1                  it is an error when tiedkl._C is not built
    TIEDKL_BUILD_CUDA=0|1                 do not build tiedkl._C_cuda; or do so whatever torch it is
    TIEDKL_FORCE_CUDA=1                   it is an error when tiedkl._C_cuda is not built
    TORCH_CUDA_ARCH_LIST="9.0 10.0+PTX"   GPUs to compile for
    TIEDKL_SANITIZE=address,undefined     build tiedkl._C with these sanitizers, and nothing else
    MAX_JOBS=n                            compile at most n files at a time
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

HOW_TO_BUILD = "To build it: install torch, ninja and a C++ compiler, then `pip install --no-build-isolation .`"
SANITIZE = os.environ.get("TIEDKL_SANITIZE", "")

# a*b + c is fused only where the source says so (at::vec::fmadd): every capability rounds alike.
FP_CONTRACT = "-ffp-contract=off"
# Sources compiled for instruction sets of their own, among which csrc/cpu/dispatch.cpp picks at run time: one object
# each, in a folder of its own. ATen's vector headers choose their instruction set by macros that come with these flags,
# so a target attribute on a function would not do.
SOURCES = ("bindings", "driver", "token_blocks", "target_logits", "cpu/dispatch")
ROW_KERNELS = "csrc/cpu/row_kernels.cpp"
GEMM_F32, GEMM_BF16 = "csrc/cpu/gemm_f32.cpp", "csrc/cpu/gemm_bf16.cpp"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"),
    "-Wno-maybe-uninitialized",  # GCC 12 takes its own _mm512_undefined_ps() for a bug
]


def capability(name: str) -> list[str]:
    """The macros by which a source and ATen's headers know what they are compiled for."""
    return [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]


OBJECTS = {"default": (ROW_KERNELS, capability("DEFAULT"))}  # folder -> source, flags
if X86:
    OBJECTS["avx2"] = (ROW_KERNELS, [*capability("AVX2"), *AVX2])
    OBJECTS["avx512"] = (ROW_KERNELS, [*capability("AVX512"), *AVX512])
    OBJECTS["avx512_f32"] = (GEMM_F32, [*capability("AVX512"), *AVX512])
    OBJECTS["avx512_bf16"] = (GEMM_BF16, [*AVX512, "-mavx512bf16"])


CPU, CUDA = "tiedkl._C", "tiedkl._C_cuda"
LABEL = {CPU: "the C++ extension tiedkl._C", CUDA: "the CUDA extension tiedkl._C_cuda"}
FORCE = {CPU: "TIEDKL_FORCE_BUILD", CUDA: "TIEDKL_FORCE_CUDA"}
WITHOUT = {
    CPU: "the install goes on as pure Python, slower on a CPU.",
    CUDA: "the install goes on without it; Triton kernels and PyTorch remain for GPUs.",
}
CUDA_SOURCES = ("cuda/bindings", "cuda/walk")
CUDA_KERNELS = ("cuda/row_kernels", "cuda/similarity", "cuda/target_kernels")
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")  # the last one also as code that newer GPUs compile for themselves


def give_up(name: str, reason: str, quiet: bool = False) -> None:
    """Says on stderr that an extension is not built, or ends the build when that is to be an error."""
    if os.environ.get(FORCE[name], "0") == "1":
        raise SystemExit(f"tiedkl: {FORCE[name]}=1, but {LABEL[name]} is not built: {reason}")
    if quiet:
        return
    rule = "*" * 100
    print(
        f"\n{rule}\ntiedkl: {LABEL[name]} is NOT built: {reason}\ntiedkl: {WITHOUT[name]} {HOW_TO_BUILD}\n{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def skip_reason() -> str | None:
    """Why no extension at all can be built, or None."""
    if sys.platform == "win32":
        return "only GCC and Clang are supported"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # a broken torch raises more than ImportError, and a pure-Python install survives it
        return f"the build cannot import torch ({type(error).__name__}: {error})"
    return None


def nvcc() -> tuple[str, str] | None:
    """Path and version of nvcc: of CUDA_HOME, or on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if path is None and not home and Path("/usr/local/cuda/bin/nvcc").exists():
        path = "/usr/local/cuda/bin/nvcc"
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    return path, version[1] if version else "unknown"


def cuda_skip_reason() -> tuple[str, bool] | None:
    """Why tiedkl._C_cuda is not to be built, and whether that is as expected; or None."""
    import torch

    wanted = os.environ.get("TIEDKL_BUILD_CUDA", "")
    if wanted == "0":
        return "TIEDKL_BUILD_CUDA=0", True
    if SANITIZE:
        return "sanitizers are for the CPU part", True
    if torch.version.cuda is None and wanted != "1":
        return f"torch {torch.__version__} is a build without CUDA", True
    try:
        found = nvcc()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvcc does not run: {error}", False
    if found is None:
        return "nvcc is neither in CUDA_HOME nor on PATH", False
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != found[1].split(".")[0]:
        return f"nvcc is of CUDA {found[1]}, torch {torch.__version__} was built with CUDA {torch.version.cuda}", False
    return None


def architectures(compiler: str) -> tuple[list[str], list[str]]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, and what they compile for: ["sm_80", "sm_90", "compute_90"]."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not asked:
        known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        asked = [x for x in DEFAULT_ARCHITECTURES if f"sm_{x.replace('.', '')}" in known]
        asked[-1:] = [f"{x}+PTX" for x in asked[-1:]]
    flags, names = [], []
    for item in asked:
        match = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", item)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {item!r} is not like 9.0, 9.0a or 9.0+PTX")
        code = match[1] + match[2] + match[3]
        for kind in ("sm", "compute") if match[4] else ("sm",):
            flags.append(f"-gencode=arch=compute_{code},code={kind}_{code}")
            names.append(f"{kind}_{code}")
    return flags, names


def cuda_runtime(compiler: str) -> str:
    """The shared libcudart to link with. At run time it is the one that torch has loaded, of the same name."""
    import torch

    plan = subprocess.run(
        [compiler, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.M)  # the nvcc on PATH may be a link or a script
    home, packages = Path(top[1] if top else compiler).resolve(), Path(torch.__file__).resolve().parents[1]
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib"), *packages.glob("nvidia/*/lib")]
    for folder in folders:
        for library in sorted(folder.glob("libcudart.so*")):
            return str(library)
    raise FileNotFoundError(f"no libcudart.so in {', '.join(map(str, folders))}")


def cpu_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags of every CPU source."""
    import torch
    from torch.utils.cpp_extension import include_paths

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    compile_flags = [
        "-std=c++20" if version >= (2, 13) else "-std=c++17",
        "-O3",
        "-g0",  # Python's own flags ask for debug information, half the time of a build
        "-fno-math-errno",
        "-fno-trapping-math",
        FP_CONTRACT,
        "-Wall",
        "-Wextra",
        f'-DTIEDKL_TORCH_VERSION="{torch.__version__}"',
        *(f"-isystem{path}" for path in include_paths()),  # no warnings out of torch's headers
    ]
    link_flags = []
    if X86:
        compile_flags.append("-DTIEDKL_X86")
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        # Compiled with OpenMP, linked without: the symbols come from the runtime that libtorch_cpu loads, whatever its
        # name, so there is one thread pool.
        compile_flags.append("-fopenmp")
    if SANITIZE:
        link_flags = [f"-fsanitize={SANITIZE}"]
        # Without optimisation and with line numbers alone: a third of the time that -O1 -g takes to compile.
        compile_flags += [*link_flags, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O0"]
    return compile_flags, link_flags


def extension_options(names: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """setup()'s `ext_modules` and `cmdclass` for extensions and their sources."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildTiedkl(BuildExtension):
        """Compiles OBJECTS, or the CUDA kernels, beside the other sources; a failure leaves an install without them."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # Editable installs build in a temporary folder by default; in a lasting one ninja compiles what changed.
            suffix = "-sanitize" if SANITIZE else ""
            self.build_temp = os.path.join("build", f"objects-{sys.implementation.cache_tag}{suffix}")
            self.force = True  # ninja knows what is out of date; without it all is compiled anew

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # here: no compiler at all
                for ext in self.extensions:
                    self.abandon(ext, error)

        def build_extension(self, ext: CppExtension) -> None:
            try:
                ext.extra_objects = self.cuda_objects(ext) if ext.name == CUDA else self.objects(ext)
                super().build_extension(ext)
            except Exception as error:
                self.abandon(ext, error)

        def cuda_objects(self, ext: CppExtension) -> list[str]:
            """The CUDA kernels, which need nothing of torch, compiled by nvcc where they are out of date."""
            compiler, version = nvcc() or ("nvcc", "")
            flags, names = architectures(compiler)
            ext.extra_compile_args += [
                f'-DTIEDKL_NVCC_VERSION="{version}"', f'-DTIEDKL_ARCHITECTURES="{" ".join(names)}"'
            ]  # fmt: skip
            folder = Path(self.build_temp, "cuda")
            folder.mkdir(parents=True, exist_ok=True)
            newest = max(path.stat().st_mtime for path in Path("csrc").rglob("*.*"))

            def compile_into(source: str) -> str:
                out = folder / f"{Path(source).name}.o"
                options = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", *flags]
                command = [compiler, "-c", *options, f"csrc/{source}.cu", "-o", str(out)]
                stamp = out.with_suffix(".command")
                fresh = out.exists() and stamp.exists() and out.stat().st_mtime > newest
                if not fresh or stamp.read_text() != " ".join(command):
                    print(" ".join(command), flush=True)
                    subprocess.run(command, check=True)
                    stamp.write_text(" ".join(command))
                return str(out)

            with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(compile_into, CUDA_KERNELS))
            ext.extra_link_args.append(cuda_runtime(compiler))
            return objects

        def objects(self, ext: CppExtension) -> list[str]:
            """OBJECTS, each compiled in a folder (and by a ninja file) of its own."""

            def compile_into(folder: str) -> list[str]:
                source, flags = OBJECTS[folder]
                return self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, folder),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args, *flags],
                )

            # Without ninja BuildExtension swaps the compiler command while it works: one at a time.
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) if self.use_ninja else 1
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                return [obj for objects in pool.map(compile_into, OBJECTS) for obj in objects]

        def abandon(self, ext: CppExtension, error: Exception) -> None:
            """Reports the failure and removes an earlier build's library, which the install would pick up."""
            give_up(ext.name, f"{type(error).__name__}: {error}")
            Path(self.build_lib, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            if self.inplace:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    extensions = []
    for name, sources in names.items():
        compile_flags, link_flags = cpu_flags()
        extension = CppExtension(
            name,
            sources=[f"csrc/{source}.cpp" for source in sources],
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
            optional=True,
        )
        extension.include_dirs = [os.path.abspath("csrc")]  # torch's own are in the flags
        extensions.append(extension)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildTiedkl}}


def wanted() -> dict[str, tuple[str, ...]]:
    """The extensions to build and their C++ sources; says why others are not."""
    reason = skip_reason()
    cpu = "TIEDKL_BUILD_CPU=0" if os.environ.get("TIEDKL_BUILD_CPU", "1") == "0" else reason
    if cpu:
        give_up(CPU, cpu)
    cuda = (reason, True) if reason else cuda_skip_reason()
    if cuda:
        give_up(CUDA, *cuda)
    return {} if reason else {**({} if cpu else {CPU: SOURCES}), **({} if cuda else {CUDA: CUDA_SOURCES})}


names = wanted()
setup(
    packages=[*find_packages(include=["tiedkl", "tiedkl.*"]), "tiedkl.kernels"],
    package_dir={"tiedkl.kernels": "kernels"},
    **(extension_options(names) if names else {}),
)
