"""Problems to test with: a case is a few numbers, its tensors follow from its seed.

Case i of a suite has the kind KINDS[i % len(KINDS)]; the dtypes take turns once every kind has had its own. What a kind
does not fix is drawn at random, so kinds mix: a ragged case may be weighted, shifted, capped and smoothed too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..problem import Options, Problem

ALL_DTYPES = ("float32", "bfloat16", "float16", "float64")
IGNORE = -100
WIDE = 1 << 30  # a workspace in bytes that forces token_blocks
NARROW = -1  # stands for one that forces vocab_blocks; how large that is, a backend's tuning says: see oracle.arguments


@dataclass(frozen=True)
class Case:
    """One problem. `options` are keyword arguments of `fused_tied_loss` but for NARROW; the rest shapes the tensors."""

    id: str
    kind: str
    seed: str
    dtype: str
    shape: tuple[int, ...]  # of the targets
    vocab: int
    width: int
    options: dict[str, Any] = field(hash=False)
    logit_std: float = 1.0
    bias: bool = False
    teacher_width: int = 0  # of target_weight; 0: none
    token_weight: bool = False
    num_items: float | None = None
    shift: int = 0
    ignored: float = 0.0  # share of targets
    targets: str = "uniform"  # or "zipf", "same"; "sorted" sorts uniform ones
    layout: str = "contiguous"  # or "transposed", "strided", "expanded"
    int32: bool = False
    one_parameter: bool = False  # the input is an embedding lookup in `weight`

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def row_layout(self) -> str:
        """Of `weight`, whose rows are never one."""
        return "strided" if self.layout == "expanded" else self.layout

    @property
    def reduction(self) -> str:
        return str(self.options["reduction"])


@dataclass
class Inputs:
    """Tensors of one case, none requiring a gradient. For `one_parameter`, h is the rows `tokens` of w."""

    h: Tensor  # (..., D)
    w: Tensor  # (V, D)
    target: Tensor  # (...)
    b: Tensor | None  # (V,)
    t: Tensor | None  # (V, D')
    token_weight: Tensor | None  # (...) float32
    upstream: Tensor  # of the loss: () or, for reduction "none", shaped like it; never uniform
    tokens: Tensor | None = None  # (...) ids


def _sizes(r: random.Random, dtype: str) -> dict[str, Any]:
    """Shapes with no common factor; small in float16, whose matrix products are slow on a CPU."""
    small = dtype == "float16"
    n = r.randrange(9, 28) if small else r.randrange(20, 130)
    v = r.randrange(40, 170) if small else r.randrange(70, 900)
    d = r.randrange(5, 20) if small else r.randrange(7, 70)
    return {"shape": (n,), "vocab": v, "width": d}


def _grid(r: random.Random, dtype: str) -> dict[str, Any]:
    """Targets in two dimensions."""
    return {"shape": (r.choice((2, 3)), r.choice((5, 7)) if dtype == "float16" else r.choice((11, 19, 30)))}


Kind = Callable[[random.Random, str], dict[str, Any]]

# What each kind fixes. Keys of Case, or of the options.
KINDS: dict[str, Kind] = {
    "random": lambda r, t: {},
    "ragged": lambda r, t: {
        "shape": (r.choice((23, 19) if t == "float16" else (1, 31, 97, 127, 257)),),
        "vocab": r.choice((67, 131) if t == "float16" else (67, 331, 509, 1021, 2053)),
        "width": r.choice((3, 11, 17) if t == "float16" else (3, 17, 61, 123)),
    },
    "tiny": lambda r, t: {
        "shape": r.choice(((0,), (1,), (2,), (3,), (0, 4), (2, 0), ())),
        "vocab": r.choice((1, 2, 3, 9)),
        "width": r.choice((1, 2, 5)),
    },
    "sorted": lambda r, t: {"targets": "sorted"},
    "zipf": lambda r, t: {"targets": "zipf"},
    "same": lambda r, t: {"targets": "same"},
    "all_ignored": lambda r, t: {"ignored": 1.0},
    # Few enough are ignored that an RMS over the tokens that are left means something.
    "ignored": lambda r, t: {"ignored": r.choice((0.1, 0.5, 0.8))},
    "weighted": lambda r, t: {"token_weight": True, "reduction": r.choice(("mean", "sum"))},
    "num_items": lambda r, t: {"num_items": r.uniform(0.5, 900.0), "reduction": "mean"},
    "shift": lambda r, t: {**_grid(r, t), "shift": r.choice((1, 1, 2))},
    "layout": lambda r, t: {"layout": r.choice(("transposed", "strided", "expanded"))},
    "upstream": lambda r, t: {"reduction": "none"},
    "large": lambda r, t: {"logit_std": 2500.0},
    "equal_rows": lambda r, t: {},
    "huge_logit": lambda r, t: {},
    "masked": lambda r, t: {"bias": True, "alpha": 0.0, "label_smoothing": 0.0, "softcap": None},
    "confident": lambda r, t: {"width": 13, "bias": False, "softcap": None, "z_loss": 0.0, "label_smoothing": 0.0},
    "near_teacher": lambda r, t: {
        "bias": False,
        "softcap": None,
        "teacher_width": 0,
        "temperature": r.choice((10.0, 20.0)),
        "alpha": 10.0,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "logit_std": r.choice((0.5, 1.0, 2.0)),
    },
    "smoothing": lambda r, t: {"label_smoothing": r.choice((0.05, 0.3, 1.0))},
    "z_loss": lambda r, t: {"z_loss": r.choice((1e-4, 0.05))},
    "softcap": lambda r, t: {"softcap": r.choice((2.0, 30.0)), "logit_std": 4.0},
    "bias": lambda r, t: {"bias": True},
    "target_grad": lambda r, t: {
        "target_grad": True,
        "alpha": r.choice((1.0, 10.0)),
        "targets": r.choice(("zipf", "same")),
    },
    "target_weight": lambda r, t: {
        "teacher_width": r.randrange(1, 40),
        "alpha": 5.0,
        "target_grad": r.random() < 0.5,
    },
    "token_blocks": lambda r, t: {"workspace_bytes": WIDE},
    "vocab_blocks": lambda r, t: {
        "workspace_bytes": NARROW,
        "shape": (r.randrange(60, 90),),
        "vocab": r.randrange(600, 2100),
        "width": 9,
        "target_grad": r.random() < 0.5,
    },
    "int32": lambda r, t: {"int32": True},
    "one_parameter": lambda r, t: {
        "one_parameter": True,
        "target_grad": r.random() < 0.5,
        "teacher_width": 0,
        **_grid(r, t),
    },
}


def make_case(seed: int, index: int, dtype: str) -> Case:
    """Case `index` of the suite `seed` in `dtype`."""
    r = random.Random(f"{seed}-{index}")
    kind = list(KINDS)[index % len(KINDS)]
    values: dict[str, Any] = {
        **_sizes(r, dtype),
        "temperature": r.choice((1.0, 2.5, 10.0, 20.0)),
        "alpha": r.choice((0.0, 0.7, 10.0)),
        "reduction": r.choice(("mean", "sum", "none")),
        "label_smoothing": r.choice((0.0, 0.0, 0.1)),
        "z_loss": r.choice((0.0, 0.0, 1e-3)),
        "softcap": r.choice((None, None, 15.0)),
        "target_grad": r.random() < 0.3,
        "workspace_bytes": r.choice((None, WIDE, NARROW)),
        "logit_std": r.choice((0.3, 1.0, 4.0)),
        "bias": r.random() < 0.3,
        "teacher_width": r.choice((0, 0, 0, 6)),
        "token_weight": r.random() < 0.3,
        "ignored": r.choice((0.0, 0.0, 0.2)),
        "targets": r.choice(("uniform", "zipf")),
    }
    if kind == "large":
        values |= {"softcap": None, "z_loss": 0.0}
    values |= KINDS[kind](r, dtype)
    names = (
        "temperature",
        "alpha",
        "reduction",
        "label_smoothing",
        "z_loss",
        "softcap",
        "target_grad",
        "workspace_bytes",
    )
    options = {name: values.pop(name) for name in names}
    id = f"{seed}-{index}-{dtype}"
    return Case(id=id, kind=kind, seed=f"{seed}-{index}", dtype=dtype, options=options, **values)


def cases(n: int, seed: int = 0, dtypes: tuple[str, ...] = ALL_DTYPES) -> Iterator[Case]:
    """The first `n` cases of suite `seed`; every kind in one of `dtypes`, then every kind in the next."""
    for i in range(n):
        yield make_case(seed, i, dtypes[i // len(KINDS) % len(dtypes)])


def find_case(id: str) -> Case:
    """The case an id stands for. ValueError for something else."""
    parts = id.split("-")
    if len(parts) != 3 or not parts[0].isdecimal() or not parts[1].isdecimal() or parts[2] not in ALL_DTYPES:
        raise ValueError(f"case id {id!r} is not SEED-INDEX-DTYPE, such as 0-17-float32")
    return make_case(int(parts[0]), int(parts[1]), parts[2])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "expanded" repeats the first row."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = x.new_full([2 * k for k in x.shape], 77)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if layout == "expanded" and x.dim() > 1 and len(x):
        return x[:1].expand(x.shape)
    return x


def _targets(case: Case, g: torch.Generator) -> Tensor:
    n = torch.Size(case.shape).numel()
    if case.targets == "zipf":
        p = 1 / (torch.arange(case.vocab, dtype=torch.float64) + 2.7)
        ids = torch.multinomial(p, max(n, 1), replacement=True, generator=g)[:n]
        y = torch.randperm(case.vocab, generator=g)[ids]
    else:
        y = torch.randint(case.vocab, (n,), generator=g)
    if case.targets == "same":
        y = torch.full((n,), case.vocab // 2)
    if case.targets == "sorted":
        y = y.sort().values
    y[torch.rand(n, generator=g) < case.ignored] = IGNORE
    return y.reshape(case.shape)


def make_inputs(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """The tensors of `case` on `device`; the same in every process."""
    g = torch.Generator().manual_seed(random.Random(case.seed).getrandbits(48))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    n, v, d = torch.Size(case.shape).numel(), case.vocab, case.width
    y = _targets(case, g)
    std = (case.logit_std / d**0.5) ** 0.5  # of hidden states and of rows: logits then have case.logit_std
    h, w = normal(n, d) * std, normal(v, d) * std
    b = normal(v) if case.bias else None
    known = y.reshape(-1).clamp(min=0)
    if case.kind == "equal_rows":
        w = w[torch.arange(v) % 4]
    elif case.kind == "huge_logit":
        w[v // 3] *= 25
        h[: n // 2] = h[: n // 2].abs() * w[v // 3].sign()
    elif case.kind == "masked":
        assert b is not None
        masked = torch.rand(v, generator=g) < 0.5
        masked[known] = False
        b[masked] = -float("inf")
    elif case.kind == "confident":  # z_y is 8 to 60 above every other logit
        w = torch.nn.functional.normalize(w, dim=-1)
        h = w[known] * (8 + 52 * torch.rand(n, 1, generator=g, dtype=torch.float64)) / 0.2
    elif case.kind == "near_teacher":  # KL is about (noise . w / tau)^2 / 2
        kl = 10 ** (-6 + 5 * torch.rand(n, 1, generator=g, dtype=torch.float64))
        h = w[known] + normal(n, d) * float(case.options["temperature"]) * (2 * kl / d).sqrt() / std
    t = normal(v, case.teacher_width) if case.teacher_width else None
    tokens = torch.randint(v, case.shape, generator=g) if case.one_parameter else None
    weight = torch.rand(case.shape, generator=g) + 0.1 if case.token_weight else None
    length = case.shape if not case.shift else (*case.shape[:-1], case.shape[-1] - case.shift)
    upstream = 0.3 + torch.rand(length if case.reduction == "none" else (), generator=g, dtype=torch.float64) * 2

    def place(x: Tensor, layout: str = "contiguous") -> Tensor:
        """On the device first: a copy to another device makes strided tensors contiguous."""
        return laid_out(x.to(device), layout)

    w = place(w.to(case.torch_dtype), case.row_layout)
    tokens = None if tokens is None else place(tokens)
    h = h.to(case.torch_dtype).reshape(*case.shape, d)
    return Inputs(
        h=laid_out(w[tokens], case.layout) if tokens is not None else place(h, case.layout),
        w=w,
        target=place(y.int() if case.int32 else y, "strided" if case.layout == "strided" else "contiguous"),
        b=None if b is None else place(b.to(case.torch_dtype), case.layout),
        t=None
        if t is None
        else place(t.to(case.torch_dtype), "transposed" if case.layout == "transposed" else "contiguous"),
        token_weight=None if weight is None else place(weight),
        upstream=place(upstream.to(torch.float64 if case.dtype == "float64" else torch.float32)),
        tokens=tokens,
    )


def random_problem(
    n: int, v: int, d: int, options: Options, dtype: torch.dtype, extras: bool, seed: int | None = None
) -> Problem:
    """A problem for one backend, past the public function: every fourth token is skipped; `extras`: with b and t."""
    g = torch.Generator().manual_seed(n + v + d if seed is None else seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    y = torch.randint(v, (n,), generator=g)
    y[1::4] = -1
    b, t = (normal(v), normal(v, d + 2)) if extras else (None, None)
    return Problem(normal(n, d), normal(v, d), y, b, t, options)
