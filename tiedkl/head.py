"""`TiedHead`: one matrix as input embedding and classifier, wholly or in part, and its resizing.

    e  = L[ids]                                 input embedding; L (V, D) = [weight | input_rest]
    z  = scale (P h) C^T + b                    logits;          C (V, D) = [weight | output_rest]
    KL = KL( softmax(L[y] L^T / tau) || softmax(z / tau) )

`weight` (V, k) is what both share: all of it unless `shared_dims` says otherwise, and the two rests do not exist then.
Inan, Khosravi and Socher (arXiv 1611.01462) take similarities from the input embedding, hence L in the KL term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from .problem import acc_dtype
from .resize import adopt, aligned_state, check_resizable, resized

Loss = Callable[..., Any]  # FusedTiedLoss, or what is called like it


class TiedHead(nn.Module):
    """Owns the one matrix of a tied model: `embed` looks its rows up, `logits` and `loss` classify with them.

    Args:
        vocab_size: V, rows of the matrix.
        width: D, columns of the matrix, which is the width of the input embedding.
        hidden_size: H, width of the hidden states. Where it differs from `width`, `projection` (a Linear without a
            bias) takes them to `width` first, as in OPT and ALBERT.
        bias: False; "token" for one bias a token; or an integer tensor (V,) with the class of every token, for one
            bias a class, whose gradient is the sum over its tokens. There are max(class) + 1 of them.
        shared_dims: k in [0, D]. Only the first k columns of the input embedding are the first k of the classifier;
            `input_rest` and `output_rest`, (V, D - k) each, are the others. None shares all, 0 shares nothing. A value
            below D costs a copy of both matrices (V x D) in every loss.
        scale: multiplies the hidden states, and so the logits before bias and softcap, e.g. width**-0.5. Similarities
            are not scaled.
        padding_idx: as in nn.Embedding: its row starts as zeros and looking it up gives no gradient. As a word that can
            be predicted it is a row like the others, and trained as one.
        dtype, device: of all parameters.

    Matrices start from a normal distribution of standard deviation width**-0.5 (rows of length about 1), biases at
    zero.

    Raises:
        TypeError: for types. ValueError: for ranges, and for classes that are not (V,) or negative.
    """

    weight: Parameter  # (V, k)
    input_rest: Parameter | None  # (V, D - k)
    output_rest: Parameter | None  # (V, D - k)
    bias: Parameter | None  # (V,), or (number of classes,)
    token_class: Tensor | None  # (V,) int64
    projection: nn.Linear | None  # H -> D

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        hidden_size: int | None = None,
        bias: bool | str | Tensor = False,
        shared_dims: int | None = None,
        scale: float = 1.0,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        _integer("vocab_size", vocab_size, 1)
        _integer("width", width, 1)
        self.width = width
        self.hidden_size = width if hidden_size is None else _integer("hidden_size", hidden_size, 1)
        shared = width if shared_dims is None else _integer("shared_dims", shared_dims, 0, width)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a number, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale} is not finite")
        self.scale = float(scale)
        self.padding_idx = None if padding_idx is None else _integer("padding_idx", padding_idx, 0, vocab_size - 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype} is not a floating dtype")

        def matrix(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, dtype=dtype, device=device))

        classes = _classes(bias, vocab_size)
        if classes is not None and torch.device("cpu" if device is None else device).type == "meta":
            raise ValueError('bias by class on device="meta": the classes would be lost with it; use a real device')
        self.weight = matrix(vocab_size, shared)
        rest = width - shared
        self.register_parameter("input_rest", matrix(vocab_size, rest) if rest else None)
        self.register_parameter("output_rest", matrix(vocab_size, rest) if rest else None)
        biases = vocab_size if classes is None else _count(classes)
        self.register_parameter("bias", None if bias is False else matrix(biases))
        self.register_buffer("token_class", None if classes is None else classes.to(self.weight.device))
        self.projection = None
        if self.hidden_size != width:
            self.projection = nn.Linear(self.hidden_size, width, bias=False, dtype=dtype, device=device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for name in self._rows():
            self._start(name, self.get_parameter(name))
        if self.padding_idx is not None:
            self.weight[self.padding_idx].zero_()
            if self.input_rest is not None:
                self.input_rest[self.padding_idx].zero_()
        if self.projection is not None:
            self.projection.reset_parameters()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def shared_dims(self) -> int:
        """Columns that input embedding and classifier share."""
        return self.weight.shape[1]

    def input_matrix(self) -> Tensor:
        """L (V, D), the input embedding: `weight` itself where all of it is shared, otherwise a copy."""
        return self.weight if self.input_rest is None else torch.cat([self.weight, self.input_rest], 1)

    def output_matrix(self) -> Tensor:
        """C (V, D), the classifier: `weight` itself where all of it is shared, otherwise a copy."""
        return self.weight if self.output_rest is None else torch.cat([self.weight, self.output_rest], 1)

    def token_bias(self) -> Tensor | None:
        """b (V,), or None."""
        if self.bias is None or self.token_class is None:
            return self.bias
        return self.bias[self.token_class]

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (..., D) of `ids` (...), int64 or int32."""
        parts = [F.embedding(ids, m, self.padding_idx) for m in (self.weight, self.input_rest) if m is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _project(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"hidden.shape={tuple(hidden.shape)} does not end in hidden_size={self.hidden_size}")
        hidden = hidden if self.projection is None else self.projection(hidden)
        return hidden if self.scale == 1 else hidden * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of `hidden` (..., H), without a softcap: this is for inference, `loss` never forms them."""
        return F.linear(self._project(hidden), self.output_matrix(), self.token_bias())

    def loss(self, hidden: Tensor, target: Tensor, loss_fn: Loss, **kwargs: Any) -> Any:
        """`loss_fn` of `hidden` (..., H) and `target` (...) with this head's classifier and bias.

        Args:
            loss_fn: a `FusedTiedLoss`; its `target_grad` lets the gradient flow into the similarities too.
            kwargs: passed on (`token_weight`, `num_items`, `shift`). `target_weight` (V, D') replaces the similarity
                source, which otherwise is the input embedding.

        Returns what `loss_fn` returns, and raises what it raises. ValueError when `hidden` has another width.
        """
        if self.input_rest is not None and kwargs.get("target_weight") is None:
            kwargs["target_weight"] = self.input_matrix()
        return loss_fn(self._project(hidden), self.output_matrix(), target, self.token_bias(), **kwargs)

    def forward(self, hidden: Tensor, target: Tensor, loss_fn: Loss, **kwargs: Any) -> Any:
        """The same as `loss`, for wrappers that know `forward` only."""
        return self.loss(hidden, target, loss_fn, **kwargs)

    @torch.no_grad()
    def resize(
        self,
        new_vocab: int,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        init: str = "mean",
        classes: Tensor | None = None,
    ) -> None:
        """Give the vocabulary `new_vocab` rows: the first ones stay bit for bit, new ones come at the end.

        Parameters with a row a token become new Parameter objects (an earlier step's graph may still hold the old
        ones), which this head uses for input and output alike. Whoever else holds them has to take them from the head
        again; hooks on them are gone. A gradient that they have is resized too, with zeros.

        Args:
            optimizer: what it has for these parameters is resized likewise: its param_groups hold the new Parameters,
                states with a row a token (momentum, exp_avg, exp_avg_sq) get zeros for new rows, counters stay.
            init: "mean", each new row is the mean of the old ones (without padding_idx), so a new word starts as an
                average one and moves old probabilities least; or "normal", as in a new head.
            classes: the classes of the new tokens, integers (new_vocab - V,), where the bias is by class. A class that
                is new gets a bias, by `init`; when shrinking, biases above the largest class that is left are dropped.

        Raises:
            TypeError, ValueError: for arguments; when `padding_idx` would be cut off; when the optimizer holds none of
            the parameters, or a state that cannot be matched to rows. RuntimeError: for sharded or parametrised
            parameters. Nothing is changed then.
        """
        _integer("new_vocab", new_vocab, 1)
        if init not in ("mean", "normal"):
            raise ValueError(f"init={init!r} is not one of 'mean', 'normal'")
        if self.padding_idx is not None and self.padding_idx >= new_vocab:
            raise ValueError(f"new_vocab={new_vocab} cuts off padding_idx={self.padding_idx}")
        token_class = self._resized_classes(new_vocab, classes)
        rows = dict.fromkeys(self._rows(), new_vocab)
        if token_class is not None:
            rows["bias"] = _count(token_class)
        old = {name: check_resizable(self, name) for name in rows}
        states = aligned_state(optimizer, {old[name]: n for name, n in rows.items()}) if optimizer else {}
        for name, parameter in old.items():
            data = resized(parameter, rows[name])
            self._start(name, data[len(parameter) :], self._mean(name, parameter) if init == "mean" else None)
            new = Parameter(data, parameter.requires_grad)
            new.grad = None if parameter.grad is None else resized(parameter.grad, rows[name])
            setattr(self, name, new)
            if optimizer is not None:
                adopt(optimizer, parameter, new, states.get(parameter))
        if token_class is not None:
            self.token_class = token_class

    def _rows(self) -> list[str]:
        """Names of the parameters with a row for every token (or class)."""
        return [n for n in ("weight", "input_rest", "output_rest", "bias") if getattr(self, n) is not None]

    def _start(self, name: str, rows: Tensor, mean: Tensor | None = None) -> None:
        """Fill new rows of a parameter."""
        if mean is not None:
            rows.copy_(mean.expand_as(rows))
        elif name == "bias":
            rows.zero_()
        else:
            nn.init.normal_(rows, std=self.width**-0.5)

    def _mean(self, name: str, parameter: Tensor) -> Tensor:
        by_token = name != "bias" or self.token_class is None
        if by_token and self.padding_idx is not None and len(parameter) > 1:
            keep = torch.arange(len(parameter), device=parameter.device) != self.padding_idx
            parameter = parameter[keep]
        return parameter.mean(0, dtype=acc_dtype(parameter.dtype)).to(parameter.dtype)

    def _resized_classes(self, new_vocab: int, classes: Tensor | None) -> Tensor | None:
        added = new_vocab - self.vocab_size
        if self.token_class is None or added <= 0:
            if classes is not None:
                raise ValueError("classes is for new tokens of a head with a bias for each class of tokens")
            return None if self.token_class is None else self.token_class[:new_vocab].clone()
        if classes is None:
            raise ValueError(f"the bias is by class: give the classes of the {added} new tokens in classes=")
        return torch.cat([self.token_class, _check_classes("classes", classes, added).to(self.token_class.device)])

    def extra_repr(self) -> str:
        bias = "False" if self.bias is None else "'token'" if self.token_class is None else f"{len(self.bias)} classes"
        parts = [f"{self.vocab_size}, {self.width}", f"bias={bias}"]
        parts += [f"shared_dims={self.shared_dims}"] * (self.shared_dims < self.width)
        parts += [f"scale={self.scale:g}"] * (self.scale != 1)
        parts += [f"padding_idx={self.padding_idx}"] * (self.padding_idx is not None)
        return ", ".join(parts)


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value} is outside [{low}, {'inf)' if high is None else f'{high}]'}")
    return value


def _classes(bias: object, vocab_size: int) -> Tensor | None:
    """The token classes that `bias` gives, or None where it is False or "token"."""
    if isinstance(bias, Tensor):
        return _check_classes("bias", bias, vocab_size)
    if bias is not False and bias != "token":
        raise ValueError(f"bias={bias!r} is not False, 'token', or an integer tensor (V,) of token classes")
    return None


def _check_classes(name: str, classes: Tensor, n: int) -> Tensor:
    if not isinstance(classes, Tensor) or classes.dtype not in (torch.int64, torch.int32):
        got = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor of token classes, got {got}")
    if classes.shape != (n,):
        raise ValueError(f"{name}.shape={tuple(classes.shape)} does not match ({n},), one class for each token")
    if int(classes.min()) < 0:
        raise ValueError(f"{name} holds a negative class: {int(classes.min())}")
    return classes.detach().to(torch.int64).clone()


def _count(classes: Tensor) -> int:
    return int(classes.max()) + 1
