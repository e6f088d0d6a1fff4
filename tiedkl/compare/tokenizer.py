"""A vocabulary of subwords from a Hugging Face `tokenizer.json`, through the package `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .settings import CompareError

END_TOKENS = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "[SEP]", "<|im_end|>")
UNKNOWN_TOKENS = ("<unk>", "[UNK]", "<|unk|>", "UNK")


class Tokenizer:
    """A tokenizer file: `encode` turns units of text into ids, each unit closed by the id `eos`.

    `tokens` lists the vocabulary by id. `eos` is the file's own end token, or a new id behind the others when it has
    none; `unk` is the id of unknown text, None when there is none (byte-level tokenizers know everything).
    """

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise CompareError("--tokenizer needs the package tokenizers: pip install tokenizers") from None
        file = Path(path).expanduser()
        if not file.is_file():
            raise CompareError(f"{path}: no such file; expected a tokenizer.json")
        try:
            self._tool = Loaded.from_file(str(file))
        except Exception as error:  # the package raises plain Exception
            raise CompareError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0]})") from None
        self._tool.no_truncation()
        self._tool.no_padding()
        self.name = file.name
        ids = self._tool.get_vocab(with_added_tokens=True)
        self.tokens = [f"<id {k}>" for k in range(max(ids.values(), default=-1) + 1)]
        for token, k in ids.items():
            self.tokens[k] = token
        unk = getattr(self._tool.model, "unk_token", None)
        named = [ids[t] for t in ((unk,) if isinstance(unk, str) else UNKNOWN_TOKENS) if t in ids]
        self.unk: int | None = named[0] if named else None
        ends = [ids[t] for t in END_TOKENS if t in ids]
        if not ends:
            self.tokens.append("<eos>")
        self.eos: int = ends[0] if ends else len(self.tokens) - 1

    def encode(self, units: Iterable[str]) -> list[int]:
        """The ids of all units that hold anything."""
        found: list[int] = []
        for encoding in self._tool.encode_batch([u for u in units if u.strip()], add_special_tokens=False):
            found += [*encoding.ids, self.eos]
        return found

    def tokens_per_word(self, units: list[str] | dict[str, list[str]], ids: Iterable[list[int]]) -> float:
        """Of `units`, whose ids are `ids`, split by split; words are what white space divides."""
        texts = units if isinstance(units, list) else [u for part in units.values() for u in part]
        n_words = sum(len(u.split()) for u in texts)
        return sum(len(part) - part.count(self.eos) for part in ids) / max(1, n_words)

    def facts(self, tokens_per_word: float, train: list[int]) -> dict[str, Any]:
        """For the report; train: the ids that are trained on."""
        return {
            "kind": f"tokenizer {self.name}",
            "tokens_per_word": tokens_per_word,
            "share_of_vocabulary_seen_in_training": len(set(train)) / len(self.tokens),
        }
