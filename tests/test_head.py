"""tiedkl/head.py and tiedkl/resize.py: tying wholly or in part, against a dense formula; what a resize keeps."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiedkl
from tiedkl import TiedHead

V, D, H, N = 17, 6, 9, 23
CLASSES = torch.tensor([0, 2, 1, 1, 2, 0, 0, 3, 1, 2, 2, 3, 0, 1, 3, 1, 0])
TAU, ALPHA = 5.0, 3.0

CASES: list[dict[str, Any]] = [
    {},
    {"bias": "token"},
    {"bias": CLASSES},
    {"hidden_size": H},
    {"hidden_size": D},
    {"shared_dims": 4},
    {"shared_dims": 0},
    {"shared_dims": D},
    {"scale": D**-0.5},
    {"padding_idx": 3},
    {"shared_dims": 2, "padding_idx": 3},
    {"bias": "token", "hidden_size": H, "shared_dims": 4, "scale": 0.3, "padding_idx": 0},
    {"bias": CLASSES.int(), "hidden_size": H, "shared_dims": 5, "scale": 2.0, "padding_idx": V - 1},
    {"bias": CLASSES, "hidden_size": 3, "scale": -0.5},
]


def make(dtype: torch.dtype = torch.float64, **options: Any) -> TiedHead:
    torch.manual_seed(0)
    head = TiedHead(V, D, dtype=dtype, **options)
    if head.bias is not None:
        nn.init.normal_(head.bias)  # zeros would hide a bias that is left out
    return head


def data(head: TiedHead) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N,), all of the vocabulary among them; targets (N,), some ignored; a map from embedding to hidden width."""
    g = torch.Generator().manual_seed(1)
    ids = torch.arange(N) % V
    y = torch.randint(V, (N,), generator=g)
    y[::5] = -100
    return ids, y, torch.randn(D, head.hidden_size, dtype=torch.float64, generator=g)


def dense(head: TiedHead, p: dict[str, Tensor], target_grad: bool, alpha: float = ALPHA) -> Tensor:
    """The mean loss by matrices and one-hot vectors alone, of the head's own input embeddings."""
    ids, y, mix = data(head)
    k = head.shared_dims
    empty = torch.zeros(V, 0, dtype=torch.float64)
    into, out = (torch.cat([p["weight"], p.get(name, empty)], 1) for name in ("input_rest", "output_rest"))
    assert into.shape == out.shape == (V, D)
    assert p["weight"].shape == (V, k)
    eye = torch.eye(V, dtype=torch.float64)
    looked_up = into
    if head.padding_idx is not None:
        pad = eye[:, head.padding_idx, None]
        looked_up = into * (1 - pad) + into.detach() * pad
    hidden = torch.tanh(eye[ids] @ looked_up @ mix)
    if "projection.weight" in p:
        hidden = hidden @ p["projection.weight"].T
    z = head.scale * (hidden @ out.T)
    if "bias" in p:
        spread = eye if head.token_class is None else torch.eye(4, dtype=torch.float64)[CLASSES.long()]
        z = z + spread @ p["bias"]
    valid = y >= 0
    z, y = z[valid], y[valid]
    s = eye[y] @ into @ into.T / TAU
    q = torch.exp(s) / torch.exp(s).sum(-1, keepdim=True)
    q = q if target_grad else q.detach()
    log_p, log_r = (x - torch.log(torch.exp(x).sum(-1, keepdim=True)) for x in (z, z / TAU))
    return ((q * (torch.log(q) - log_r)).sum(-1) * alpha - (eye[y] * log_p).sum(-1)).mean()


def fused(head: TiedHead, loss_fn: nn.Module, **kwargs: Any) -> Tensor:
    return step(head, loss_fn, *data(head), **kwargs)


def step(head: TiedHead, loss_fn: nn.Module, ids: Tensor, y: Tensor, mix: Tensor, **kwargs: Any) -> Tensor:
    return head.loss(torch.tanh(head.embed(ids) @ mix.to(head.weight.dtype)), y, loss_fn, **kwargs)


@pytest.mark.parametrize("target_grad", [False, True])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(o) or "plain")
def test_loss_and_gradients_are_the_dense_formulas(options: dict[str, Any], target_grad: bool) -> None:
    head = make(**options)
    got = fused(head, tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA, target_grad=target_grad))
    leaves = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    want = dense(head, leaves, target_grad)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    got.backward()
    for (name, leaf), d in zip(leaves.items(), torch.autograd.grad(want, list(leaves.values())), strict=True):
        torch.testing.assert_close(head.get_parameter(name).grad, d, rtol=1e-9, atol=1e-12, msg=name)
        assert leaf.numel() == 0 or d.abs().max() > 0


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(o) or "plain")
def test_cross_entropy_of_the_logits_is_the_loss_without_kl(options: dict[str, Any]) -> None:
    head = make(**options)
    ids, y, mix = data(head)
    hidden = torch.tanh(head.embed(ids) @ mix)
    want = nn.functional.cross_entropy(head.logits(hidden), y)
    got = head(hidden, y, tiedkl.FusedTiedLoss(alpha=0))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    assert head.logits(hidden.reshape(N, 1, -1)).shape == (N, 1, V)
    assert head.embed(ids.int().reshape(1, N)).shape == (1, N, D)


def test_one_parameter_is_both_matrices() -> None:
    head = make()
    assert head.input_matrix() is head.output_matrix() is head.weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    part = make(shared_dims=4)
    assert torch.equal(part.input_matrix()[:, :4], part.output_matrix()[:, :4])
    assert not torch.equal(part.input_matrix()[:, 4:], part.output_matrix()[:, 4:])


def test_another_similarity_source_and_other_arguments_are_passed_on() -> None:
    head = make(shared_dims=4)
    ids, y, mix = data(head)
    hidden, source, weights = head.embed(ids) @ mix, torch.randn(V, 3, dtype=torch.float64), torch.rand(N)
    loss_fn = tiedkl.FusedTiedLoss(return_terms=True)
    got = head.loss(hidden, y, loss_fn, target_weight=source, token_weight=weights, num_items=7, shift=2)
    want = loss_fn(hidden, head.output_matrix(), y, target_weight=source, token_weight=weights, num_items=7, shift=2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got.kl != head.loss(hidden, y, loss_fn, token_weight=weights, num_items=7, shift=2).kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    head = make(dtype, bias=CLASSES, hidden_size=H, shared_dims=4, scale=0.4)
    assert {p.dtype for p in head.parameters()} == {dtype}
    loss = fused(head, tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    want = dense(head, {name: p.detach().double() for name, p in head.named_parameters()}, False)
    # Hidden states are rounded to the dtype on their way; the loss itself is checked tightly elsewhere.
    torch.testing.assert_close(loss.double(), want, rtol=20 * torch.finfo(dtype).eps, atol=0)
    head.resize(V + 2, classes=torch.tensor([1, 4]))
    assert {p.dtype for p in head.parameters()} == {dtype}


def test_starting_values() -> None:
    head = TiedHead(3000, 64, bias="token", shared_dims=32, padding_idx=7)
    for matrix in (head.input_matrix(), head.output_matrix()):
        assert matrix.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert head.bias is not None
    assert not head.bias.any()
    assert not head.input_matrix()[7].any()
    assert head.output_rest[7].any()
    assert repr(head) == "TiedHead(3000, 64, bias='token', shared_dims=32, padding_idx=7)"
    assert "bias=4 classes" in repr(make(bias=CLASSES))


@pytest.mark.parametrize("options", CASES[-3:])
def test_state_dict_and_copies(options: dict[str, Any]) -> None:
    head = make(**options)
    loss_fn = tiedkl.FusedTiedLoss()
    other = TiedHead(V, D, dtype=torch.float64, **options)
    assert not torch.equal(fused(other, loss_fn), fused(head, loss_fn))
    other.load_state_dict(head.state_dict())
    clone = copy.deepcopy(head)
    assert torch.equal(fused(other, loss_fn), fused(head, loss_fn))
    with torch.no_grad():
        clone.weight.add_(1)
    assert not torch.equal(clone.weight, head.weight)
    new_classes = {"classes": torch.tensor([0, 5])} if head.token_class is not None else {}
    head.resize(V + 2, **new_classes)
    bias = options["bias"] if head.token_class is None else head.token_class
    again = TiedHead(V + 2, D, dtype=torch.float64, **{**options, "bias": bias})
    again.load_state_dict(head.state_dict())
    assert torch.equal(fused(again, loss_fn), fused(head, loss_fn))
    head.resize(5 if head.padding_idx in (None, 0) else V)
    bias = options["bias"] if head.token_class is None else head.token_class
    TiedHead(head.vocab_size, D, dtype=torch.float64, **{**options, "bias": bias}).load_state_dict(head.state_dict())


@pytest.mark.parametrize("options", CASES[-3:-1])
def test_compiled_equals_eager_before_and_after_a_resize(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    head, loss_fn = make(**options), tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        leaves = list(head.parameters())
        want, got = fused(head, loss_fn), compiled(head, loss_fn, *data(head))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        if head.vocab_size == V:
            head.resize(V + 2, classes=None if head.token_class is None else torch.tensor([0, 5]))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


def train(head: TiedHead, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = fused(head, tiedkl.FusedTiedLoss(alpha=0, impl="reference"))  # whose exponential does underflow to 0
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("shared_dims", [None, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_the_vocabulary_had_not_changed(name: str, shared_dims: int | None) -> None:
    """New words share the softmax, so they change the gradients of old rows, and the KL's similarities too. Both stay
    the same only where new words have no probability: cross-entropy alone, and a bias of -1e4, whose exponential is 0
    in float64. Then old rows and their optimizer state must move as without the resize, but for the order of sums,
    and new rows, without gradient and with a state of zeros, must not move (AdamW only shrinks them)."""
    head = make(bias="token", shared_dims=shared_dims)
    optimizer = OPTIMIZERS[name](head.parameters())
    train(head, optimizer, 5)
    plain, plain_optimizer = copy.deepcopy((head, optimizer))
    head.resize(V + 4, optimizer)
    with torch.no_grad():
        head.bias[V:] = -1e4
    new = {k: p.detach()[V:].clone() for k, p in head.named_parameters()}
    got, want = train(head, optimizer, 5), train(plain, plain_optimizer, 5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert not torch.equal(plain.weight, make(bias="token", shared_dims=shared_dims).weight)
    for k, p in plain.named_parameters():
        grown = head.get_parameter(k)
        torch.testing.assert_close(grown[:V], p, rtol=1e-10, atol=1e-13)
        if name != "adamw":
            assert torch.equal(grown[V:], new[k])
        for key, value in plain_optimizer.state[p].items():
            state = optimizer.state[grown][key]
            torch.testing.assert_close(state[:V] if state.dim() else state, value, rtol=1e-10, atol=1e-13, msg=key)
            if state.dim():
                assert not state[V:].any()
    head.resize(V, optimizer)
    torch.testing.assert_close(train(head, optimizer, 3), train(plain, plain_optimizer, 3), rtol=1e-12, atol=0)
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-10, atol=1e-13)


def test_resize_keeps_the_optimizer_and_the_graph_of_an_earlier_step_harmless() -> None:
    head = make(bias=CLASSES, hidden_size=H, shared_dims=4, padding_idx=2)
    other = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([{"params": [other, *head.parameters()], "lr": 0.1}], lr=0.2)
    kept_loss = fused(head, tiedkl.FusedTiedLoss())  # its graph holds the old parameters
    kept_loss.backward()
    other.grad = torch.ones(3)
    optimizer.step()
    before = {k: (p.detach().clone(), p.grad.clone()) for k, p in head.named_parameters()}
    head.resize(V + 3, optimizer, classes=torch.tensor([0, 5, 3]))
    [group] = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(other), *map(id, head.parameters())}
    assert set(optimizer.state) == set(group["params"])
    for k, p in head.named_parameters():
        old, grad = before[k]
        assert torch.equal(p[: len(old)], old), k
        assert torch.equal(p.grad[: len(old)], grad), k
        assert not p.grad[len(old) :].any()
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert float(optimizer.state[p]["step"]) == 1
    assert head.bias.shape == (6,)
    optimizer.zero_grad()
    fused(head, tiedkl.FusedTiedLoss()).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert all(optimizer.state[p]["exp_avg_sq"].shape == p.shape for p in head.parameters())


def test_adafactor_keeps_its_factors() -> None:
    head = make()
    optimizer = torch.optim.Adafactor(head.parameters())
    train(head, optimizer, 2)
    state = {k: v.clone() for k, v in optimizer.state[head.weight].items()}
    head.resize(V + 2, optimizer)
    now = optimizer.state[head.weight]
    assert torch.equal(now["row_var"][:V], state["row_var"])
    assert now["row_var"].shape[0] == V + 2
    assert torch.equal(now["col_var"], state["col_var"])
    train(head, optimizer, 1)


def test_new_rows() -> None:
    head = make(bias="token", shared_dims=4, padding_idx=2)
    rest = torch.arange(V) != 2
    head.resize(V + 2)
    for p in head.parameters():
        torch.testing.assert_close(p[V:], p[:V][rest].mean(0).expand_as(p[V:]))
    head.resize(V + 900, init="normal")
    assert head.weight[V + 2 :].std().item() == pytest.approx(D**-0.5, rel=0.1)
    assert not head.bias[V + 2 :].any()
    head.weight.requires_grad_(False)
    head.resize(V)
    assert not head.weight.requires_grad
    assert head.bias.requires_grad
    assert head.weight.shape == (V, 4)


def test_classes_through_a_resize() -> None:
    head = make(bias=CLASSES)
    bias = head.bias.detach().clone()
    head.resize(V + 2, classes=torch.tensor([6, 1]))
    assert torch.equal(head.bias[:4], bias)
    torch.testing.assert_close(head.bias[4:], bias.mean().expand(3))
    assert head.token_class.tolist() == [*CLASSES.tolist(), 6, 1]
    assert torch.equal(head.token_bias()[V:], head.bias[[6, 1]])
    head.resize(7)  # classes 0 to 2 are left
    assert torch.equal(head.bias, bias[:3])
    assert head.token_class.tolist() == CLASSES[:7].tolist()


def snapshot(head: TiedHead, optimizer: torch.optim.Optimizer | None) -> list[Any]:
    state = [] if optimizer is None else [id(p) for g in optimizer.param_groups for p in g["params"]]
    return [*map(id, head.parameters()), *state, head.token_class]


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"new_vocab": 0}, ValueError, "new_vocab=0 is outside [1, inf)"),
        ({}, {"new_vocab": 2.0}, TypeError, "new_vocab must be an int, got float"),
        ({}, {"new_vocab": 20, "init": "zero"}, ValueError, "init='zero' is not one of 'mean', 'normal'"),
        ({}, {"new_vocab": 20, "classes": torch.zeros(3).long()}, ValueError, "classes is for new tokens of a head"),
        ({"padding_idx": 9}, {"new_vocab": 9}, ValueError, "new_vocab=9 cuts off padding_idx=9"),
        ({"bias": CLASSES}, {"new_vocab": 20}, ValueError, "give the classes of the 3 new tokens"),
        (
            {"bias": CLASSES},
            {"new_vocab": 20, "classes": torch.zeros(2).long()},
            ValueError,
            "classes.shape=(2,) does not match (3,)",
        ),
        ({"bias": CLASSES}, {"new_vocab": 20, "classes": [1, 2, 3]}, TypeError, "classes must be an int64 or int32"),
    ],
)
def test_resize_refuses(options: dict[str, Any], arguments: dict[str, Any], error: type, message: str) -> None:
    head = make(**options)
    before = snapshot(head, None)
    with pytest.raises(error, match=re.escape(message)):
        head.resize(**arguments)
    assert snapshot(head, None) == before


def test_resize_refuses_what_it_cannot_align() -> None:
    head = make()
    stranger = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="optimizer holds none of this module's parameters"):
        head.resize(20, stranger)
    optimizer = torch.optim.Adam(head.parameters())
    train(head, optimizer, 1)
    optimizer.state[head.weight]["precondition"] = torch.eye(V, dtype=torch.float64)
    before = snapshot(head, optimizer)
    with pytest.raises(ValueError, match=re.escape("optimizer state 'precondition' of shape (17, 17) has no row")):
        head.resize(20, optimizer)
    assert snapshot(head, optimizer) == before
    assert optimizer.state[head.weight]["exp_avg"].shape == (V, D)
    torch.nn.utils.parametrizations.weight_norm(head, "weight")
    with pytest.raises(RuntimeError, match="weight is a parametrization, not a plain Parameter"):
        head.resize(20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size=0 is outside [1, inf)"),
        ({"width": "6"}, TypeError, "width must be an int, got str"),
        ({"hidden_size": 0}, ValueError, "hidden_size=0 is outside [1, inf)"),
        ({"shared_dims": 7}, ValueError, "shared_dims=7 is outside [0, 6]"),
        ({"shared_dims": True}, TypeError, "shared_dims must be an int, got bool"),
        ({"padding_idx": V}, ValueError, "padding_idx=17 is outside [0, 16]"),
        ({"scale": "D"}, TypeError, "scale must be a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale=nan is not finite"),
        ({"dtype": torch.int64}, TypeError, "dtype=torch.int64 is not a floating dtype"),
        ({"bias": True}, ValueError, "bias=True is not False, 'token', or an integer tensor"),
        ({"bias": "class"}, ValueError, "bias='class' is not False, 'token'"),
        (
            {"bias": CLASSES.float()},
            TypeError,
            "bias must be an int64 or int32 tensor of token classes, got torch.float32",
        ),
        ({"bias": CLASSES[:5]}, ValueError, "bias.shape=(5,) does not match (17,)"),
        ({"bias": CLASSES - 1}, ValueError, "bias holds a negative class: -1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        TiedHead(**{"vocab_size": V, "width": D, **options})


def test_a_hidden_state_of_another_width() -> None:
    head = make(hidden_size=H)
    with pytest.raises(ValueError, match=re.escape("hidden.shape=(4, 6) does not end in hidden_size=9")):
        head.logits(torch.zeros(4, D, dtype=torch.float64))


def test_classes_would_be_lost_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="meta"):
        TiedHead(4, 3, bias=torch.tensor([0, 0, 1, 1]), device="meta")
