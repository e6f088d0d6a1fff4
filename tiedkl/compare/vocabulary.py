"""What the report says about the vocabulary and what lies outside it."""

from __future__ import annotations

from typing import Any


def vocabulary(corpus: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """(facts to read, the most frequent unknown words with their counts), from `Corpus.facts`."""
    known = corpus["vocabulary_facts"]
    shares = ", ".join(f"{split} {100 * share:.2f}%" for split, share in corpus["oov_rate"].items())
    facts = [("size", f"{corpus['vocabulary']:,}"), ("made of", known.get("kind", "words")), ("unknown tokens", shares)]
    if "coverage" in known:
        cover = ", ".join(f"{split} {100 * share:.2f}%" for split, share in known["coverage"].items())
        facts.append(("known tokens", cover))
        facts.append(("different training words", f"{known['distinct_training_words']:,}"))
    if "tokens_per_word" in known:
        seen = known["share_of_vocabulary_seen_in_training"]
        facts.append(("tokens a word", f"{known['tokens_per_word']:.2f}"))
        facts.append(("seen in training", f"{100 * seen:.1f}% of the vocabulary"))
    if (counts := corpus.get("unigram_ppl")) is not None:
        facts.append(("test perplexity of token counts alone", f"{counts:,.1f}"))
    if (copied := corpus.get("copied")) is not None:
        facts.append(("test text that is in the training text too", f"{100 * copied:.1f}%"))
    return facts, [f"{word} ({count})" for word, count in corpus["unknown_words"]]
