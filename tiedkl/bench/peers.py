"""Other libraries' fused losses, each through a function of h (N, D), w (V, D), y (N,) and with its version.

A peer is never required. Where it is missing, cannot be imported, or fails, its row says so. What each computes:

    CE alone    F.linear_cross_entropy, cut-cross-entropy, liger-kernel, fla-core, quack-kernels
    CE + KL     orda-kernel, a distillation loss whose teacher may be the student's own matrix: with the target's
                embedding as the teacher's hidden state it is this loss, times tau^2
                liger-kernel's chunked distillation loss of PyTorch operations: its beta = 0 is KL(teacher || student)
                liger-kernel's and fla-core's fused linear KL with their own cross-entropy added: two calls, each of
                which computes the logits
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .candidates import Candidate, Loss
from .shapes import IGNORE, Workload

LARGE_CHUNKS = 16  # liger-kernel's chunk_mem_const: its default of 1 makes chunks of a few hundred tokens


def peer(package: str, module: str, make: Callable[[Any], Loss], *, kl: bool = False, compiled: bool = False) -> Any:
    """The candidate `make(module)` of an optional package."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Candidate(None, kl, f"{package} is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is missing here; what that means for its row, the row says
            found = importlib.import_module(module)
        return Candidate(make(found), kl, f"{package} {version}", compiled=compiled)
    except Exception as error:  # a peer may miss a dependency of its own, or a device that it wants
        return Candidate(None, kl, f"{package} {version} cannot be imported: {type(error).__name__}: {error}")


def peers(w: Workload) -> dict[str, Candidate]:
    """Every peer that computes `w.loss` or a part of it, by name."""
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # of every optional backend it does without
    table = {
        "F.linear_cross_entropy CE": _torch_linear(chunked=False),
        "F.linear_cross_entropy CE, chunked": _torch_linear(chunked=True),
        "cut-cross-entropy CE": _cut(),
        "cut-cross-entropy CE, unfiltered": _cut(filter_eps=None),
        "cut-cross-entropy CE, torch_compile": _cut(compiled=True, impl="torch_compile"),
        "liger CE": _liger_ce(),
        "liger CE, large chunks": _liger_ce(chunk_mem_const=LARGE_CHUNKS),
        "fla CE": peer("fla-core", "fla.modules.fused_linear_cross_entropy", _fla_ce),
        "quack CE": peer("quack-kernels", "quack.linear_cross_entropy", _quack_ce),
    }
    if w.loss == "cekl":
        liger, chunked = "liger_kernel.transformers.functional", "liger_kernel.chunked_loss"
        table |= {
            "orda CE+KL, tied": _orda(w, tied=True),
            "orda CE+KL, separate": _orda(w, tied=False),
            "liger CE+KL, chunked": peer(
                "liger-kernel", chunked, lambda m: _liger_chunked(m, w), kl=True, compiled=True
            ),
            "liger CE+KL, linear JSD": peer("liger-kernel", liger, lambda m: _liger_jsd(m, w), kl=True),
            "liger CE+KL, linear KLDiv": peer("liger-kernel", liger, lambda m: _liger_kl_div(m, w), kl=True),
            "fla CE+KL": peer("fla-core", "fla.modules", lambda m: _fla_cekl(m, w), kl=True),
        }
    if w.device.startswith("cuda"):
        del table["cut-cross-entropy CE, torch_compile"]  # the row of torch.compile
    return table


def _torch_linear(chunked: bool) -> Candidate:
    version = f"torch {torch.__version__}"
    if not hasattr(F, "linear_cross_entropy"):
        return Candidate(None, False, f"{version} has no F.linear_cross_entropy")
    options: dict[str, Any] = {}
    if chunked:
        made = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if made is None:
            return Candidate(None, False, f"{version} has no LinearCrossEntropyOptions")
        options["options"] = made()

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.linear_cross_entropy(h, w, y, ignore_index=IGNORE, **options)

    return Candidate(loss, False, version)


def _cut(compiled: bool = False, **options: Any) -> Any:
    def make(m: Any) -> Loss:
        return lambda h, w, y: m.linear_cross_entropy(h, w, y, ignore_index=IGNORE, **options)

    return peer("cut-cross-entropy", "cut_cross_entropy", make, compiled=compiled)


def _liger_ce(**options: Any) -> Any:
    def make(m: Any) -> Loss:
        return lambda h, w, y: m.liger_fused_linear_cross_entropy(h, w, y, ignore_index=IGNORE, **options)

    return peer("liger-kernel", "liger_kernel.transformers.functional", make)


def _fla_ce(m: Any) -> Loss:
    loss = m.FusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return lambda h, w, y: loss(h, y, w)


def _quack_ce(m: Any) -> Loss:
    return lambda h, w, y: m.chunked_linear_cross_entropy(h, w, y, ignore_index=IGNORE)


def _teacher(w: Tensor, y: Tensor) -> Tensor:
    """The teacher's hidden states (N, D): the targets' own embeddings."""
    return w.detach()[y.clamp(min=0)]


def _orda(w: Workload, tied: bool) -> Any:
    tau, alpha = w.temperature, w.alpha
    backend = "torch" if w.device == "cpu" else "auto"

    def make(m: Any) -> Loss:
        def loss(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
            rows, fixed = _teacher(weight, y), weight.detach()
            teacher = m.TiedTeacher(hidden=rows) if tied else m.SeparateTeacher(hidden=rows, weight=fixed)
            found: Tensor = m.distillation_loss(
                h,
                weight,
                y,
                teacher,
                teacher_ce_weight=0.0,
                kl_weight=alpha / tau**2,
                kl_temperature=tau,
                backend=backend,
            ).loss
            return found

        return loss

    found = peer("orda-kernel", "orda_kernel", make, kl=True)
    if backend == "torch" and found.loss:
        found.note += ": its PyTorch version, which holds all logits; its kernels need a GPU"
    return found


def _liger_chunked(m: Any, problem: Workload) -> Loss:
    loss = m.LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0,
        weight_soft_loss=problem.alpha,
        beta=0.0,
        ignore_index=IGNORE,
        temperature=problem.temperature,
    )
    return lambda h, w, y: loss(h, w, _teacher(w, y), w.detach(), y)


def _liger_jsd(m: Any, problem: Workload) -> Loss:
    options = {"jsd_beta": 0.0, "ignore_index": IGNORE, "temperature": problem.temperature}

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        kl = m.liger_fused_linear_jsd(h, w, _teacher(w, y), w.detach(), y, **options)
        ce = m.liger_fused_linear_cross_entropy(h, w, y, ignore_index=IGNORE, chunk_mem_const=LARGE_CHUNKS)
        found: Tensor = ce + problem.alpha * kl
        return found

    return loss


def _liger_kl_div(m: Any, problem: Workload) -> Loss:
    options = {"ignore_index": IGNORE, "temperature": problem.temperature}

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        q = F.softmax(F.linear(_teacher(w, y), w.detach()).float() / problem.temperature, -1)  # it wants all of it
        kl = m.liger_fused_linear_kl_div(h, w, q, y, **options)
        ce = m.liger_fused_linear_cross_entropy(h, w, y, ignore_index=IGNORE, chunk_mem_const=LARGE_CHUNKS)
        found: Tensor = ce + problem.alpha * kl
        return found

    return loss


def _fla_cekl(m: Any, problem: Workload) -> Loss:
    """Its KL has no temperature, but a hidden state divided by tau has logits divided by tau; nor an ignore_index."""
    if problem.ignored:
        raise NotImplementedError("its KL cannot ignore tokens")
    ce, kl, tau = m.FusedLinearCrossEntropyLoss(ignore_index=IGNORE), m.FusedKLDivLoss(), problem.temperature

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        found: Tensor = ce(h, y, w) + problem.alpha * kl(h / tau, _teacher(w, y) / tau, w, w.detach())
        return found

    return loss
