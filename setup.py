"""Finds the packages and builds the optional C++ extension `tiedkl._C`; everything declarative is in pyproject.toml.

Without torch at build time, without a compiler, or when compilation fails, the install goes on as pure Python and
says so.

    TIEDKL_BUILD_CPU=0                    do not build the extension
    TIEDKL_FORCE_BUILD=1                  an extension that is not built is an error
    TIEDKL_SANITIZE=address,undefined     build with these sanitizers
    MAX_JOBS=n                            compile at most n files at a time
"""

from __future__ import annotations

import os
import platform
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


def give_up(reason: str) -> None:
    """Says on stderr that the extension is not built, or ends the build when TIEDKL_FORCE_BUILD=1 wants it."""
    if os.environ.get("TIEDKL_FORCE_BUILD", "0") == "1":
        raise SystemExit(f"tiedkl: TIEDKL_FORCE_BUILD=1, but the C++ extension tiedkl._C is not built: {reason}")
    rule = "*" * 100
    print(
        f"\n{rule}\ntiedkl: the C++ extension tiedkl._C is NOT built: {reason}\n"
        f"tiedkl: the install goes on as pure Python, slower on a CPU. {HOW_TO_BUILD}\n{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def skip_reason() -> str | None:
    """Why no extension is to be built, or None."""
    if os.environ.get("TIEDKL_BUILD_CPU", "1") == "0":
        return "TIEDKL_BUILD_CPU=0"
    if sys.platform == "win32":
        return "only GCC and Clang are supported"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # a broken torch raises more than ImportError, and a pure-Python install survives it
        return f"the build cannot import torch ({type(error).__name__}: {error})"
    return None


def cpu_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags of every CPU source."""
    import torch
    from torch.utils.cpp_extension import include_paths

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    compile_flags = [
        "-std=c++20" if version >= (2, 13) else "-std=c++17",
        "-O3",
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
        compile_flags += [*link_flags, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    return compile_flags, link_flags


def extension_options() -> dict[str, Any]:
    """setup()'s `ext_modules` and `cmdclass`."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildTiedkl(BuildExtension):
        """Compiles OBJECTS beside the other sources; a failure leaves a pure-Python install."""

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
                self.abandon(error)

        def build_extension(self, ext: CppExtension) -> None:
            try:
                ext.extra_objects = self.objects(ext)
                super().build_extension(ext)
            except Exception as error:
                self.abandon(error)

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

        def abandon(self, error: Exception) -> None:
            """Reports the failure and removes an earlier build's library, which the install would pick up."""
            give_up(f"{type(error).__name__}: {error}")
            for ext in self.extensions:
                Path(self.build_lib, self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    compile_flags, link_flags = cpu_flags()
    cpu = CppExtension(
        "tiedkl._C",
        sources=[f"csrc/{name}.cpp" for name in SOURCES],
        extra_compile_args=compile_flags,
        extra_link_args=link_flags,
        optional=True,
    )
    cpu.include_dirs = [os.path.abspath("csrc")]  # torch's own are in the flags
    return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildTiedkl}}


reason = skip_reason()
if reason:
    give_up(reason)
setup(
    packages=[*find_packages(include=["tiedkl", "tiedkl.*"]), "tiedkl.kernels"],
    package_dir={"tiedkl.kernels": "kernels"},
    **({} if reason else extension_options()),
)
