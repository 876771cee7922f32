"""Preference data: a prompt with the answer that was chosen and the one that was rejected, as files hold them."""

import itertools
import re
from typing import NamedTuple

from sea_jax.data.conversations import parse_answer, parse_messages, parse_prompt


class PreferencePair(NamedTuple):
    """Two answers to a prompt, which is a text or a `Conversation`."""

    prompt: str
    chosen: str
    rejected: str


def parse_pair(prompt: object, chosen: object, rejected: object) -> PreferencePair:
    """Returns a pair as a file has it (https://huggingface.co/docs/trl/dataset_formats#preference).

    Args:
      prompt: a text or messages; None: it is what both answers begin with.
      chosen, rejected: two texts, or two lists of messages: the answer alone or, behind the same messages, as the last one,
        which are the prompt then.

    Raises:
      ValueError: they are not of that kind, or it cannot be told where the prompt ends.
    """
    if isinstance(chosen, list | tuple) and isinstance(rejected, list | tuple):
        won, lost = parse_messages(chosen), parse_messages(rejected)
        if won[:-1] != lost[:-1]:
            raise ValueError("the two conversations differ before their last message")
        prompt, chosen, rejected = won[:-1] or prompt, won[-1:], lost[-1:]
    won_text, lost_text = parse_answer(chosen), parse_answer(rejected)
    if prompt is None:
        end = shared_words(won_text, lost_text)
        prompt, won_text, lost_text = won_text[:end], won_text[end:], lost_text[end:]
        if not (prompt and won_text and lost_text):
            raise ValueError("without a prompt (data.prompt_field), both must begin with it and then differ")
    return PreferencePair(parse_prompt(prompt), won_text, lost_text)


def shared_words(first: str, second: str) -> int:
    """Returns how many characters of two texts are the words that both begin with, without the white space behind these."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    shared = first[: sum(1 for _ in same)]
    if any(re.fullmatch(r"\w\w", text[len(shared) - 1 : len(shared) + 1]) for text in (first, second)):
        shared = re.sub(r"\w+$", "", shared)  # the words differ only further on
    return len(shared.rstrip())
