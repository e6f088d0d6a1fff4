"""What the examples share: the help texts of every CPython as token ids, and a GPT-2 that trains in seconds."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tiedkl.compare.corpus import Corpus, load

LENGTH = 48  # tokens of a sequence


def corpus(vocab_size: int = 2000) -> Corpus:
    """Streams of token ids and their words; no download."""
    return load(None, vocab_size=vocab_size)


def sequences(stream: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
    """The first `count` pieces of LENGTH tokens, as transformers' data collator takes them."""
    pieces = stream[: count * LENGTH].view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def gpt2(vocab_size: int, width: int = 64, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 with two layers and random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=2,
        n_head=4,
        n_positions=LENGTH,
        bos_token_id=1,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)
