"""`patch_model`: a model's own forward, with the loss taken from what its output layer is given.

Patching exchanges the class of one model object for a subclass of the same name that lives here. Nothing else of the
object changes, so that saving, copying, pickling, signatures and `isinstance` are as before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from ...loss import FusedTiedLoss
from . import head as heads
from .loss import LossTotals, ModelLoss, model_loss
from .verify import verify as verify_model

Model = TypeVar("Model", bound=nn.Module)
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")  # of a mixture of experts' own loss


class FusedLossModel:
    """What the class of a patched model has in front of its own class."""

    accepts_loss_kwargs = True  # for Trainer: num_items_in_batch is honoured
    _tiedkl: ModelLoss | None = None  # None for another object of the class, as type(model)(config) makes
    _tiedkl_class: type  # the model's own

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: the class is made on the fly, and cannot be looked up by its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self._tiedkl_class,), *reduced[2:])


def _new(cls: type) -> Any:
    patched: Any = _patched_class(cls)
    return patched.__new__(patched)


@functools.cache
def _patched_class(cls: type) -> type:
    own: Callable[..., Any] = cls.forward  # type: ignore[attr-defined]
    signature = inspect.signature(own)
    names = tuple(signature.parameters)[1:]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if self._tiedkl is None or (kwargs.get("labels") is None and kwargs.get("shift_labels") is None):
            return own(self, **kwargs)
        return _forward_with_loss(self, own, kwargs)

    # Trainer and find_labels look at the signature. accelerate's unwrap_model follows __wrapped__, past the loss.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    del forward.__wrapped__
    # transformers writes the name into config.json, and looks it up for tasks.
    members = {"forward": forward, "_tiedkl_class": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (FusedLossModel, cls), {**members, "__doc__": cls.__doc__})


def _forward_with_loss(model: Any, own: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    patch = model._tiedkl
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    keep = heads.kept(kwargs.pop("logits_to_keep", None) or 0)
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    with_logits = not model.training if patch.return_logits is None else patch.return_logits
    head = heads.find_head(model, patch.tied, patch.kl)
    with heads.tapped(head.module, keep if with_logits else heads.NOTHING) as tap:
        outputs = own(model, **kwargs, return_dict=True)
    hidden = tap.only(model)
    target, shift = (labels, 1) if shifted is None else (shifted, 0)
    if target.shape[-1] != hidden.shape[-2]:  # labels of the kept positions, as the model's own loss wants them
        hidden = hidden[..., keep, :]
    terms = patch(model, head, hidden, target, shift, num_items)
    loss = terms.loss
    aux_loss = getattr(outputs, "aux_loss", None)  # of a mixture of experts, where its router's loss is asked for
    if isinstance(aux_loss, Tensor):
        loss = loss + _router_weight(model) * aux_loss.to(loss.device)
    # Made anew: the fields of a ModelOutput keep the order in which they were set, and the loss comes first.
    found = {**outputs, "loss": loss, "logits": outputs.logits if with_logits else None}
    outputs = type(outputs)(**found)
    if not return_dict:
        return outputs.to_tuple()
    outputs.loss_terms = terms._replace(loss=terms.loss.detach().clone())  # an attribute: Trainer gathers fields
    # ... and scales the loss in place, hence the copy
    return outputs


def _router_weight(model: Any) -> float:
    for owner in (model, model.config.get_text_config()):
        for name in ROUTER_WEIGHTS:
            weight = getattr(owner, name, None)
            if weight is not None:
                return float(weight)
    raise RuntimeError(
        f"{type(model).__name__} has a router's auxiliary loss, but its weight is under none of the names that tiedkl "
        f"knows ({', '.join(ROUTER_WEIGHTS)}): set model.config.{ROUTER_WEIGHTS[0]}, or output_router_logits=False"
    )


def _inner(model: Any) -> Any:
    """The transformers model in a PeftModel, or `model` itself. TypeError for what is no such model."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(
            f"model must be a transformers PreTrainedModel or a PeftModel, got {type(model).__name__}: patch the model "
            "before it is wrapped (DistributedDataParallel, FSDP, torch.compile, accelerator.prepare)"
        )
    return model


def patch_model(
    model: Model,
    loss: FusedTiedLoss | None = None,
    *,
    tied: bool = True,
    return_logits: bool | None = None,
    logit_scale: float | None = None,
    verify: bool = True,
) -> Model:
    """Let `model(input_ids, labels=labels)` compute the fused loss from its hidden states, without logits.

    The model is changed in place, and works for any causal language model whose output layer is a plain nn.Linear.
    Its own forward runs up to the output layer and after it, so that whatever else it returns stays the same; without
    labels, so does everything. `num_items_in_batch`, `shift_labels`, `logits_to_keep` and `return_dict` mean what they
    mean to transformers; a router's auxiliary loss is added as transformers adds it. Patch before the model is wrapped
    (accelerate, DistributedDataParallel, torch.compile) and before or after peft.

    The outputs have `loss_terms`, a `TiedLossOutput` with CE and KL, as an attribute; `loss_totals` sums them up.

    Args:
        model: a transformers PreTrainedModel, or a PeftModel around one.
        loss: with reduction "mean"; default `FusedTiedLoss()`. The softcap of the model's configuration is added.
        tied: the output layer must be tied to the input embedding when the loss has a KL term. False lets them be two
            matrices; the similarity target then comes from the input embedding (the paper's +AL).
        return_logits: whether outputs with a loss have logits too: None in evaluation mode only, True always, False
            never. Logits cost (tokens x vocabulary) memory.
        logit_scale: factor between h w^T + b and the logits, for architectures whose configuration hides it.
        verify: compare the model's own logits and loss for three tokens with what is read off its configuration. It
            costs one forward pass of three tokens and leaves modes, gradients and random numbers alone.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` or `loss` is of the wrong kind, or the output layer is quantised, wrapped or adapted.
        ValueError: the output layer is not tied and `tied` is True; the logits differ from what was read; reduction
            or softcap of the loss do not fit. RuntimeError: `model.forward` was replaced by another library.
        What does not depend on the loss alone is checked again in each forward with labels.
    """
    inner = _inner(unpatch_model(model))
    patch = model_loss(inner, loss, tied, logit_scale, return_logits)
    head = heads.find_head(inner, tied, patch.kl)
    if verify:
        _verify(inner, patch, head)
    with _without_device_hook(inner):
        if "forward" in vars(inner):
            raise RuntimeError(
                f"{type(inner).__name__}.forward was replaced on this object, e.g. by accelerator.prepare or by "
                "liger-kernel: call patch_model before, and do not combine two fused losses"
            )
        inner._tiedkl = patch
        own: Any = type(inner)
        inner.__class__ = _patched_class(own)
    return model


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`; a model that is not patched stays as it is.

    Returns `model` itself. RuntimeError when another library has wrapped the patched forward meanwhile.
    """
    inner = _inner(model)
    if not isinstance(inner, FusedLossModel):
        return model
    with _without_device_hook(inner):
        if "forward" in vars(inner):
            raise RuntimeError(
                f"{type(inner).__name__}.forward was replaced after patch_model, e.g. by accelerator.prepare: undo "
                "that first (accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
        inner.__class__ = inner._tiedkl_class
        vars(inner).pop("_tiedkl", None)
    return model


class _without_device_hook:
    """Takes accelerate's device hook, which holds the bound forward, off a dispatched model and puts it on again."""

    def __init__(self, model: Any):
        self.model, self.hook = model, getattr(model, "_hf_hook", None)

    def __enter__(self) -> None:
        if self.hook is not None:
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(self.model)
            left = vars(self.model).get("forward")  # it leaves the class's own forward on the object
            if getattr(left, "__func__", None) is type(self.model).forward:
                del self.model.forward

    def __exit__(self, *_: Any) -> None:
        if self.hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(self.model, self.hook)


def _verify(model: Any, patch: ModelLoss, head: heads.Head, hidden_states: bool = False) -> None:
    cap = patch.loss.settings.scalars.options.softcap
    verify_model(model, type(model).forward, head, patch.scale, cap, hidden_states=hidden_states)


def loss_totals(model: nn.Module, *, training: bool = True, reset: bool = False) -> LossTotals:
    """Mean CE and KL over all tokens that a patched model saw with labels since the last reset, in this process.

    Args:
        training: of forwards in training mode; False: in evaluation mode.
        reset: start anew.

    Raises ValueError for a model that is not patched. Waits for the device.
    """
    inner = _inner(model)
    if not isinstance(inner, FusedLossModel) or inner._tiedkl is None:
        raise ValueError(f"{type(inner).__name__} is not patched: call patch_model first")
    totals = inner._tiedkl.totals
    sums = [x.tolist() for (mode, _), x in totals.items() if mode == training]
    if reset:
        for key in [key for key in totals if key[0] == training]:
            del totals[key]
    ce, kl, tokens = (sum(x[i] for x in sums) for i in range(3))
    return LossTotals(ce / tokens, kl / tokens, int(tokens)) if tokens else LossTotals(float("nan"), float("nan"), 0)


def tiedkl_loss(
    model: nn.Module,
    loss: FusedTiedLoss | None = None,
    *,
    tied: bool = True,
    logit_scale: float | None = None,
    verify: bool = True,
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for Trainer that takes the loss from `outputs.hidden_states[-1]`.

    For trainers that insist on such a function: Trainer asks the model for its logits first, which `patch_model`
    avoids, so that one (tokens x vocabulary) tensor stays; the loss adds no more. It needs
    `model.config.output_hidden_states = True`.

    Arguments and errors: as for `patch_model`. The function is called with (outputs, labels, num_items_in_batch=None)
    and returns a scalar; ValueError when the outputs have no hidden states.
    """
    inner = _inner(model)
    patch = model_loss(inner, loss, tied, logit_scale, None)
    head = heads.find_head(inner, tied, patch.kl)
    if verify:
        _verify(inner, patch, head, hidden_states=True)

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        hidden = outputs.get("hidden_states")
        if hidden is None:
            raise ValueError(
                "the outputs have no hidden states: set model.config.output_hidden_states = True, or use patch_model"
            )
        head = heads.find_head(inner, tied, patch.kl)
        return patch(inner, head, hidden[-1], labels, 1, num_items_in_batch).loss

    return compute_loss
