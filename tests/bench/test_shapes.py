"""Shapes, sweeps, and what is refused."""

from __future__ import annotations

import pytest

from tiedkl.bench.errors import BenchError
from tiedkl.bench.shapes import HEADS, MIB, Workload, parse_shape, parse_sweep, sweep


def test_names_and_numbers() -> None:
    assert parse_shape("30,500,7", "cpu") == Workload(30, 500, 7)
    gpt2 = parse_shape("GPT2:64", "cpu")
    assert (gpt2.tokens, gpt2.vocab, gpt2.width) == (64, 50257, 768)
    assert "GPT-2" in gpt2.title
    assert parse_shape("gemma-2-2b", "cuda").tokens == 8192
    assert parse_shape("gemma-2-2b", "cuda:1").vocab == 256_000
    lstm = parse_shape("ptb-lstm-small", "cuda")
    assert (lstm.tokens, lstm.vocab, lstm.width) == (700, 10_000, 200), "the paper's step, on any device"
    for model in ("gpt2", "llama-3.2-1b", "gemma-2-2b", "qwen2.5-0.5b", "mistral-7b", "ptb-lstm-large"):
        assert model in HEADS


@pytest.mark.parametrize("text", ["bert", "gpt2:", "gpt2:x", "gpt2:0", "1,2", "1,2,x", "0,5,5", ""])
def test_a_wrong_shape_is_named(text: str) -> None:
    if text == "gpt2:":
        assert parse_shape(text, "cpu") == parse_shape("gpt2", "cpu")
        return
    with pytest.raises(BenchError, match="--shapes"):
        parse_shape(text, "cpu")


def test_a_sweep_changes_one_thing() -> None:
    base = Workload(1600, 3200, 64)
    assert [w.tokens for w in sweep(base, "N", None)] == [100, 200, 400, 800, 1600]
    assert {(w.vocab, w.width) for w in sweep(base, "N", None)} == {(3200, 64)}
    assert [w.vocab for w in sweep(base, "V", (7, 5, 7))] == [5, 7]
    assert [w.width for w in sweep(base, "D", None)] == [4, 8, 16, 32, 64]
    warm = sweep(base, "temperature", (2.0, 10.0))
    assert [(w.temperature, w.alpha) for w in warm] == [(2.0, 1.0), (10.0, 5.0)]
    assert [w.workspace_bytes for w in sweep(base, "workspace", (0.5, 2))] == [MIB // 2, 2 * MIB]


@pytest.mark.parametrize("text", ["W", "N=", "N=1,x", "N=1.5", "V=0", "temperature=-1", "D=inf"])
def test_a_wrong_sweep_is_named(text: str) -> None:
    with pytest.raises(BenchError, match="--sweep"):
        parse_sweep(text)


def test_a_sweep_with_values() -> None:
    assert parse_sweep("N") == ("N", None)
    assert parse_sweep("temperature=1.5,2") == ("temperature", (1.5, 2.0))
