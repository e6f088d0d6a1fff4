"""torch.compile, torch.export, torch.func and activation checkpointing, around a module with a tied matrix."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import tiedkl

V, D = 13, 6
REDUCTIONS = ("mean", "sum", "none")


class Model(nn.Module):
    """One Parameter is embedding, classifier and similarity source."""

    def __init__(self, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.loss_fn = tiedkl.FusedTiedLoss(**{"temperature": 5.0, "alpha": 3.0, **options})

    def forward(self, ids: Tensor, num_items: Any = None, token_weight: Tensor | None = None) -> Any:
        hidden = torch.tanh(self.mix(self.embedding(ids)))
        weight = self.embedding.weight
        return self.loss_fn(hidden, weight, ids, shift=1, num_items=num_items, token_weight=token_weight)


class Plain(Model):
    """With one argument, as exporting is simplest."""

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids)


def ids_of(batch: int, length: int) -> Tensor:
    ids = torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    ids[0, -1] = V - 1
    return ids


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def train(model: nn.Module, run: Callable[..., Any], sizes: list[tuple[int, int]], **kwargs: Any) -> list[Tensor]:
    """The losses of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for i, size in enumerate(sizes):
        optimizer.zero_grad()
        out = run(ids_of(*size), **{name: make(i, size) for name, make in kwargs.items()})
        loss = out[0] if isinstance(out, tuple) else out
        losses.append(loss.detach())
        (loss * torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)).sum().backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"target_grad": True, "return_terms": True, "softcap": 3.0}])
def test_training_steps_compile_twice_for_any_length(reduction: str, options: dict[str, Any]) -> None:
    sizes = [(4, 9), (4, 9), (6, 13), (3, 5), (5, 21), (2, 30)]
    eager, model = Model(reduction=reduction, **options), Model(reduction=reduction, **options)
    run, counter = compiled(model)
    got, want = train(model, run, sizes), train(eager, eager, sizes)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2  # the first size, and any size


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_items": lambda i, size: torch.tensor(30.5 + i)},
        {"num_items": lambda i, size: 30 + i},
        {"token_weight": lambda i, size: torch.linspace(0.1, i + 1, size[0] * size[1]).reshape(size)},
    ],
    ids=["num_items tensor", "num_items int", "token_weight"],
)
def test_weights_and_counts_that_change_with_every_step(kwargs: dict[str, Any]) -> None:
    sizes = [(4, 9), (6, 13), (3, 5), (5, 21)]
    eager, model = Model(), Model()
    run, counter = compiled(model)
    got, want = train(model, run, sizes, **kwargs), train(eager, eager, sizes, **kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_compiled_under_autocast() -> None:
    model, ids = Model(), ids_of(4, 9)
    run, _ = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(ids), run(ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    leaves = list(model.parameters())
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


def export(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    any_size = ({0: torch.export.Dim("B", max=512), 1: torch.export.Dim("T", min=3, max=4096)},)
    return torch.export.export(model, (ids_of(3, 8),), dynamic_shapes=any_size, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_export_keeps_the_loss_and_its_gradients(reduction: str, strict: bool) -> None:
    model, ids = Plain(reduction=reduction), ids_of(2, 11)
    program = export(model, strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module(), program.run_decompositions().module()):
        assert torch.equal(exported(ids), model(ids))
    exported = program.module()
    exported(ids).sum().backward()
    model(ids).sum().backward()
    got = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name].grad, p.grad, rtol=1e-6, atol=1e-8)


def test_a_program_exported_without_gradients_says_so() -> None:
    model = Plain()
    with torch.no_grad():
        program = export(model)
        assert torch.equal(program.module()(ids_of(2, 5)), model(ids_of(2, 5)))
    with pytest.raises(RuntimeError, match="traced where no gradient was wanted"):
        program.module()(ids_of(2, 5)).backward()


# ---- torch.func


def tensors(batch: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    front = () if batch is None else (batch,)
    h, w = torch.randn(*front, 7, D, generator=g), torch.randn(V, D, generator=g)
    y = torch.randint(V, (*front, 7), generator=g)
    y[..., 2] = -100
    return h.double(), w.double(), y


def loss(h: Tensor, w: Tensor, y: Tensor, **options: Any) -> Any:
    return tiedkl.fused_tied_loss(h, w, y, **{"temperature": 5.0, "alpha": 3.0, **options})


def autograd(h: Tensor, w: Tensor, y: Tensor, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    return torch.autograd.grad(loss(h, w, y, **options), (h, w), upstream)


@pytest.mark.parametrize("target_grad", [False, True])
def test_func_grad_and_vjp(target_grad: bool) -> None:
    h, w, y = tensors()
    want = autograd(h, w, y, target_grad=target_grad)
    got = grad(lambda h, w: loss(h, w, y, target_grad=target_grad), (0, 1))(h, w)
    upstream = torch.linspace(0.5, 2, 7).double()
    pulled = vjp(lambda h, w: loss(h, w, y, reduction="none", target_grad=target_grad), h, w)[1](upstream)
    pulled_want = autograd(h, w, y, upstream, reduction="none", target_grad=target_grad)
    for a, b in zip((*got, *pulled), (*want, *pulled_want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    d_h, (value, terms) = grad_and_value(
        lambda h: (lambda o: (o.loss, o))(loss(h, w, y, return_terms=True)), has_aux=True
    )(h)
    torch.testing.assert_close(d_h, autograd(h, w, y)[0])
    torch.testing.assert_close(value, terms.ce + 3.0 * terms.kl)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_per_sample_losses_and_gradients(reduction: str) -> None:
    h, w, y = tensors(batch=4)

    def total(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return loss(h, w, y, reduction=reduction).sum()

    torch.testing.assert_close(
        vmap(loss, (0, None, 0))(h, w, y), torch.stack([loss(a, w, b) for a, b in zip(h, y, strict=True)])
    )
    got = vmap(grad(total, (0, 1)), (0, None, 0))(h, w, y)
    upstream = torch.ones(7).double() if reduction == "none" else None
    want = [autograd(a, w, b, upstream, reduction=reduction) for a, b in zip(h, y, strict=True)]
    summed = grad(lambda h, w: vmap(total, (0, None, 0))(h, w, y).sum(), (0, 1))(h, w)
    for i in range(2):
        each = torch.stack([pair[i] for pair in want])
        torch.testing.assert_close(got[i], each, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(summed[i], each if i == 0 else each.sum(0), rtol=1e-12, atol=1e-15)
    h.requires_grad_()
    vmap(total, (0, None, 0))(h, w, y).sum().backward()
    torch.testing.assert_close(h.grad, summed[0], rtol=1e-12, atol=1e-15)


def test_jacrev_and_a_batch_of_upstream_gradients() -> None:
    h, w, y = tensors()
    got = jacrev(lambda h: loss(h, w, y, reduction="none"))(h)
    want = torch.stack([autograd(h, w, y, e, reduction="none")[0] for e in torch.eye(7).double()])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    h.requires_grad_()
    value = loss(h, w, y)
    many = vmap(lambda g: torch.autograd.grad(value, h, g)[0])(torch.tensor([1.0, -2.0]).double())
    d_h = autograd(h, w, y)[0]
    torch.testing.assert_close(many, torch.stack([d_h, -2 * d_h]), rtol=1e-12, atol=1e-15)


def test_functional_call() -> None:
    model, ids = Model(), ids_of(3, 8)
    params = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    got = grad(lambda p: functional_call(model, p, (ids,)))(params)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model(ids).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-6, atol=1e-8)


def test_what_torch_func_cannot_have_says_so() -> None:
    h, w, y = tensors()
    with pytest.raises(RuntimeError, match="FusedTiedLoss has no forward-mode derivative"):
        jvp(lambda h: loss(h, w, y), (h,), (h,))
    with pytest.raises(RuntimeError, match="FusedTiedLoss has no forward-mode derivative"):
        hessian(lambda h: loss(h, w, y))(h)
    with pytest.raises(RuntimeError, match="FusedTiedLoss has no second derivative"):
        grad(lambda h: grad(lambda h: loss(h, w, y))(h).square().sum())(h)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, h)
        with pytest.raises(RuntimeError, match="FusedTiedLoss has no forward-mode derivative"):
            loss(dual, w, y)


def test_compile_leaves_torch_func_to_eager() -> None:
    h, w, y = tensors(batch=3)
    per_sample = vmap(grad(loss), (0, None, 0))
    torch._dynamo.reset()
    got = torch.compile(per_sample, backend="aot_eager")(h, w, y)
    torch.testing.assert_close(got, per_sample(h, w, y), rtol=1e-12, atol=1e-15)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot trace FusedTiedLoss under torch\.func"):
        torch.compile(per_sample, backend="aot_eager", fullgraph=True)(h, w, y)


# ---- activation checkpointing


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, reduction: str) -> None:
    model, ids = Model(reduction=reduction), ids_of(3, 8)

    def rest(x: Tensor) -> Tensor:
        return model.loss_fn(torch.tanh(model.mix(x)), model.embedding.weight, ids, shift=1)

    leaves = list(model.parameters())
    got, want = checkpoint(rest, model.embedding(ids), use_reentrant=use_reentrant), model(ids)
    upstream = torch.linspace(0.5, 2, want.numel()).reshape(want.shape)
    assert torch.equal(got, want)
    got.backward(upstream)
    for p, d in zip(leaves, torch.autograd.grad(want, leaves, upstream), strict=True):
        assert torch.equal(p.grad, d)
