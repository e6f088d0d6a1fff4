"""The training of `tiedkl compare` on a GPU: a step as a CUDA graph is the step without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tiedkl.compare import lstm
from tiedkl.compare.settings import VARIANTS, Settings
from tiedkl.compare.training import Data, Trainer

STEPS, BATCH, BPTT, WORDS = 7, 4, 6, 60
DEVICE = torch.device("cuda")
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"model": "lstm", "hidden": 32, "layers": 2},
    "transformer": {"model": "transformer", "hidden": 32, "layers": 2},
}


def trainer(model: str, variant: str, **more: Any) -> Trainer:
    settings = Settings(batch=BATCH, bptt=BPTT, dropout=0.3, epochs=2, **MODELS[model], **more).resolved(1000)
    g = torch.Generator().manual_seed(0)
    last = (STEPS - 1) * BPTT + 2  # the last window is a short one
    split = tuple(torch.randint(WORDS, (last, BATCH), generator=g).to(DEVICE) for _ in range(2))
    return Trainer(VARIANTS[variant], settings, Data(WORDS, split, split, split), DEVICE)  # type: ignore[arg-type]


@pytest.mark.parametrize("target_grad", [False, True])
@pytest.mark.parametrize("variant", ["al", "real"])
@pytest.mark.parametrize("model", MODELS)
def test_a_captured_step_is_the_step(
    model: str, variant: str, target_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs, dropout masks included; and interrupted, in a new trainer."""
    captured = trainer(model, variant, target_grad=target_grad)
    events = captured.run()
    for _ in range(STEPS + 4):
        next(events)
    assert captured.captured is not None
    resumed = trainer(model, variant, target_grad=target_grad)
    resumed.load_state_dict(copy.deepcopy(captured.state_dict()))
    for each in (events, resumed.run()):
        assert list(each)[-1] == "done"
    monkeypatch.setattr(Trainer, "_capturable", lambda self, call: False)
    plain = trainer(model, variant, target_grad=target_grad)
    assert list(plain.run())[-1] == "done"
    assert plain.captured is None
    for other in (captured, resumed):
        for a, b in zip(other.curves, plain.curves, strict=True):
            assert a["train_ce"] == pytest.approx(b["train_ce"], rel=1e-4)
            assert a["valid_ppl"] == pytest.approx(b["valid_ppl"], rel=1e-4)
        for p, q in zip(other.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_lstm_with_kernels_is_that_without(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and every gradient."""
    torch.manual_seed(0)
    net = lstm.VariationalLSTM(200, 2, dropout).to(DEVICE)
    for p in net.parameters():
        torch.nn.init.uniform_(p, -0.1, 0.1)
    x = torch.randn(BPTT, BATCH, 200, device=DEVICE, requires_grad=True)

    def run() -> list[torch.Tensor]:
        out, carried = net(x, net.start(BATCH), torch.Generator(DEVICE).manual_seed(1))
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *net.parameters()])
        return [out.detach(), *(t for pair in carried for t in pair), *grads]

    with_kernels = run()
    assert lstm._kernels(x.device, x.dtype) is not None
    monkeypatch.setattr(lstm, "_kernels", lambda device, dtype: None)
    for got, want in zip(with_kernels, run(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().amax()))
