"""Tiny causal language models with random weights, and the loss written out for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

EAGER = {"attn_implementation": "eager"}
if int(transformers.__version__.split(".")[0]) >= 5:
    EAGER["experts_implementation"] = "eager"  # the default has no float64

V, D, TAU, ALPHA = 61, 16, 3.0, 5.0

_COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OPT = {
    **{k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "num_key_value_heads", "pad_token_id")},
    "pad_token_id": 1,
    "ffn_dim": 24,
    "word_embed_proj_dim": 12,
    "dropout": 0.0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**_GPT2, **_NO_DROPOUT}),
    "llama": ("LlamaConfig", _COMMON),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_COMMON, "head_dim": 8, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3TextConfig", {**_COMMON, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "opt": ("OPTConfig", _OPT),
    "mistral": ("MistralConfig", _COMMON),
    "granite": ("GraniteConfig", {**_COMMON, "logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {**_COMMON, "logit_scale": 0.3}),
    "phi": ("PhiConfig", {**_COMMON, "num_key_value_heads": 2}),  # its output layer has a bias
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 3, "output_router_logits": True}),
}
SCALE = {"granite": 1 / 3.0, "cohere": 0.3}
SOFTCAP = {"gemma2": 4.0, "gemma3": 3.0}


def make(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with weights large enough that logits and KL are of order one."""
    kind, fields = CONFIGS[name]
    config = getattr(transformers, kind)(**{**fields, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        scale = 0.25 if p.dim() > 1 else 0.05
        p.data = p.data * (p.dim() == 1) + scale * torch.randn(p.shape, generator=generator)
    model.tie_weights()
    return model.to(dtype).train()


def batch(n_seq: int = 3, length: int = 9, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (n_seq, length); some labels are ignored."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (n_seq, length), generator=generator)
    labels = ids.clone()
    if ignored:
        labels[0, :4] = -100
        labels[-1, -2:] = -100
    return ids, labels


def formula(model: Any, logits: Tensor, labels: Tensor, alpha: float, metric: Tensor | None = None) -> Tensor:
    """Sum over tokens of CE + alpha KL, from logits (B, T, V) and labels (B, T), as the paper writes it."""
    z, y = logits[:, :-1].reshape(-1, logits.shape[-1]).double(), labels[:, 1:].reshape(-1)
    z, y = z[y != -100], y[y != -100]
    w = (model.get_output_embeddings().weight if metric is None else metric).detach().double()
    q = F.softmax(w[y] @ w.T / TAU, -1)
    kl = (q * (q.log() - F.log_softmax(z / TAU, -1))).sum()
    return F.cross_entropy(z, y, reduction="sum") + alpha * kl


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter; zero where the loss does not depend on it."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Every gradient within `tolerance` of the other's norm.

    Those that are zero in exact arithmetic, e.g. of a key's bias, hold rounding alone: a floor lets them pass.
    """
    assert got.keys() == wanted.keys()
    floor = 1e-2 * tolerance * max(float(g.norm()) for g in wanted.values())
    for name, g in wanted.items():
        assert float((got[name] - g).norm()) <= tolerance * float(g.norm()) + floor, name
    assert sum(bool(g.any()) for g in wanted.values()) > len(wanted) / 2


def clone(model: Any) -> Any:
    return copy.deepcopy(model)
