"""Does a text repeat itself? Shares of distinct words and of repeated 3-grams, by which a collapsed policy is seen."""

import re
from collections.abc import Sequence

import numpy as np


def words_of(text: str) -> list[str]:
    """Returns the words of a text, without punctuation and case."""
    return re.findall(r"\w+", text.casefold())


def distinct_words(text: str) -> float:
    """Returns the share of a text's words that are there for the first time; 1 where there is no word."""
    words = words_of(text)
    return len(set(words)) / len(words) if words else 1.0


def repeats_trigram(text: str) -> bool:
    """Returns whether three words come again in the same order."""
    words = words_of(text)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) < len(trigrams)


def repetition_metrics(texts: Sequence[str]) -> dict[str, float]:
    """Returns the means over N >= 1 texts: the share of distinct words, and how many texts repeat three words."""
    return {
        "distinct_words": float(np.mean([distinct_words(text) for text in texts])),
        "repeated_trigrams": float(np.mean([repeats_trigram(text) for text in texts])),
    }
