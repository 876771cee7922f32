"""Repetition within a text: shares worked out by hand."""

import pytest

from sea_jax.repetition import distinct_words, repeats_trigram, repetition_metrics


@pytest.mark.parametrize(
    ("text", "distinct", "repeats"),
    [
        ("Read a file, then close the file.", 6 / 7, False),
        ("great great great great", 1 / 4, True),
        ("The cat, the cat; THE CAT.", 2 / 6, True),
        ("a b c a b d a b", 4 / 8, False),
        ("a b c d a b c", 4 / 7, True),
        ("one", 1.0, False),
        ("?!", 1.0, False),
    ],
)
def test_words_are_compared_without_case_and_punctuation(text: str, distinct: float, repeats: bool) -> None:
    assert distinct_words(text) == pytest.approx(distinct)
    assert repeats_trigram(text) is repeats


def test_metrics_are_means_over_texts() -> None:
    assert repetition_metrics(["a b", "a a", "a a a a"]) == {
        "distinct_words": pytest.approx((1 + 1 / 2 + 1 / 4) / 3),
        "repeated_trigrams": pytest.approx(1 / 3),
    }
