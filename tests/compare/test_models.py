"""The LSTM and its masks, the Transformer, and what the four variants share and do not share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiedkl.compare import VARIANTS, CompareError, Settings
from tiedkl.compare.lstm import VariationalLSTM
from tiedkl.compare.memory import loss_memory
from tiedkl.compare.models import LanguageModel, VariantLoss
from tiedkl.compare.transformer import Transformer, head_count

N_VOCAB = 30


def settings(**changes: Any) -> dict[str, Any]:
    return Settings(**{"hidden": 8, "batch": 3, "bptt": 5, "impl": "reference", **changes}).resolved(1000)


def lstm(dropout: float, seed: int = 0) -> VariationalLSTM:
    torch.manual_seed(seed)
    net = VariationalLSTM(6, 2, dropout).double()
    for p in net.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5)
    return net


def unrolled(net: VariationalLSTM, x: Tensor, state: Any, masks: list[Tensor | None]) -> Tensor:
    """The textbook LSTM with a mask on the input and on each hidden state, recorded by autograd step by step."""
    ones = [torch.ones_like(x[0]) if m is None else m for m in masks]
    x = x * ones[0]
    for w_x, w_h, b, mask, (h, c) in zip(net.w_x, net.w_h, net.b, ones[1:], state, strict=True):
        steps = []
        for x_t in x:
            o, i, f, g = (x_t @ w_x.T + (h * mask) @ w_h.T + b).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h * mask)
        x = torch.stack(steps)
    return x


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lstm_matches_the_unrolled_network(dropout: float) -> None:
    net = lstm(dropout)
    x = torch.randn(7, 3, 6, dtype=torch.float64, requires_grad=True)
    state = [(torch.randn(3, 6).double(), torch.randn(3, 6).double()) for _ in range(2)]
    upstream = torch.randn(7, 3, 6, dtype=torch.float64)
    inputs = [x, *net.parameters()]
    out, carried = net(x, state, torch.Generator().manual_seed(5))
    masks = net.masks(3, torch.Generator().manual_seed(5))
    expected = unrolled(net, x, state, masks)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    grads = torch.autograd.grad(out, inputs, upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)
    assert not any(t.requires_grad for pair in carried for t in pair)


def test_lstm_state_carries_over_windows() -> None:
    net = lstm(0.0).eval()
    x, generator = torch.randn(8, 3, 6).double(), torch.Generator()
    whole, _ = net(x, net.start(3), generator)
    first, state = net(x[:5], net.start(3), generator)
    second, _ = net(x[5:], state, generator)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-14)


def test_masks_are_constant_over_time_and_differ_between_sequences() -> None:
    net = lstm(0.5)
    net_out, _ = net(torch.randn(9, 20, 6).double(), net.start(20), torch.Generator().manual_seed(1))
    dropped = net_out == 0  # (T, B, H): exact zeros come from the mask of the top layer
    assert 0.3 < dropped.double().mean() < 0.7
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert len({tuple(row.tolist()) for row in dropped[0]}) > 10
    masks = net.masks(20, torch.Generator().manual_seed(1))
    assert {v for m in masks if m is not None for v in m.unique().tolist()} == {0.0, 2.0}
    assert len(masks) == 3
    assert masks[1] is not None
    assert masks[2] is not None
    assert not torch.equal(masks[1], masks[2])


def test_evaluation_draws_no_mask() -> None:
    net = lstm(0.5).eval()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    out, _ = net(torch.randn(4, 3, 6).double(), net.start(3), generator)
    assert torch.equal(generator.get_state(), before)
    assert not (out == 0).any()


def test_transformer_is_causal() -> None:
    model = LanguageModel(N_VOCAB, settings(model="transformer"), tied=True).eval()
    tokens = torch.randint(N_VOCAB, (5, 3))
    changed = tokens.clone()
    changed[3:] = (changed[3:] + 1) % N_VOCAB
    (a, _), (b, _) = (model(t, [], torch.Generator()) for t in (tokens, changed))
    torch.testing.assert_close(a[:3], b[:3])
    assert not torch.allclose(a[3:], b[3:])


def test_transformer_dropout_only_in_training() -> None:
    net = Transformer(8, 1, 0.5, 5)
    x = torch.randn(5, 3, 8)
    runs = [net(x, [], torch.Generator().manual_seed(k))[0] for k in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    net.eval()
    assert torch.equal(net(x, [], torch.Generator())[0], net(x, [], torch.Generator())[0])


@pytest.mark.parametrize(("width", "heads"), [(200, 5), (64, 2), (16, 1), (37, 1)])
def test_head_count(width: int, heads: int) -> None:
    assert head_count(width) == heads


@pytest.mark.parametrize("tied_bias", [True, False])
def test_tied_variants_have_one_matrix(tied_bias: bool) -> None:
    s = settings(tied_bias=tied_bias)
    count = {
        name: sum(p.numel() for p in LanguageModel(N_VOCAB, s, tied=v.tied).parameters())
        for name, v in VARIANTS.items()
    }
    body = 2 * (2 * 32 * 8 + 32)
    assert count["re"] == count["real"] == count["re-ls"] == N_VOCAB * 8 + tied_bias * N_VOCAB + body
    assert count["baseline"] == count["al"] == count["ls"] == 2 * N_VOCAB * 8 + N_VOCAB + body
    tied, untied = (LanguageModel(N_VOCAB, s, tied=t) for t in (True, False))
    assert tied.weight is tied.embedding.weight
    assert (tied.bias is not None) == tied_bias
    assert untied.weight is not untied.embedding.weight
    assert untied.bias is not None


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_variants_start_from_the_same_parameters(kind: str) -> None:
    tied, untied = (
        dict(LanguageModel(N_VOCAB, settings(model=kind), tied=t).named_parameters()) for t in (True, False)
    )
    assert set(untied) - set(tied) == {"output.weight"}
    for name, p in tied.items():
        assert torch.equal(p, untied[name]), name
    other = dict(LanguageModel(N_VOCAB, settings(model=kind, seed=2), tied=True).named_parameters())
    assert not torch.equal(other["embedding.weight"], tied["embedding.weight"])


@pytest.mark.parametrize("target_grad", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_of_each_variant(name: str, target_grad: bool) -> None:
    """Against the paper's formula; the target distribution comes from the input embedding and, unless `target_grad`
    lets the gradient through, is a constant.

    Label smoothing is in what is trained on, not in what is judged by.
    """
    variant = VARIANTS[name]
    s = settings(temperature=3.0, gamma=0.7, label_smoothing=0.3, target_grad=target_grad)
    model = LanguageModel(N_VOCAB, s, tied=variant.tied).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    hidden = torch.randn(4, 3, 8, dtype=torch.float64)
    target = torch.randint(N_VOCAB, (4, 3))
    target[3, 2] = -100
    out = VariantLoss(variant, s)(model, hidden, target)
    grads = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)

    keep = target >= 0
    h, y, table = hidden[keep], target[keep], model.embedding.weight
    z = F.linear(h, model.weight, model.bias)
    ce, smoothed = (F.cross_entropy(z, y, reduction="sum", label_smoothing=e) for e in (0.0, 0.3))
    metric = table if target_grad else table.detach()
    q = F.softmax(metric[y] @ metric.T / 3.0, -1)
    kl = F.kl_div(F.log_softmax(z / 3.0, -1), q, reduction="sum")
    trained = smoothed if variant.smoothed else ce
    expected = trained + (2.1 * kl if variant.augmented else 0.0)
    assert float(out.ce) == pytest.approx(float(trained.detach()), rel=1e-9)
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want)
    plain = VariantLoss(variant, s).cross_entropy(model, hidden, target)
    assert float(plain.detach()) == pytest.approx(float(ce.detach()), rel=1e-9)
    by_token = VariantLoss(variant, s).token_cross_entropy(model, hidden, target)
    assert float(by_token.detach().sum()) == pytest.approx(float(ce.detach()), rel=1e-9)


@pytest.mark.parametrize("name", ["al", "real"])
def test_the_layer_hands_back_the_gradient_of_its_targets(name: str) -> None:
    """Where the embedding is the output matrix too, that is one gradient."""
    variant, found = VARIANTS[name], []
    for target_grad in (False, True):
        s = settings(target_grad=target_grad, impl="torch")
        model = LanguageModel(N_VOCAB, s, tied=variant.tied)
        found.append(loss_memory(model, VariantLoss(variant, s), 15))
    assert found[1]["gradient_bytes"] - found[0]["gradient_bytes"] == (0 if variant.tied else 4 * N_VOCAB * 8)
    assert found[1]["scratch_bytes"] > found[0]["scratch_bytes"]


def test_the_embedding_has_a_range_of_its_own() -> None:
    """The same draws, further out; where it is the output matrix too, that is."""
    for tied in (False, True):
        near = LanguageModel(N_VOCAB, settings(), tied=tied)
        far = LanguageModel(N_VOCAB, settings(embedding_range=1.0), tied=tied)
        torch.testing.assert_close(far.embedding.weight, 10 * near.embedding.weight)
        for (name, a), b in zip(far.body.named_parameters(), near.body.parameters(), strict=True):
            assert torch.equal(a, b), name
        if not tied:
            assert torch.equal(far.weight, near.weight)
    with pytest.raises(CompareError, match="only an lstm has it"):
        settings(model="transformer", embedding_range=1.0)
