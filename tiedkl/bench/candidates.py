"""What is compared: tiedkl, plain PyTorch, and the fused losses of other libraries that are installed (peers.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tiedkl

from .. import backends
from .shapes import IGNORE, MIB, Workload

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER = {True: "eager CE+KL", False: "eager CE"}  # by: with KL?


@dataclass
class Candidate:
    """A loss of h (N, D), w (V, D), y (N,), mean over the tokens; without `loss` it is absent, and `note` says why."""

    loss: Loss | None
    kl: bool  # CE + KL, not CE alone
    note: str = ""  # its version, or why it is absent
    impl: str = ""  # of tiedkl
    workspace_bytes: int | None = None  # of tiedkl
    graph: bool = False  # forward and backward are captured once and replayed
    compiled: bool = False  # by torch.compile: the first call takes long


def eager(w: Workload, kl: bool) -> Loss:
    """The loss as a user writes it: logits in the input's dtype, the losses of them in float32."""
    acc = torch.float64 if w.dtype == "float64" else torch.float32
    tau, alpha = w.temperature, w.alpha

    def ce(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).to(acc), y, ignore_index=IGNORE)

    def cekl(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, weight).to(acc)
        s = F.linear(weight.detach()[y], weight.detach()).to(acc)
        kl = F.kl_div(F.log_softmax(z / tau, -1), F.softmax(s / tau, -1), reduction="batchmean")
        return F.cross_entropy(z, y) + alpha * kl

    def masked(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        valid = y != IGNORE
        z = F.linear(h, weight).to(acc)
        s = F.linear(weight.detach()[y.clamp(min=0)], weight.detach()).to(acc)
        kl = F.kl_div(F.log_softmax(z / tau, -1), F.softmax(s / tau, -1), reduction="none").sum(-1)
        return F.cross_entropy(z, y, ignore_index=IGNORE) + alpha * (kl * valid).sum() / valid.sum()

    return (masked if w.ignored else cekl) if kl else ce


def ours(w: Workload, impl: str, workspace: int | None = None, graph: bool = False) -> Candidate:
    """A backend of tiedkl, of which `w.loss` decides whether KL is part."""
    device, kl = torch.device(w.device), w.loss == "cekl"
    why = backends.load(impl).unsupported(device, w.torch_dtype)
    if not why and graph and (device.type != "cuda" or w.mode != "fwd+bwd"):
        why = "CUDA graphs need a GPU" if device.type != "cuda" else "captured are forward and backward together"
    if why:
        return Candidate(None, kl, why, impl)
    alpha = w.alpha if kl else 0.0
    loss = tiedkl.FusedTiedLoss(
        temperature=w.temperature, alpha=alpha, ignore_index=IGNORE, impl=impl, workspace_bytes=workspace
    )

    def call(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        out = loss(h, weight, y)
        assert isinstance(out, Tensor)
        return out

    return Candidate(call, kl, f"tiedkl {tiedkl.__version__}", impl, workspace, graph)


def default_impls(w: Workload) -> list[str]:
    """Backends worth timing here: those that run, but for the specification and an interpreter.

    On a GPU neither the fallback where a kernel runs: it takes seconds.
    """
    device = torch.device(w.device)
    found = [
        name
        for name in backends.BACKENDS
        if name != "reference"
        and backends.load(name).unsupported(device, w.torch_dtype) is None
        and not (name == "triton" and device.type == "cpu")
    ]
    kernels = [name for name in found if name != "torch"]
    return kernels if device.type == "cuda" and kernels else found


def candidates(
    w: Workload,
    impls: Sequence[str] | None = None,
    *,
    workspaces: Sequence[int] = (),
    graph: bool = False,
    compiled: bool = True,
) -> dict[str, Candidate]:
    """Every candidate for `w` by name, tiedkl and eager first: the others' errors are given in units of eager's.

    impls are backends of tiedkl (default: those that run here), each with its own workspace and with every one of
    `workspaces` in bytes, and, with `graph`, captured in a CUDA graph.
    """
    from .peers import peers

    version, kl = f"torch {torch.__version__}", w.loss == "cekl"
    suffix = "" if kl else " CE"
    table: dict[str, Candidate] = {}
    for impl in default_impls(w) if impls is None else impls:
        name = f"tiedkl {impl}{suffix}"
        table[name] = ours(w, impl, w.workspace_bytes)
        if w.workspace_bytes is None:
            for workspace in workspaces:
                size = f"{workspace // MIB} MiB" if workspace < 1024 * MIB else f"{workspace // (1024 * MIB)} GiB"
                table[f"{name}, {size}"] = ours(w, impl, workspace)
        if graph and impl not in ("torch", "reference"):  # the first copies targets to the host
            table[f"{name}, CUDA graph"] = ours(w, impl, w.workspace_bytes, graph=True)
    losses = (True, False) if kl else (False,)
    for with_kl in losses:
        table[EAGER[with_kl]] = Candidate(eager(w, with_kl), with_kl, version)
    table |= peers(w)
    if compiled:
        for with_kl in losses:
            loss = torch.compile(eager(w, with_kl), dynamic=False)
            table[f"torch.compile {'CE+KL' if with_kl else 'CE'}"] = Candidate(loss, with_kl, version, compiled=True)
    # Compilers last, PyTorch's own first among them: should the time run out, most is known by then.
    order = sorted(table, key=lambda name: (table[name].compiled, not name.startswith("torch.compile")))
    return {name: table[name] for name in order if compiled or not table[name].compiled}
