"""One rank of test_distributed.py: `python ranks.py RANK WORLD FOLDER` runs every check and writes down how each ended.

Checks are the functions called `check_...`; they take (rank, world) and raise. In one process group one after another,
because starting the processes takes longer than they do.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import tiedkl
from tiedkl import testing
from tiedkl.distributed import Collective, VocabParallelTiedLoss, traffic
from tiedkl.testing import oracle

OPTIONS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0},
    {"alpha": 0.0, "label_smoothing": 0.1, "z_loss": 1e-3},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 8.0, "temperature": 3.0},
    {"target_grad": True, "temperature": 2.0},
    {"target_grad": True, "label_smoothing": 0.2, "workspace_bytes": 1 << 14},
    {"reduction": "sum", "workspace_bytes": 1 << 14},
    {"reduction": "none"},
    {"reduction": "none", "target_grad": True, "workspace_bytes": 1 << 14},
]


def cuts(vocab: int, world: int, seed: str) -> list[int]:
    """Bounds of `world` shards of random lengths, empty ones included."""
    r = random.Random(f"{seed}-{world}")
    inner = sorted(r.choice((0, vocab, r.randrange(vocab + 1), r.randrange(vocab + 1))) for _ in range(world - 1))
    return [0, *inner, vocab]


class Part(torch.autograd.Function):
    """Rows [first, last) of a tensor that every rank has; backward puts all ranks' gradients together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int) -> Tensor:
        ctx.place = (x.shape, first, last)
        ctx.set_materialize_grads(False)
        return x[first:last].clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, None, None]:
        shape, first, last = ctx.place
        if d is None:
            return None, None, None
        whole = d.new_zeros(shape)
        whole[first:last] = d
        dist.all_reduce(whole)
        return whole, None, None


class Whole(torch.autograd.Function):
    """The opposite: the ranks' rows together; backward takes this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int, total: int) -> Tensor:
        ctx.place = (first, last)
        whole = x.new_zeros(total, *x.shape[1:])
        whole[first:last] = x
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        first, last = ctx.place
        return d[first:last], None, None, None


def sharded(
    h: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    seed: str = "",
    sequence: bool = False,
    target_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Any = None,
    shift: int = 0,
    impl: str = "",
    **options: Any,
) -> Any:
    """`tiedkl.fused_tied_loss` through VocabParallelTiedLoss: takes and returns what one process would."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = cuts(len(w), world, seed)[rank : rank + 2]
    w, b, target_weight = (None if x is None else Part.apply(x, *rows) for x in (w, b, target_weight))
    n = len(y) if y.dim() else 0
    tokens = cuts(n, world, f"tokens {seed}")[rank : rank + 2]
    if sequence:
        h, y = Part.apply(h, *tokens), y[tokens[0] : tokens[1]]
        token_weight = None if token_weight is None else token_weight[tokens[0] : tokens[1]]
    loss_fn = VocabParallelTiedLoss(sequence_parallel=sequence, check=True, **options)
    out = loss_fn(h, w, y, b, target_weight=target_weight, token_weight=token_weight, num_items=num_items, shift=shift)
    if sequence and options.get("reduction") == "none":
        if isinstance(out, Tensor):
            return Whole.apply(out, *tokens, n)
        return tiedkl.TiedLossOutput(*(Whole.apply(x, *tokens, n) for x in out))
    return out


def splits(case: testing.Case) -> bool:
    """Whether the case makes sense with its tokens in parts."""
    return bool(case.shape) and not (case.shift and len(case.shape) == 1)


def judged(dtype: str, seed: int) -> None:
    """The judge of every other backend; on rank 0, which has what all ranks have."""
    judgements = []
    for case in testing.cases(len(testing.KINDS), seed=seed, dtypes=(dtype,)):
        x = testing.make_inputs(case)
        found: dict[str, oracle.Values] = {}
        for name in ("vocabulary", "sequence") if splits(case) else ("vocabulary",):

            def loss(*args: Any, name: str = name, case: testing.Case = case, **kwargs: Any) -> Any:
                return sharded(*args, seed=case.seed, sequence=name == "sequence", **kwargs)

            with mock.patch.object(tiedkl, "fused_tied_loss", loss):
                found[name] = oracle.use(case, x, "torch")
        if dist.get_rank() == 0:
            module = importlib.import_module("tiedkl.testing.judge")  # whose name is that of a function too

            def known(case: testing.Case, x: testing.Inputs, impl: str, *_: Any, found: Any = found) -> oracle.Values:
                return found[impl]  # again too: the other ranks are not there for another order

            with mock.patch.object(module, "use", known), mock.patch.object(module, "use_again", known):
                judgements += testing.judge(case, list(found))
    breaches = [f"{j.case.id} ({j.case.kind}) {j.impl} {text}" for j in judgements for text in j.breaches]
    ratios = testing.suite_ratios(judgements)
    if dist.get_rank() == 0:
        print({" ".join(k): round(ratio.value, 2) for k, ratio in ratios.items()})  # noqa: T201
    broken = {key: ratio for key, ratio in ratios.items() if ratio.broken}
    assert not breaches, "\n".join(breaches)
    assert not broken, broken


def check_the_judge_in_float32(rank: int, world: int) -> None:
    judged("float32", world)


def check_the_judge_in_float64(rank: int, world: int) -> None:
    if world == 2:
        judged("float64", 3)


def check_the_judge_in_bfloat16(rank: int, world: int) -> None:
    if world == 2:
        judged("bfloat16", 3)


def check_the_judge_in_float16(rank: int, world: int) -> None:
    if world == 2:
        judged("float16", 3)


def example(n: int, v: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    y = torch.randint(v, (n,), generator=g)
    y[::5] = -100
    return {"h": normal(n, d), "w": normal(v, d) * 0.5, "y": y, "b": normal(v), "t": normal(v, d + 3)}


def check_float64_agrees_with_the_specification(rank: int, world: int) -> None:
    x = example(37, 53, 7)
    for i, options in enumerate(OPTIONS):
        for extras in (False, True) if world == 2 else (i % 2 == 0,):
            got, want = [], []
            for fn, into in ((sharded, got), (tiedkl.fused_tied_loss, want)):
                leaves = {k: v.clone().requires_grad_() for k, v in x.items() if k != "y"}
                own = {"seed": str(i)} if fn is sharded else {"impl": "reference"}
                more = {"target_weight": leaves["t"], "token_weight": torch.linspace(0.1, 2, 37)} if extras else {}
                bias = leaves["b"] if extras else None
                out = fn(leaves["h"], leaves["w"], x["y"], bias, return_terms=True, **more, **own, **options)
                upstream = torch.linspace(0.5, 1.5, 37, dtype=torch.float64) if out.loss.dim() else torch.tensor(1.7)
                out.loss.backward(upstream.to(out.loss))
                into += [x.detach() for x in out] + [p.grad for p in leaves.values() if p.grad is not None]
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(b.abs().max())))


def everything(x: dict[str, Tensor], seed: str, **options: Any) -> list[Tensor]:
    """Loss, terms and gradients of one sharded evaluation."""
    leaves = {k: v.clone().requires_grad_() for k, v in x.items() if k in "hwbt"}
    out = sharded(
        leaves["h"],
        leaves["w"],
        x["y"],
        leaves["b"],
        target_weight=leaves["t"],
        seed=seed,
        return_terms=True,
        **options,
    )
    out.loss.sum().backward()
    return [*(a.detach() for a in out), *(a.grad for a in leaves.values() if a.grad is not None)]


def check_every_rank_and_run_has_the_same_bits(rank: int, world: int) -> None:
    x = example(61, 131, 19, torch.float32)
    for i, options in enumerate(OPTIONS):
        for sequence in (False, True) if world == 2 else (i % 2 == 0,):
            runs = [everything(x, str(i), sequence=sequence, **options) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "two runs differ"
            ranks: list[Any] = [None] * world
            dist.all_gather_object(ranks, [a.numpy().tobytes() for a in runs[0]])
            assert all(r == ranks[0] for r in ranks), f"ranks differ: {options}"


def check_an_empty_batch_and_ignored_tokens(rank: int, world: int) -> None:
    for n in (0, 4):
        for sequence in (False, True):
            x = example(n, 9, 3, torch.float32)
            x["y"].fill_(-100)
            for a in everything(x, "x", sequence=sequence):
                assert not a.any()


def check_shares_of_the_input_gradient(rank: int, world: int) -> None:
    x = example(20, 31, 5)
    rows = 31 * rank // world, 31 * (rank + 1) // world  # a rank with all rows would have all of the gradient
    grads = []
    for whole in (True, False):
        h = x["h"].clone().requires_grad_()
        VocabParallelTiedLoss(reduce_input_grad=whole)(h, x["w"][slice(*rows)], x["y"]).backward()
        grads.append(h.grad)
    assert not torch.allclose(*grads)
    dist.all_reduce(grads[1])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def check_backward_twice_and_never_differentiated(rank: int, world: int) -> None:
    x = example(20, 31, 5)
    rows = cuts(31, world, "twice")[rank : rank + 2]
    for reduction in ("mean", "none"):
        h, w = x["h"].clone().requires_grad_(), x["w"][slice(*rows)].clone().requires_grad_()
        loss = VocabParallelTiedLoss(reduction=reduction, target_grad=True, temperature=2.0)(h, w, x["y"]).sum()
        first = torch.autograd.grad(loss, (h, w), retain_graph=True)
        second = torch.autograd.grad(3 * loss, (h, w))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(3 * a, b, rtol=1e-12, atol=1e-14)
        loss = VocabParallelTiedLoss(reduction=reduction)(h, w, x["y"]).sum()
        grad = torch.autograd.grad(loss, h, create_graph=True)[0]
        assert "no second derivative" in error(RuntimeError, lambda grad=grad: grad.sum().backward())
        frozen = VocabParallelTiedLoss(reduction=reduction)(h.detach(), w, x["y"]).sum()
        assert torch.autograd.grad(frozen, w)[0].shape == w.shape
    with torch.no_grad():
        assert not VocabParallelTiedLoss()(h, w, x["y"]).requires_grad


def check_autocast(rank: int, world: int) -> None:
    x = example(20, 31, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sharded(x["h"], x["w"], x["y"], seed="autocast")
        want = tiedkl.fused_tied_loss(x["h"], x["w"], x["y"], impl="torch")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def error(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The text of the error that `call` raises; the same on every rank."""
    try:
        call()
    except kind as e:
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, f"{type(e).__name__}: {e}")
        assert len(set(texts)) == 1, texts
        return str(e)
    raise AssertionError(f"no {kind.__name__}")


def check_errors_are_everybodys(rank: int, world: int) -> None:
    x = example(6, 4 * world, 3, torch.float32)
    h, w, y = x["h"], x["w"][4 * rank : 4 * rank + 4], x["y"]
    last = rank == world - 1
    tests: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, f"is {4 * world}, outside [0, {4 * world})", lambda: loss()(h, w, y.clamp(min=4 * world))),
        (ValueError, "is -3, outside", lambda: loss()(h, w, y.clamp(max=-3))),
        (ValueError, f"rank {world - 1}", lambda: seq()(h, w, y.clamp(min=99) if last else y)),
        (
            ValueError,
            "reduction is 'mean' on rank 0, 'sum'",
            lambda: loss(reduction="sum" if last else "mean")(h, w, y),
        ),
        (ValueError, "the checksum of target", lambda: loss()(h, w, y.roll(rank))),
        (ValueError, "target.shape is (6,) on rank 0", lambda: loss()(h[last:], w, y[last:])),
        (ValueError, "the checksum of input", lambda: loss(check=True)(h + rank, w, y)),
        (ValueError, "bias is", lambda: loss()(h, w, y, w[:, 0] if last else None)),
        (ValueError, "the set of gradients wanted", lambda: loss()(h.detach().requires_grad_(last), w, y)),
        (TypeError, f"rank {world - 1} of the group: weight.dtype", lambda: loss()(h, w.double() if last else w, y)),
        (TypeError, "input must be a torch.Tensor, got list", lambda: loss()([1.0], w, y)),
        (ValueError, f"rank {world - 1} of the group: shift=9", lambda: loss()(h, w, y, shift=9 if last else 0)),
        (ValueError, f"shift={9 * world} is outside", lambda: seq()(h, w, y, shift=9 * world)),
        (ValueError, "shift is 1 on rank 0, 2", lambda: seq()(h, w, y, shift=1 + last)),
        (ValueError, "pass targets that are shifted", lambda: seq(reduction="none")(h, w, y, shift=1)),
        (ValueError, "vocabulary is empty", lambda: loss()(h, w[:0], y)),
    ]

    def loss(**options: Any) -> VocabParallelTiedLoss:
        return VocabParallelTiedLoss(**options)

    def seq(**options: Any) -> VocabParallelTiedLoss:
        return VocabParallelTiedLoss(sequence_parallel=True, **options)

    for kind, text, call in tests:
        found = error(kind, call)
        assert text in found, f"{found!r} does not say {text!r}"
    with mock.patch.dict("os.environ", {"TIEDKL_CHECK_TARGETS": "1"}):
        assert "the checksum of input" in error(ValueError, lambda: loss()(h + rank, w, y))
    assert "rank" not in error(TypeError, lambda: loss()([1.0], w, y))  # everybody's own error stays as it is
    assert math.isfinite(loss()(h, w, y))  # and the group is still in step


def check_dtensor(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for v in (4 * world, 2 * world + 1, 5):  # 5 over 4 ranks leaves one of them nothing
        x = example(20, v, 5)
        want = {k: p.clone().requires_grad_() for k, p in x.items() if k != "y"}
        options = {"target_grad": True, "temperature": 2.0}
        one = tiedkl.fused_tied_loss(
            want["h"], want["w"], x["y"], want["b"], target_weight=want["t"], impl="reference", **options
        )
        one.backward()
        for replicated in (False, True):
            w, b, t = (nn.Parameter(distribute_tensor(x[k], mesh, [Shard(0)])) for k in ("w", "b", "t"))
            h, y = x["h"].clone().requires_grad_(), x["y"]
            if replicated:
                h = distribute_tensor(x["h"], mesh, [Replicate()]).requires_grad_()
                y = distribute_tensor(y, mesh, [Replicate()])
            loss = VocabParallelTiedLoss(**options)(h, w, y, b, target_weight=t)
            loss.backward()
            torch.testing.assert_close(loss, one, rtol=1e-12, atol=0)
            for name, p in (("w", w), ("b", b), ("t", t)):
                assert isinstance(p.grad, DTensor)
                assert p.grad.placements == (Shard(0),)
                torch.testing.assert_close(p.grad.full_tensor(), want[name].grad, rtol=1e-11, atol=1e-14)
            d_h = h.grad.full_tensor() if replicated else h.grad
            torch.testing.assert_close(d_h, want["h"].grad, rtol=1e-11, atol=1e-14)
        h = distribute_tensor(x["h"], mesh, [Shard(0)]).requires_grad_()
        y = distribute_tensor(x["y"], mesh, [Shard(0)])
        loss = VocabParallelTiedLoss(sequence_parallel=True, **options)(h, w, y, b, target_weight=t)
        loss.backward()
        torch.testing.assert_close(h.grad.full_tensor(), want["h"].grad, rtol=1e-11, atol=1e-14)
        share = VocabParallelTiedLoss(reduce_input_grad=False, **options)
        h = distribute_tensor(x["h"], mesh, [Replicate()]).requires_grad_()
        share(h, w, x["y"], b, target_weight=t).backward()
        torch.testing.assert_close(h.grad.full_tensor(), want["h"].grad, rtol=1e-11, atol=1e-14)
    wrong = distribute_tensor(x["w"], mesh, [Replicate()])
    assert "placements" in error(ValueError, lambda: VocabParallelTiedLoss()(x["h"], wrong, x["y"]))
    grid = init_device_mesh("cpu", (1, world))
    wrong = distribute_tensor(x["w"], grid, [Replicate(), Shard(0)])
    assert "mesh of 2 dimensions" in error(ValueError, lambda: VocabParallelTiedLoss()(x["h"], wrong, x["y"]))
    text = error(TypeError, lambda: tiedkl.fused_tied_loss(x["h"], w, x["y"]))
    assert "VocabParallelTiedLoss" in text
    assert "fully_shard" in text


class Tied(nn.Module):
    """Embedding, one layer, the same matrix as head; the loss is part of forward when targets are given."""

    def __init__(self, vocab: int = 23, width: int = 6):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width, dtype=torch.float64)
        self.layer = nn.Linear(width, width, dtype=torch.float64)
        self.loss_fn = tiedkl.FusedTiedLoss(target_grad=True)

    def forward(self, ids: Tensor, targets: Tensor | None = None, num_items: float | None = None) -> Tensor:
        h = torch.tanh(self.layer(self.embedding(ids)))
        return h if targets is None else self.loss_fn(h, self.embedding.weight, targets, num_items=num_items)


def data_parallel(world: int) -> tuple[Tied, Tensor, Tensor, dict[str, Tensor]]:
    """A model, tokens and targets of every rank, and the gradients of the mean over all of them in one process."""
    torch.manual_seed(0)
    model = Tied()
    ids = torch.randint(23, (world, 2, 7))
    targets = ids.roll(-1, -1)
    targets[0, 0, :4] = -100  # ranks count different numbers of tokens
    model(ids, targets).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return model, ids, targets, grads


def check_ddp(rank: int, world: int) -> None:
    model, ids, targets, want = data_parallel(world)
    num_items = float((targets != -100).sum()) / world  # DDP takes the mean over ranks
    for inside in (True, False):
        model.zero_grad()
        ddp = DistributedDataParallel(model)
        if inside:
            ddp(ids[rank], targets[rank], num_items).backward()
        else:
            h = ddp(ids[rank])
            model.loss_fn(h, model.embedding.weight, targets[rank], num_items=num_items).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, want[name], rtol=1e-11, atol=1e-14)


def check_fsdp2(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for layers in (False, True):
        model, ids, targets, want = data_parallel(world)
        if layers:
            fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(ids[rank], targets[rank], float((targets != -100).sum()) / world).backward()
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.grad.full_tensor(), want[name], rtol=1e-11, atol=1e-14)
    model.reshard()
    h = torch.zeros(2, 7, 6, dtype=torch.float64)
    assert "inside the forward" in error(TypeError, lambda: model.loss_fn(h, model.embedding.weight, targets[rank]))
    model = data_parallel(world)[0]
    fully_shard(model.embedding, mesh=mesh)  # sharded again before the loss needs it
    fully_shard(model, mesh=mesh)
    assert "inside the forward" in error(TypeError, lambda: model(ids[rank], targets[rank]))


@contextmanager
def counted() -> Iterator[list[Collective]]:
    """What torch.distributed is asked to do meanwhile, counted from the tensors themselves."""
    calls: list[Collective] = []
    world = dist.get_world_size()

    def watch(op: str, whole: Callable[..., Tensor], inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            x = whole(*args)
            calls.append(Collective("", op, x.numel() * x.element_size(), world))
            return inner(*args, **kwargs)

        return outer

    from tiedkl.distributed import collectives as c

    with (
        mock.patch.object(dist, "all_reduce", watch("all_reduce", lambda x, *_: x, dist.all_reduce)),
        mock.patch.object(c, "_all_gather", watch("all_gather", lambda out, x: out, c._all_gather)),
        mock.patch.object(c, "_reduce_scatter", watch("reduce_scatter", lambda out, x: x, c._reduce_scatter)),
        mock.patch.object(dist, "all_gather_object", side_effect=AssertionError("objects are sent")),
        mock.patch.object(dist, "broadcast", side_effect=AssertionError("not counted")),
        mock.patch.object(dist, "barrier", side_effect=AssertionError("not counted")),
    ):
        yield calls


def check_traffic_is_what_the_formula_says(rank: int, world: int) -> None:
    n, d = 24, 5
    for dtype in (torch.float32, torch.bfloat16)[: 4 // world]:
        x = example(n, 31, d, dtype)
        rows = slice(*cuts(31, world, "traffic")[rank : rank + 2])
        valid = int((x["y"] != -100).sum())
        distinct = len(x["y"][x["y"] != -100].unique())
        for i, options in enumerate(OPTIONS):
            for sequence in (False, True):
                for grad in (True, False):
                    part = slice(*cuts(n, world, f"{i}")[rank : rank + 2]) if sequence else slice(None)
                    sizes = [b - a for a, b in zip(*[cuts(n, world, f"{i}")[k:] for k in (0, 1)], strict=False)]
                    weight = torch.ones(n)[part] if i % 2 else None
                    t = x["t"][rows] if i % 3 == 0 else None
                    h, w = x["h"][part].requires_grad_(grad), x["w"][rows].requires_grad_(grad)
                    loss_fn = VocabParallelTiedLoss(sequence_parallel=sequence, **options)
                    with counted() as calls:
                        loss = loss_fn(h, w, x["y"][part], token_weight=weight, target_weight=t)
                        if grad:
                            loss.sum().backward()
                    want = traffic(
                        n,
                        d,
                        distinct,
                        world,
                        dtype=dtype,
                        valid=valid,
                        teacher_width=d + 3 if i % 3 == 0 else None,
                        kl=options.get("alpha") != 0,
                        label_smoothing="label_smoothing" in options,
                        target_grad="target_grad" in options,
                        token_weight=0 if weight is None else 4,
                        per_token=options.get("reduction") == "none",
                        backward=grad,
                        sequence_parallel=sequence,
                        longest=max(sizes) if sequence else None,
                    )
                    assert [c[1:] for c in calls] == [c[1:] for c in want], (options, sequence, grad, calls, want)


class Largest(TorchDispatchMode):
    """The largest tensor made, in bytes, but for the shapes of gradients."""

    def __init__(self, *but: torch.Size):
        super().__init__()
        self.but, self.bytes = but, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.shape not in self.but:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


def check_no_tensor_is_larger_than_the_budget(rank: int, world: int) -> None:
    n, v, d = 200, 4000, 8
    x = example(n, v * world, d, torch.float32)
    for budget in (1 << 18, 1 << 19):
        h, w = x["h"].requires_grad_(), x["w"][rank * v : rank * v + v].requires_grad_()
        with Largest(h.shape, w.shape) as found:
            VocabParallelTiedLoss(workspace_bytes=budget)(h, w, x["y"]).backward()
        assert 0 < found.bytes <= budget < n * v * 4


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=40))
    results = {}
    wanted = sys.argv[4:] or [name for name in globals() if name.startswith("check_")]
    for name in wanted:
        start = time.perf_counter()
        try:
            globals()[name](rank, world)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name} {time.perf_counter() - start:.1f} s {results[name]}", flush=True)  # noqa: T201
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
