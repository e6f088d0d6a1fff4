"""What is measured: the heads of real models as data, and the problems made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from .errors import BenchError


@dataclass(frozen=True)
class Head:
    """The output layer of a model with tied embeddings, or of one that could have them."""

    title: str
    vocab: int  # V
    width: int  # D
    tokens: int = 0  # N of one training step; 0: TOKENS of the device


# Vocabulary and width as in the published configurations. The LSTMs are those of Inan et al. (2017) on Penn Treebank
# and WikiText-2, whose steps have 20 sequences of 35 words.
HEADS = {
    "ptb-lstm-small": Head("the paper's small LSTM on Penn Treebank", 10_000, 200, 700),
    "ptb-lstm-medium": Head("the paper's medium LSTM on Penn Treebank", 10_000, 650, 700),
    "ptb-lstm-large": Head("the paper's large LSTM on Penn Treebank", 10_000, 1500, 700),
    "wikitext2-lstm-small": Head("the paper's small LSTM on WikiText-2", 33_278, 200, 700),
    "wikitext2-lstm-medium": Head("the paper's medium LSTM on WikiText-2", 33_278, 650, 700),
    "gpt2": Head("GPT-2", 50_257, 768),
    "qwen2.5-0.5b": Head("Qwen2.5-0.5B", 151_936, 896),
    "llama-3.2-1b": Head("Llama-3.2-1B", 128_256, 2048),
    "gemma-2-2b": Head("Gemma-2-2B", 256_000, 2304),
    "mistral-7b": Head("Mistral-7B", 32_000, 4096),
}
TOKENS = {"cpu": 512, "cuda": 8192}
DEFAULT = {"cpu": ("ptb-lstm-small",), "cuda": ("gpt2", "llama-3.2-1b", "gemma-2-2b")}
MODES = ("fwd", "bwd", "fwd+bwd")
LOSSES = ("ce", "cekl")
DTYPES = ("float32", "bfloat16", "float16", "float64")
GAMMA = 0.5  # alpha = gamma * temperature
TEMPERATURE = 20.0
IGNORE = -100
MIB = 1 << 20


@dataclass(frozen=True)
class Workload:
    """One problem: h (N, D), w (V, D), y (N,), and what is asked of the loss."""

    tokens: int  # N
    vocab: int  # V
    width: int  # D
    dtype: str = "float32"
    device: str = "cpu"
    loss: str = "cekl"
    mode: str = "fwd+bwd"
    targets: str = "text"
    ignored: float = 0.0  # share of the tokens
    temperature: float = TEMPERATURE
    workspace_bytes: int | None = None  # of every row of tiedkl, instead of the rows' own
    title: str = ""

    @property
    def alpha(self) -> float:
        """Weight of KL."""
        return GAMMA * self.temperature

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def size(self) -> str:
        return f"N={self.tokens} V={self.vocab} D={self.width} {self.dtype}"


def parse_shape(text: str, device: str) -> Workload:
    """`NAME`, `NAME:N` or `N,V,D` as a float32 workload. Raises BenchError."""
    if re.fullmatch(r"\d+,\d+,\d+", text):
        n, v, d = map(int, text.split(","))
        if min(n, v, d) < 1:
            raise BenchError(f"--shapes {text}: N, V and D must be positive")
        return Workload(n, v, d, device=device)
    name, _, tokens = text.partition(":")
    head = HEADS.get(name.lower())
    if head is None or (tokens and (not tokens.isdigit() or int(tokens) < 1)):
        raise BenchError(f"--shapes {text}: expected N,V,D or NAME or NAME:N, NAME one of {', '.join(HEADS)}")
    n = int(tokens) if tokens else head.tokens or TOKENS[device.partition(":")[0]]
    return Workload(n, head.vocab, head.width, device=device, title=f"Output layer of {head.title}")


SWEEPS = {
    "N": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1),  # parts of the shape's own
    "V": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1),
    "D": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1),
    "temperature": (1, 2, 5, 10, 20, 50),
    "workspace": (1, 4, 16, 64, 256),  # MiB
}
FIELDS = {"N": "tokens", "V": "vocab", "D": "width"}


def parse_sweep(text: str) -> tuple[str, tuple[float, ...] | None]:
    """`NAME` or `NAME=value,value`. Raises BenchError."""
    name, given, values = text.partition("=")
    if name not in SWEEPS:
        raise BenchError(f"--sweep {text}: expected one of {', '.join(SWEEPS)}, or NAME=VALUE,VALUE,...")
    if not given:
        return name, None
    try:
        found = tuple(float(value) for value in values.split(","))
    except ValueError:
        raise BenchError(f"--sweep {text}: {values!r} is not a list of numbers") from None
    if not all(0 < x < float("inf") for x in found) or (name in FIELDS and any(x != int(x) for x in found)):
        raise BenchError(f"--sweep {text}: expected positive {'whole ' if name in FIELDS else ''}numbers")
    return name, found


def sweep(base: Workload, name: str, values: tuple[float, ...] | None) -> list[Workload]:
    """`base` with one quantity varied; the smallest first."""
    if name in FIELDS:
        whole = getattr(base, FIELDS[name])
        sizes = [int(x) for x in values] if values else [max(1, round(part * whole)) for part in SWEEPS[name]]
        return [replace(base, **{FIELDS[name]: size}) for size in sorted(set(sizes))]  # type: ignore[arg-type]
    points = sorted(set(values or SWEEPS[name]))
    if name == "temperature":
        return [replace(base, temperature=float(x)) for x in points]
    return [replace(base, workspace_bytes=int(x * MIB)) for x in points]
