"""transformers' Trainer around a patched model: logs, accumulation, evaluation, and what would bypass the loss."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiedkl

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parent))

from tiny import ALPHA, TAU, V, make  # noqa: E402

from tiedkl.integrations.transformers import log_terms, loss_totals, patch_model, tiedkl_loss  # noqa: E402

FULL = tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA)
T = 9


def forget_precision() -> None:
    """accelerate and transformers keep the precision of the first trainer of a process."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    forget_precision()
    yield
    forget_precision()


def data(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sequences with different numbers of labels."""
    ids = torch.randint(3, V, (count, T), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: i % 7] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def trainer(model: Any, folder: Path, rows: Any = None, **options: Any) -> Any:
    rest = {k: options.pop(k) for k in ("compute_loss_func", "compute_metrics", "eval_dataset") if k in options}
    fixed = {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    plain = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**fixed, **plain, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=data() if rows is None else rows, **rest)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: x.detach().clone() for k, x in model.named_parameters()}


def test_cross_entropy_trains_like_the_model_itself(tmp_path: Path) -> None:
    """The same weights after three updates of two accumulated batches."""
    model = make("llama", torch.float32)
    patched = patch_model(copy.deepcopy(model), tiedkl.FusedTiedLoss(alpha=0.0))
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    before = weights(model)
    logs = []
    for m in (model, patched):
        t = trainer(m, tmp_path, **options)
        t.train()
        logs.append([x["loss"] for x in t.state.log_history if "loss" in x])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    for name, x in weights(patched).items():
        torch.testing.assert_close(x, weights(model)[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(x, before[name]), name


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_accumulated_batches_give_the_update_of_one_large_batch(tmp_path: Path, precision: dict[str, bool]) -> None:
    found = []
    for size in (8, 2):
        model = patch_model(make("gpt2", torch.float32), FULL)
        start = weights(model)
        t = trainer(
            model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **precision
        )
        log_terms(t)
        t.train()
        found.append(({k: x - start[k] for k, x in weights(model).items()}, t.state.log_history[0]))
    (large, log), (small, other) = found
    tolerance = 5e-2 if precision else 1e-4
    for name, x in large.items():
        assert float((small[name] - x).norm()) <= tolerance * float(x.norm()) + 1e-6, name
    assert other["loss"] == pytest.approx(log["loss"], rel=1e-3)
    assert other["ce"] == pytest.approx(log["ce"], rel=1e-3)
    assert other["kl"] == pytest.approx(log["kl"], rel=1e-2)


def test_logs_have_ce_and_kl(tmp_path: Path) -> None:
    model = patch_model(make("gpt2", torch.float32), FULL)
    rows = data(4)
    t = trainer(model, tmp_path, rows, max_steps=2, per_device_train_batch_size=4, eval_dataset=rows)
    seen: list[dict[str, float]] = []

    class Writer(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    t.add_callback(Writer)
    log_terms(t)  # added last, and still ahead of those that write logs
    before = t.evaluate()
    t.train()
    entries = [x for x in t.state.log_history if "loss" in x]
    assert len(entries) == 2
    labels = torch.stack([x["labels"] for x in rows])
    predicted = int((labels[:, 1:] != -100).sum())
    counted = int((labels != -100).sum())  # Trainer also counts first tokens, which nothing predicts
    for entry in (*entries, {k.removeprefix("eval_"): x for k, x in before.items()}):
        total = (entry["ce"] + ALPHA * entry["kl"]) * predicted
        ways = [total / counted, total / predicted]
        assert any(entry["loss"] == pytest.approx(x, rel=1e-3) for x in ways), (entry, ways)
    assert [x["ce"] for x in seen if "loss" in x] == [x["ce"] for x in entries]
    assert before["eval_kl"] > 0.01
    after = t.evaluate()
    assert after["eval_ce"] < before["eval_ce"]
    assert loss_totals(model, training=False).tokens == 0


def test_metrics_get_logits(tmp_path: Path) -> None:
    model = patch_model(make("gpt2", torch.float32), FULL)
    shapes: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        predictions = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        shapes.append(predictions.shape)
        return {"words": 1.0}

    model.config.use_cache = False
    t = trainer(model, tmp_path, eval_dataset=data(4), compute_metrics=metrics)
    assert t.evaluate()["eval_words"] == 1.0
    assert shapes == [(4, T, V)]


def test_a_trainer_that_bypasses_the_loss_is_noticed(tmp_path: Path) -> None:
    t = trainer(patch_model(make("gpt2", torch.float32), FULL), tmp_path, label_smoothing_factor=0.1)
    log_terms(t)
    with pytest.raises(RuntimeError, match=r"label_smoothing_factor .*FusedTiedLoss\(label_smoothing"):
        t.train()
    t = trainer(make("gpt2", torch.float32), tmp_path)
    log_terms(t)
    with pytest.raises(ValueError, match="not patched"):
        t.train()


def test_compute_loss_func(tmp_path: Path) -> None:
    """The update of a patched model, from hidden states that the outputs bring along."""
    model = make("gpt2", torch.float32)
    patched = patch_model(copy.deepcopy(model), FULL)
    model.config.output_hidden_states = True
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer(model, tmp_path, compute_loss_func=tiedkl_loss(model, FULL), **options).train()
    trainer(patched, tmp_path, **options).train()
    for name, x in weights(patched).items():
        torch.testing.assert_close(x, weights(model)[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
    }
    model = patch_model(make("gpt2", torch.float32), FULL)
    trainer(model, tmp_path, **options).train()
    again = patch_model(make("gpt2", torch.float32), FULL)
    trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, x in weights(again).items():
        torch.testing.assert_close(x, weights(model)[name], rtol=1e-6, atol=1e-8)


def test_unwrapped_by_accelerate(tmp_path: Path) -> None:
    """Mixed precision puts a forward on the model; after unwrapping it is the patched one again."""
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = patch_model(make("gpt2", torch.float32), FULL)
    batch = {k: x[None] for k, x in data(1)[0].items()}
    wanted = model(**batch).loss
    prepared = accelerator.prepare(model)
    assert prepared(**batch).logits is None
    back = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert back is model
    assert torch.equal(back(**batch).loss, wanted)
