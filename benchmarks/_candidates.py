"""What bench_gpu.py compares: tiedkl, plain PyTorch, and the fused losses of other libraries that are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tiedkl
from tiedkl import backends

TAU, ALPHA = 20.0, 10.0
STRICT_BYTES, LARGE_BYTES = 32 << 20, 4 << 30
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Candidate:
    """A loss of h (N, D), w (V, D), y (N,), mean over the tokens; without `loss` it is absent, and `note` says why."""

    loss: Loss | None
    kl: bool  # CE + KL, not CE alone
    note: str = ""  # its version, or why it is absent
    workspace_bytes: int | None = None  # of tiedkl
    impl: str = ""  # of tiedkl
    graph: bool = False  # forward and backward are captured once and replayed
    compiled: bool = False


def eager_ce(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y)


def eager_cekl(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).float()
    s = F.linear(w.detach()[y], w.detach()).float()
    kl = F.kl_div(F.log_softmax(z / TAU, -1), F.softmax(s / TAU, -1), reduction="batchmean")
    return F.cross_entropy(z, y) + ALPHA * kl


def ours(impl: str, device: torch.device, dtype: torch.dtype, workspace: int | None = None, graph: bool = False) -> Any:
    why = backends.load(impl).unsupported(device, dtype)
    if why or (graph and device.type != "cuda"):
        return Candidate(None, True, why or "CUDA graphs need a GPU")
    loss = tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA, impl=impl, workspace_bytes=workspace)
    return Candidate(lambda h, w, y: loss(h, w, y), True, tiedkl.__version__, workspace, impl, graph)


def peer(package: str, module: str, make: Callable[[Any], Loss], kl: bool = False) -> Candidate:
    """`make(module)` of an optional package."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Candidate(None, kl, f"{package} is not installed")
    try:
        return Candidate(make(importlib.import_module(module)), kl, f"{package} {version}")
    except Exception as error:  # a peer may miss a dependency of its own, or a device it wants
        return Candidate(None, kl, f"{package} {version} cannot be imported: {type(error).__name__}: {error}")


def cut_cross_entropy(m: Any, **options: Any) -> Loss:
    return lambda h, w, y: m.linear_cross_entropy(h, w, y, **options)


def liger(m: Any, **options: Any) -> Loss:
    return lambda h, w, y: m.liger_fused_linear_cross_entropy(h, w, y, **options)


def flash_linear_attention(m: Any) -> Loss:
    loss = m.FusedLinearCrossEntropyLoss()
    return lambda h, w, y: loss(h, y, w)


def quack(m: Any) -> Loss:
    return lambda h, w, y: m.chunked_linear_cross_entropy(h, w, y)


def orda(m: Any, tied: bool) -> Loss:
    """Its KL carries a factor tau^2. A tied teacher lets the gradient reach w through the target: d_w is another."""

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = w.detach()[y]
        teacher = m.TiedTeacher(hidden=rows) if tied else m.SeparateTeacher(hidden=rows, weight=w.detach())
        out = m.distillation_loss(h, w, y, teacher, teacher_ce_weight=0.0, kl_weight=ALPHA / TAU**2, kl_temperature=TAU)
        return out.loss

    return loss


def linear_cross_entropy() -> Candidate:
    if not hasattr(F, "linear_cross_entropy"):
        return Candidate(None, False, f"torch {torch.__version__} has no F.linear_cross_entropy")
    return Candidate(lambda h, w, y: F.linear_cross_entropy(h, w, y), False, f"torch {torch.__version__}")


def candidates(device: torch.device, dtype: torch.dtype, smoke: bool) -> dict[str, Candidate]:
    """Every candidate by name; eager first, as the others' errors are given in units of its own."""
    version = f"torch {torch.__version__}"
    table = {
        "eager CE+KL": Candidate(eager_cekl, True, version),
        "eager CE": Candidate(eager_ce, False, version),
        "tiedkl triton": ours("triton", device, dtype),
        "tiedkl triton, 32 MiB": ours("triton", device, dtype, STRICT_BYTES),
        "tiedkl triton, 4 GiB": ours("triton", device, dtype, LARGE_BYTES),
        "tiedkl triton, CUDA graph": ours("triton", device, dtype, graph=True),
        "tiedkl cuda": ours("cuda", device, dtype),
        "tiedkl cuda, 32 MiB": ours("cuda", device, dtype, STRICT_BYTES),
        "tiedkl cuda, 4 GiB": ours("cuda", device, dtype, LARGE_BYTES),
        "tiedkl cuda, 4 GiB, CUDA graph": ours("cuda", device, dtype, LARGE_BYTES, graph=True),
        "tiedkl torch": ours("torch", device, dtype),
        "tiedkl torch, 4 GiB": ours("torch", device, dtype, LARGE_BYTES),
        "torch.compile CE+KL": Candidate(torch.compile(eager_cekl, dynamic=False), True, version, compiled=True),
        "torch.compile CE": Candidate(torch.compile(eager_ce, dynamic=False), False, version, compiled=True),
        "F.linear_cross_entropy CE": linear_cross_entropy(),
        "cut-cross-entropy CE": peer("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
        "cut-cross-entropy CE, unfiltered": peer(
            "cut-cross-entropy", "cut_cross_entropy", lambda m: cut_cross_entropy(m, filter_eps=None)
        ),
        "liger CE": peer("liger-kernel", "liger_kernel.transformers.functional", liger),
        "liger CE, large chunks": peer(
            "liger-kernel", "liger_kernel.transformers.functional", lambda m: liger(m, chunk_mem_const=16)
        ),
        "fla CE": peer("fla-core", "fla.modules.fused_linear_cross_entropy", flash_linear_attention),
        "quack CE": peer("quack-kernels", "quack.linear_cross_entropy", quack),
        "orda CE+KL, tied": peer("orda-kernel", "orda_kernel", lambda m: orda(m, True), kl=True),
        "orda CE+KL, separate": peer("orda-kernel", "orda_kernel", lambda m: orda(m, False), kl=True),
    }
    if smoke:
        table = {name: c for name, c in table.items() if not c.compiled}
    return table
