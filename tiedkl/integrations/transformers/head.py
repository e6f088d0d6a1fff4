"""What stands between a model's last hidden state and its logits: z = softcap(scale (h w^T + b)), and is w tied?

Every function here only looks; tiedkl/integrations/transformers/verify.py compares with what the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...arguments import DTYPES


class Head(NamedTuple):
    """The classifier of one model, looked up anew for every loss: resizing a vocabulary replaces modules."""

    module: nn.Linear
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    similarity: Tensor | None  # (V, D') input embedding that gives the similarity target; None: `weight` itself


def from_adapter(module: nn.Module) -> bool:
    """Whether an adapter library such as peft wraps `module`."""
    return (
        type(module).__module__.split(".")[0] == "peft"
        or hasattr(module, "base_layer")
        or hasattr(module, "modules_to_save")
        or any(name.startswith("lora_") for name, _ in module.named_children())
    )


def output_layer(model: Any) -> nn.Linear:
    """The model's classifier. TypeError when it is not a plain linear layer, which the fused loss would bypass."""
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None:
        raise TypeError(f"{name}.get_output_embeddings() is None: tiedkl needs a model with a language-model head")
    kind = type(head).__name__
    if from_adapter(head):
        raise TypeError(
            f"the output layer of {name} is wrapped by an adapter ({kind}), which the fused loss would bypass: leave "
            "it out of target_modules, modules_to_save and trainable_token_indices, or merge the adapter first"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        dtype = getattr(weight, "dtype", None)
        raise TypeError(
            f"the output layer of {name} must be an unquantised nn.Linear, got {kind} with a weight of {dtype}: keep "
            "it out of the quantisation (llm_int8_skip_modules, modules_to_not_convert), or use the model's own loss"
        )
    # accelerate's device hooks replace `forward` too, but only move tensors, unless they fetch offloaded weights.
    hook = getattr(head, "_hf_hook", None)
    if getattr(hook, "offload", False):
        raise TypeError(
            f"the weights of {name}'s output layer are offloaded by accelerate: load the model with a device_map that "
            "keeps the output layer on a device"
        )
    if type(head).forward is not nn.Linear.forward or ("forward" in vars(head) and hook is None):
        raise TypeError(
            f"the output layer of {name} is {kind} with a forward of its own, which the fused loss would bypass: use "
            "an unquantised nn.Linear without wrappers, or the model's own loss"
        )
    if nn.utils.parametrize.is_parametrized(head) or head._forward_hooks:
        raise TypeError(
            f"the output layer of {name} has parametrizations or forward hooks, which the fused loss would bypass: "
            "remove them, or use the model's own loss"
        )
    return head


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one matrix; by address for those that a wrapper hands out as views."""
    if a is b:
        return True
    return a.shape == b.shape and a.numel() > 0 and a.device.type != "meta" and a.data_ptr() == b.data_ptr()


def check_tied(model: Any) -> None:
    """Raise unless the output layer's weight is the input embedding's, the same tensor and not a copy.

    Raises:
        ValueError: when it is not, with what to do. TypeError: when the output layer is not a plain nn.Linear.
    """
    weight, embedding = output_layer(model).weight, model.get_input_embeddings()
    name = type(model).__name__
    if from_adapter(embedding):
        raise ValueError(
            f"the input embedding of {name} is wrapped by an adapter, and no longer the output layer's matrix: "
            "leave the embedding out of the adapter, or pass tied=False to patch_model"
        )
    if _same(weight, embedding.weight):
        return
    config = model.config.get_text_config()
    if not getattr(config, "tie_word_embeddings", False):
        advice = (
            "set config.tie_word_embeddings = True before the model is made (or set it and call model.tie_weights())"
        )
    else:
        advice = (
            "the configuration asks for a tie that was broken, e.g. by a new embedding, output layer or vocabulary "
            "size: call model.tie_weights()"
        )
    raise ValueError(
        f"the output layer of {name} {tuple(weight.shape)} is not tied to its input embedding "
        f"{tuple(embedding.weight.shape)}: {advice} before the optimizer is made. tied=False in patch_model keeps two "
        "matrices and takes the similarity target from the input embedding"
    )


def find_head(model: Any, tied: bool, kl: bool) -> Head:
    """The classifier and the source of the similarity target. TypeError, ValueError as the functions above."""
    layer = output_layer(model)
    similarity = None
    if kl and tied:
        check_tied(model)
    elif kl:
        embedding = model.get_input_embeddings().weight
        if embedding.shape[0] != layer.weight.shape[0]:
            raise ValueError(
                f"the input embedding has {embedding.shape[0]} rows, the output layer {layer.weight.shape[0]}: the "
                "similarity target needs one vector for each word of the output; call model.resize_token_embeddings()"
            )
        similarity = None if _same(embedding, layer.weight) else embedding
    return Head(layer, layer.weight, layer.bias, similarity)


# How architectures scale their logits: Cohere and others multiply, Granite divides, Falcon-H1 multiplies.
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAP = "final_logit_softcapping"  # Gemma 2 and later


def logit_scale(config: Any) -> float:
    """The factor between h w^T + b and the logits, 1.0 where the configuration has none."""
    scale = 1.0
    for name in (*FACTORS, *DIVISORS):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0:
            scale = scale / value if name in DIVISORS else scale * value
    return scale


def softcap(config: Any) -> float:
    """c of c tanh(z / c), 0.0 where the configuration has none."""
    return float(getattr(config, SOFTCAP, None) or 0.0)


class Tap:
    """What the output layer was given: `hidden`, one tensor (..., D) for each time it was called."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []

    def only(self, model: Any) -> Tensor:
        """The hidden states. RuntimeError when the output layer was not called exactly once."""
        if len(self.hidden) != 1:
            raise RuntimeError(
                f"{type(model).__name__}.forward called its output layer {len(self.hidden)} times instead of once: "
                "tiedkl cannot patch this architecture; call fused_tied_loss on its hidden states instead"
            )
        return self.hidden[0]


@contextmanager
def tapped(layer: nn.Module, keep: slice | Tensor, instead: Tensor | None = None) -> Iterator[Tap]:
    """While this lasts, note the input (..., T, D) of `layer`, and hand on positions `keep` only, or `instead`.

    The model's own forward runs through whatever it does before and after its output layer, on as many tokens as are
    kept: none costs nothing, and needs no knowledge of the architecture.
    """
    tap = Tap()

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if module is not layer:  # replicas of DataParallel share their hooks
            return None
        tap.hidden.append(args[0])
        return (args[0][..., keep, :] if instead is None else instead, *args[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield tap
    finally:
        handle.remove()


NOTHING, EVERYTHING = slice(0, 0), slice(None)


def kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """transformers' `logits_to_keep` as an index: the last so many positions, 0 for all, or positions."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None) if logits_to_keep else EVERYTHING
    return logits_to_keep


def default_device(model: Any) -> torch.device:
    """Where the model takes its tokens."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device
