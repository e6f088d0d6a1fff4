"""Patched models beside their own loss, and beside the formula with automatic differentiation, in float64."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiedkl

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

from tiny import (  # noqa: E402
    ALPHA,
    CONFIGS,
    TAU,
    V,
    assert_same,
    batch,
    clone,
    formula,
    gradients,
    make,
)

from tiedkl.integrations.transformers import (  # noqa: E402
    check_tied,
    loss_totals,
    patch_model,
    tiedkl_loss,
    unpatch_model,
)

CE = tiedkl.FusedTiedLoss(alpha=0.0)
FULL = tiedkl.FusedTiedLoss(temperature=TAU, alpha=ALPHA)
# Norms, softmax or routing in float32 inside these models round what is equal to 1e-16 before.
TOLERANCE = 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_cross_entropy_is_the_models_own(name: str) -> None:
    model = make(name)
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels)
    wanted = gradients(model, own.loss)
    got = patch_model(model, CE)(input_ids=ids, labels=labels)
    assert got.logits is None
    torch.testing.assert_close(got.loss.double(), own.loss.double(), rtol=TOLERANCE, atol=0)
    assert_same(gradients(model, got.loss), wanted, TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_formula(name: str) -> None:
    model = make(name)
    ids, labels = batch()
    n = int((labels[:, 1:] != -100).sum())
    own = model(input_ids=ids)
    loss = formula(model, own.logits, labels, ALPHA) / n
    assert float((loss - formula(model, own.logits, labels, 0.0) / n).detach()) > 0.01, "the KL term must show"
    if name == "mixtral":
        loss = loss + model.router_aux_loss_coef * own.aux_loss
        assert float(own.aux_loss.detach()) > 0
    wanted = gradients(model, loss)
    got = patch_model(model, FULL)(input_ids=ids, labels=labels)
    torch.testing.assert_close(got.loss.double(), loss.double(), rtol=1e-7 if name == "mixtral" else 1e-12, atol=0)
    assert_same(gradients(model, got.loss), wanted, TOLERANCE)
    # The terms beside the loss.
    ce = formula(model, own.logits.detach(), labels, 0.0) / n
    torch.testing.assert_close(got.loss_terms.ce, ce, rtol=1e-12, atol=0)
    total = got.loss_terms.ce + ALPHA * got.loss_terms.kl
    torch.testing.assert_close(total, got.loss_terms.loss, rtol=1e-12, atol=0)
    assert not got.loss_terms.loss.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_without_labels_nothing_changes(name: str) -> None:
    model = make(name, torch.float32).eval()
    ids, labels = batch()
    patched = patch_model(clone(model), FULL)
    with torch.no_grad():
        own = model(input_ids=ids)
        got = patched(input_ids=ids)
        evaluated = patched(input_ids=ids, labels=labels)
    assert torch.equal(got.logits, own.logits)
    assert got.loss is None
    assert torch.equal(evaluated.logits, own.logits), "in evaluation mode logits come with the loss"
    for m in (model, patched):
        m.config.output_router_logits = False  # transformers 4.57 cannot generate with it
    text = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids[:1, :3], attention_mask=torch.ones_like(ids[:1, :3]), **text)
    assert torch.equal(patched.generate(ids[:1, :3], attention_mask=torch.ones_like(ids[:1, :3]), **text), wanted)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere"])
def test_unpatching_restores_the_model(name: str) -> None:
    model = make(name)
    ids, labels = batch()
    before = model(input_ids=ids, labels=labels)
    attributes, kind, modules = dict(vars(model)), type(model), [type(m) for m in model.modules()]
    assert unpatch_model(model) is model, "a model that is not patched stays as it is"
    state, random, modes = (
        copy.deepcopy(model.state_dict()),
        torch.random.get_rng_state(),
        [m.training for m in model.modules()],
    )
    patch_model(model, FULL)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.state_dict().keys() == state.keys()
    model(input_ids=ids, labels=labels)
    assert unpatch_model(model) is model
    assert type(model) is kind
    assert [type(m) for m in model.modules()] == modules
    assert vars(model).keys() == attributes.keys()
    assert all(torch.equal(a, state[k]) for k, a in model.state_dict().items())
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)


def test_a_second_patch_replaces_the_first() -> None:
    model = make("gpt2")
    ids, labels = batch()
    patch_model(patch_model(model, FULL), CE)
    first = model(input_ids=ids, labels=labels).loss
    assert torch.equal(first, patch_model(make("gpt2"), CE)(input_ids=ids, labels=labels).loss)
    assert type(unpatch_model(model)) is transformers.GPT2LMHeadModel


@pytest.mark.parametrize("count", [40, 40.0, torch.tensor(40)])
def test_num_items_divides_the_sum(count: Any) -> None:
    model = make("llama")
    ids, labels = batch()
    wanted = formula(model, model(input_ids=ids).logits, labels, ALPHA) / 40
    got = patch_model(model, FULL)(input_ids=ids, labels=labels, num_items_in_batch=count)
    torch.testing.assert_close(got.loss, wanted, rtol=1e-12, atol=0)


def test_loss_totals_are_means_over_tokens() -> None:
    model = patch_model(make("llama"), FULL)
    ids, labels = batch()
    assert loss_totals(model).tokens == 0
    one = model(input_ids=ids[:1], labels=labels[:1], num_items_in_batch=7)
    model(input_ids=ids[1:], labels=labels[1:])
    with torch.no_grad():
        model.eval()(input_ids=ids[:1], labels=labels[:1])
        wanted = model(input_ids=ids, labels=labels).loss_terms
    totals = loss_totals(model, reset=True)
    n = int((labels[:, 1:] != -100).sum())
    assert totals.tokens == n
    assert totals.ce == pytest.approx(float(wanted.ce), rel=1e-12)
    assert totals.kl == pytest.approx(float(wanted.kl), rel=1e-12)
    assert totals.ce != pytest.approx(float(one.loss_terms.ce), rel=1e-3)
    assert loss_totals(model).tokens == 0
    assert loss_totals(model, training=False).tokens == n + int((labels[:1, 1:] != -100).sum())
    with pytest.raises(ValueError, match="not patched"):
        loss_totals(make("gpt2"))


def test_labels_that_are_already_shifted() -> None:
    model = patch_model(make("qwen2"), FULL)
    ids, labels = batch()
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    wanted = model(input_ids=ids, labels=labels).loss
    for kwargs in ({"labels": labels, "shift_labels": shifted}, {"shift_labels": shifted}):
        torch.testing.assert_close(model(input_ids=ids, **kwargs).loss, wanted, rtol=1e-14, atol=0)


def test_a_batch_without_labels_to_learn_from_has_a_loss_of_zero() -> None:
    model = patch_model(make("gpt2"), FULL)
    ids, labels = batch()
    loss = model(input_ids=ids, labels=torch.full_like(labels, -100)).loss
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_returned_when_asked_for(training: bool) -> None:
    model = make("granite").train(training)
    ids, labels = batch()
    own = model(input_ids=ids)
    assert torch.equal(patch_model(model, FULL, return_logits=True)(input_ids=ids, labels=labels).logits, own.logits)
    assert patch_model(model, FULL, return_logits=False)(input_ids=ids, labels=labels).logits is None


def test_logits_to_keep() -> None:
    model = make("llama")
    ids, labels = batch(ignored=False)
    full = model(input_ids=ids)
    patch_model(model, FULL, return_logits=True)
    n = labels[:, 1:].numel()
    got = model(input_ids=ids, labels=labels, logits_to_keep=2)
    torch.testing.assert_close(got.loss, formula(model, full.logits, labels, ALPHA) / n, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.logits, full.logits[:, -2:], rtol=1e-12, atol=1e-14)
    # Labels of the kept positions alone.
    got = model(input_ids=ids, labels=labels[:, -4:], logits_to_keep=4)
    wanted = formula(model, full.logits[:, -4:], labels[:, -4:], ALPHA) / labels[:, -3:].numel()
    torch.testing.assert_close(got.loss, wanted, rtol=1e-12, atol=0)


def test_tuple_outputs() -> None:
    model = patch_model(make("gpt2"), FULL)
    ids, labels = batch()
    named = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
    assert next(iter(named)) == "loss"
    found = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], named.loss)
    assert len(found) == len(named.to_tuple()) == 2
    assert all(torch.equal(a, b) for a, b in zip(found[1], named.hidden_states, strict=True))
    if int(transformers.__version__.split(".")[0]) < 5:  # where models work with such a configuration
        model.config.return_dict = False
        assert isinstance(model(input_ids=ids, labels=labels), tuple)


def test_arguments_by_position() -> None:
    model = patch_model(make("llama"), FULL)
    ids, labels = batch()
    names = list(inspect.signature(model.forward).parameters)
    args = [None] * (names.index("labels") + 1)
    args[names.index("input_ids")], args[-1] = ids, labels
    assert torch.equal(model(*args).loss, model(input_ids=ids, labels=labels).loss)


def test_gradient_checkpointing() -> None:
    model = patch_model(make("qwen3"), FULL)
    ids, labels = batch()
    plain = gradients(model, model(input_ids=ids, labels=labels).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(model, model(input_ids=ids, labels=labels, use_cache=False).loss), plain, 1e-12)


def test_frozen_embedding() -> None:
    """Only the trunk learns: no gradient of the matrix, the right one for the rest."""
    model = make("gpt2")
    model.get_input_embeddings().weight.requires_grad_(False)
    ids, labels = batch()
    n = int((labels[:, 1:] != -100).sum())
    wanted = gradients(model, formula(model, model(input_ids=ids).logits, labels, ALPHA) / n)
    assert_same(gradients(model, patch_model(model, FULL)(input_ids=ids, labels=labels).loss), wanted, TOLERANCE)


def test_the_class_still_looks_like_the_models_own() -> None:
    model = make("llama")
    kind, signature = type(model), inspect.signature(model.forward)
    patch_model(model, FULL)
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    assert inspect.signature(model.forward) == signature
    assert model.accepts_loss_kwargs
    assert model.can_generate()


@pytest.mark.parametrize("how", ["save_pretrained", "pickle", "deepcopy"])
def test_saving_and_copying(how: str, tmp_path: Path) -> None:
    model = patch_model(make("gpt2"), FULL)
    ids, labels = batch()
    loss = model(input_ids=ids, labels=labels).loss.detach()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    if how == "save_pretrained":
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).train()
        assert type(again) is transformers.GPT2LMHeadModel
        assert again.config.architectures == ["GPT2LMHeadModel"]
        patch_model(again, FULL)
    else:
        again = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert again is not model
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in again.state_dict().items())
    # Products of the same numbers at other addresses may be rounded differently.
    torch.testing.assert_close(again(input_ids=ids, labels=labels).loss, loss, rtol=1e-12, atol=0.0)
    check_tied(again)


def test_resizing_the_vocabulary() -> None:
    model = patch_model(make("llama"), FULL)
    torch.manual_seed(0)
    model.resize_token_embeddings(V + 5)
    check_tied(model)
    ids, labels = batch()
    wanted = formula(model, unpatch_model(clone(model))(input_ids=ids).logits, labels, ALPHA)
    got = model(input_ids=ids, labels=labels, num_items_in_batch=1)
    torch.testing.assert_close(got.loss, wanted, rtol=1e-12, atol=0)
    # A head that was exchanged by hand is no longer tied.
    model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    with pytest.raises(ValueError, match=r"tie that was broken.*tie_weights"):
        check_tied(model)
    with pytest.raises(ValueError, match="not tied"):
        model(input_ids=ids, labels=labels)
    model.tie_weights()
    check_tied(model)


def test_an_untied_head() -> None:
    model = make("llama", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"not tied.*tie_word_embeddings = True.*tied=False"):
        patch_model(model, FULL)
    assert type(model) is transformers.LlamaForCausalLM
    ids, labels = batch()
    n = int((labels[:, 1:] != -100).sum())
    embedding = model.get_input_embeddings().weight
    loss = formula(model, model(input_ids=ids).logits, labels, ALPHA, embedding) / n
    wanted = gradients(model, loss)
    got = patch_model(model, FULL, tied=False)(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
    assert_same(gradients(model, got), wanted, TOLERANCE)
    patch_model(model, CE)  # cross-entropy alone needs no tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Half-precision products in a float32 model, and a model in bfloat16; as exact as the model's own loss."""
    model = make("llama", dtype)
    ids, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(input_ids=ids, labels=labels)
        wanted = gradients(model, own.loss)
        got = patch_model(model, CE)(input_ids=ids, labels=labels)
    assert got.loss.dtype == torch.float32
    assert abs(float(got.loss.detach()) - float(own.loss.detach())) < 2e-2 * float(own.loss.detach())
    assert_same(gradients(model, got.loss), wanted, 5e-2)
    assert all(p.dtype == dtype for p in model.parameters())


class Unknown(transformers.GPT2LMHeadModel):
    """An architecture that does something of its own to the logits, under a name nobody knows."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        if labels is not None:
            out["loss"] = self.loss_function(out.logits, labels, vocab_size=V)
        return out

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return 1.7 * logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_unknown_scale_is_noticed(dtype: torch.dtype) -> None:
    model = Unknown(make("gpt2").config).to(dtype)
    with pytest.raises(ValueError, match=r"does not compute softcap\(1 .*logit_scale="):
        patch_model(model, FULL)
    assert type(model) is Unknown
    patch_model(model, FULL, logit_scale=1.7)
    patch_model(model, FULL, verify=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_unknown_softcap_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unknown, "change", lambda self, z: 30 * torch.tanh(z / 30))
    model = Unknown(make("gpt2").config).to(dtype)
    with pytest.raises(ValueError, match="softcap None"):
        patch_model(model, FULL)
    patch_model(model, tiedkl.FusedTiedLoss(softcap=30.0))
    with pytest.raises(ValueError, match="leave softcap out"):
        patch_model(make("gemma2"), tiedkl.FusedTiedLoss(softcap=30.0))


def test_a_model_that_does_not_predict_the_next_token() -> None:
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ValueError, match="not the cross-entropy of the next token"):
        patch_model(transformers.BertForMaskedLM(config), FULL)
    t5 = transformers.T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(TypeError, match="encoder-decoder"):
        patch_model(transformers.T5ForConditionalGeneration(t5), FULL)


def test_heads_that_would_be_bypassed() -> None:
    model = make("gpt2")

    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    plain = model.lm_head
    other = Other(16, V, bias=False).double()
    other.weight = plain.weight
    model.lm_head = other
    with pytest.raises(TypeError, match="forward of its own"):
        patch_model(model, FULL)
    model.lm_head = plain
    handle = plain.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(TypeError, match="forward hooks"):
        patch_model(model, FULL)
    handle.remove()
    patch_model(model, FULL)
    ids, labels = batch()
    model(input_ids=ids, labels=labels)
    model.lm_head = other  # noticed later as well
    with pytest.raises(TypeError, match="forward of its own"):
        model(input_ids=ids, labels=labels)


def test_a_quantised_head() -> None:
    model = make("gpt2", torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="unquantised"):
        patch_model(model, FULL)


def test_parametrized_head() -> None:
    model = make("gpt2", torch.float32)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(TypeError, match="parametrizations"):
        patch_model(model, CE)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="before it is wrapped"):
        patch_model(nn.Linear(2, 2), FULL)
    with pytest.raises(TypeError, match="FusedTiedLoss"):
        patch_model(make("gpt2"), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="reduction='mean'"):
        patch_model(make("gpt2"), tiedkl.FusedTiedLoss(reduction="sum"))
    model = make("gpt2")
    model.forward = model.forward
    with pytest.raises(RuntimeError, match="was replaced"):
        patch_model(model, FULL)
    with torch.device("meta"), pytest.raises(ValueError, match="not loaded"):
        patch_model(transformers.GPT2LMHeadModel(make("gpt2").config), FULL)


@pytest.mark.parametrize("first", ["peft", "patch"])
def test_lora(first: str) -> None:
    """Adapters in the trunk learn as they do without the patch; one around the output layer is refused."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    ids, labels = batch()
    base = make("llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config) if first == "peft" else peft.get_peft_model(patch_model(base, CE), config)
    model.double()
    if first == "peft":
        own = model(input_ids=ids, labels=labels)
        wanted = gradients(model, own.loss)
        assert patch_model(model, CE) is model
    else:
        wanted = gradients(model, unpatch_model(model)(input_ids=ids, labels=labels).loss)
        patch_model(model, CE)
    assert_same_lora(gradients(model, model(input_ids=ids, labels=labels).loss), wanted)


def assert_same_lora(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    learned = {k: g for k, g in wanted.items() if "lora_" in k}
    assert learned
    assert all(g.any() for g in learned.values())
    for name, g in wanted.items():
        torch.testing.assert_close(got[name], g, rtol=1e-5, atol=1e-7 * float(g.norm()))


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_lora_around_the_head(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **options})
    model = make("llama", torch.float32, tie_word_embeddings=False)
    with pytest.raises(TypeError, match=r"wrapped by an adapter .*target_modules, modules_to_save"):
        patch_model(peft.get_peft_model(clone(model), config), CE)
    patched = peft.get_peft_model(patch_model(model, CE), config)
    ids, labels = batch()
    with pytest.raises(TypeError, match="wrapped by an adapter"):
        patched(input_ids=ids, labels=labels)


def test_a_model_dispatched_by_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("gpt2")
    ids, labels = batch()
    wanted = patch_model(clone(model), FULL)(input_ids=ids, labels=labels).loss
    for module in (model, model.transformer, model.lm_head):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=module is model))
    assert torch.equal(patch_model(model, FULL)(input_ids=ids, labels=labels).loss, wanted)
    assert unpatch_model(model)(input_ids=ids, labels=labels).logits is not None


def test_compiled() -> None:
    model = patch_model(make("gpt2", torch.float32), FULL)
    ids, labels = batch()
    wanted = model(input_ids=ids, labels=labels).loss
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, labels=labels).loss, wanted, rtol=1e-6, atol=0)
    grads = gradients(model, wanted)
    assert_same(gradients(model, compiled(input_ids=ids, labels=labels).loss), grads, 1e-5)


def test_loss_function_for_trainers() -> None:
    model = make("cohere")
    function = tiedkl_loss(model, FULL)
    ids, labels = batch()
    out = model(input_ids=ids, output_hidden_states=True)
    wanted = formula(model, out.logits, labels, ALPHA)
    torch.testing.assert_close(function(out, labels, num_items_in_batch=7), wanted / 7, rtol=1e-12, atol=0)
    n = int((labels[:, 1:] != -100).sum())
    grads = gradients(model, wanted / n)
    out = model(input_ids=ids, output_hidden_states=True)
    assert_same(gradients(model, function(out, labels)), grads, TOLERANCE)
    with pytest.raises(ValueError, match="output_hidden_states"):
        function(model(input_ids=ids), labels)


def test_another_object_of_a_patched_class_is_an_ordinary_model() -> None:
    model = patch_model(make("gpt2"))
    other = type(model)(model.config)
    ids = torch.arange(6)[None]
    assert other(input_ids=ids, labels=ids).logits is not None
    with pytest.raises(ValueError, match="not patched"):
        loss_totals(other)
    assert patch_model(other)(input_ids=ids, labels=ids).logits is None


def test_a_router_whose_weight_is_unknown_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(make("mixtral"))
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids, output_router_logits=True)
    monkeypatch.setattr("tiedkl.integrations.transformers.patch.ROUTER_WEIGHTS", ("balance",))
    with pytest.raises(RuntimeError, match="auxiliary loss"):
        model(input_ids=ids, labels=ids, output_router_logits=True)
