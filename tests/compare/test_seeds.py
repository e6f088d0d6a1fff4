"""Several seeds: order, resuming, adding, checkpoints of earlier versions; inference and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiedkl.compare import Interrupted, compare, inference, runner
from tiedkl.compare.store import Store

from .test_resume import killed_after, numbers


def names(out: Path) -> set[str]:
    return {file.stem for file in out.glob("*.pt")}


def test_every_variant_has_a_seed_before_the_next_begins(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def epoch(self: Any, label: str, *_: Any) -> None:
        order.append(label)

    monkeypatch.setattr(runner.Progress, "epoch", epoch)
    compare(toy(epochs=1, seed=4, seeds=2))
    assert order == ["baseline seed 4", "+REAL seed 4", "baseline seed 5", "+REAL seed 5"]
    assert names(tmp_path / "out") == {"baseline", "real", "baseline-5", "real-5"}


def test_killed_in_the_second_seed(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (toy(out=str(tmp_path / n), epochs=1, seeds=2, checkpoint_every=0.0) for n in ("whole", "parts"))
    expected = compare(whole)
    killed_after(monkeypatch, parts, 50)  # an epoch is 19 steps: the third of four runs
    assert names(tmp_path / "parts") == {"baseline", "real", "baseline-2"}
    assert numbers(compare(parts)) == numbers(expected)


def test_stopped_between_seeds_compares_what_all_have(toy: Any) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 55

    with pytest.raises(Interrupted) as stopped:
        compare(toy(epochs=1, seeds=2), should_stop=should_stop)
    variants = stopped.value.report["variants"]
    assert variants["real"]["evidence"]["seeds"] == [1]
    assert {v["status"] for v in variants.values()} == {"partial"}
    assert "with all 2 seeds" in stopped.value.report["verdict"][-1]


def test_seeds_can_be_added_and_are_what_they_would_be_alone(toy: Any, tmp_path: Path) -> None:
    one = compare(toy(epochs=1))
    before = (tmp_path / "out" / "real.pt").stat().st_mtime_ns
    two = compare(toy(epochs=1, seeds=2))
    assert (tmp_path / "out" / "real.pt").stat().st_mtime_ns == before
    alone = compare(toy(epochs=1, seed=2, out=str(tmp_path / "alone")))
    for name in ("baseline", "real"):
        ppl = [run["test_ppl"] for run in two["variants"][name]["runs"]]
        assert ppl == [report["variants"][name]["test_ppl"] for report in (one, alone)]
        assert min(ppl) < two["variants"][name]["test_ppl"] < max(ppl)


def test_test_losses_are_those_of_each_token_in_order(toy: Any, tmp_path: Path) -> None:
    report = compare(toy(epochs=1))
    state = Store(str(tmp_path / "out")).load("real", torch.device("cpu"))
    assert state is not None
    losses = state["test_losses"]
    assert losses.dtype == torch.float32
    assert losses.shape == (report["corpus"]["tokens"]["test"],)
    assert float(losses.double().mean().exp()) == pytest.approx(report["variants"]["real"]["test_ppl"], rel=1e-6)
    settings = toy(epochs=1)
    text = runner._read(settings)(None)
    data = runner.Data.of(text, 4, torch.device("cpu"))
    config = settings.resolved(len(text.train))
    trainer = runner.Trainer(runner.ordered(("real",))[0], config, data, torch.device("cpu"))
    trainer.load_state_dict(state)
    inputs, targets = data.test
    with torch.no_grad():
        hidden, _ = trainer.model.eval()(inputs, trainer.model.body.start(4), trainer.generator)
        logits = hidden @ trainer.model.weight.T + trainer.model.bias
    columns = torch.nn.functional.cross_entropy(logits[:, 1], targets[:, 1], reduction="none")  # the second quarter
    torch.testing.assert_close(losses[len(columns) : 2 * len(columns)], columns)


def test_checkpoint_of_an_earlier_version(toy: Any, tmp_path: Path) -> None:
    """Without per-token losses: the test is repeated, the training is not."""
    expected = compare(toy(epochs=1))
    store = Store(str(tmp_path / "out"))
    state = store.load("real", torch.device("cpu"))
    assert state is not None
    del state["test_losses"]
    seconds = state["trained"]["seconds"]
    store.save("real", state)
    assert numbers(compare(toy(epochs=1))) == numbers(expected)
    state = store.load("real", torch.device("cpu"))
    assert state is not None
    assert state["trained"]["seconds"] == seconds
    assert state["test_losses"] is not None


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_inference_and_cost(toy: Any, model: str) -> None:
    report = compare(toy(epochs=1, model=model, price_per_hour=3.6))
    assert set(report["inference"]) == {"baseline", "real"}
    for name, use in report["inference"].items():
        v = report["variants"][name]
        assert use["parameter_bytes"] == 4 * v["parameters"]
        assert use["ms_per_token"] > 0
        assert use["tokens_per_second"] > 0
        for figure in ("ms_per_token", "tokens_per_second"):
            low, high = use[f"{figure}_quartiles"]
            assert low <= use[figure] <= high
        slowest, fastest = v["tokens_per_second_range"]
        assert 0 < slowest <= fastest
        cost = report["cost"][name]
        assert cost["seconds_per_million"] == pytest.approx(1e6 / v["tokens_per_second"])
        assert cost["price_per_million"] == pytest.approx(cost["seconds_per_million"] / 1000)
        memory = v["training_memory"]
        assert memory["optimizer_bytes"] == (8 * v["parameters"] if model == "transformer" else 0)
        hidden = 4 * 80 * 16
        layer = v["loss_memory"]["scratch_bytes"]
        assert memory["total_bytes"] == 8 * v["parameters"] + memory["optimizer_bytes"] + hidden + layer
        matrices = v["loss_memory"]["eager_matrices"] * 80 * report["corpus"]["vocabulary"] * 4
        assert memory["eager_bytes"] == memory["total_bytes"] - layer + matrices


def test_generation_feeds_back_what_it_predicts(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy(epochs=1)
    text = runner._read(settings)(None)
    data = runner.Data.of(text, 4, torch.device("cpu"))
    config = settings.resolved(len(text.train))
    trainer = runner.Trainer(runner.ordered(("real",))[0], config, data, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda tokens, *a: (seen.append(tokens), forward(tokens, *a))[1])
    assert inference.generate(trainer) > 0
    assert [t.shape for t in seen] == [(1, 1)] * inference.TOKENS
    state, tokens = trainer.model.body.start(1), data.test[0][:1, :1]
    for given in seen:
        assert torch.equal(given, tokens)
        hidden, state = forward(tokens, state, trainer.generator)
        tokens = (hidden[-1] @ trainer.model.weight.T + trainer.model.bias).argmax(-1, keepdim=True)
