"""Prompts of several turns: messages to a chat template, one text to everybody else."""

import bisect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sea_jax.models.tokenizer import Tokenizer

Message = Mapping[str, str]  # "role" and "content", and whatever else a chat template reads


class Conversation(str):
    """The text of some messages, whose turns bear their roles' names unless there is but one; who wants these finds them.

    Attributes:
      messages: in their order.
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Sequence[Message]) -> "Conversation":
        told = [f"{message['role']}: {message['content']}" for message in messages]
        made = super().__new__(cls, messages[0]["content"] if len(messages) == 1 else "\n\n".join(told))
        made.messages = tuple(messages)
        return made

    def __getnewargs__(self) -> tuple[Any]:  # type: ignore[override]  # so that copies have the messages
        return (self.messages,)


def messages_of(prompt: str) -> tuple[Message, ...]:
    """Returns a prompt's messages; a text is one of the user."""
    return prompt.messages if isinstance(prompt, Conversation) else ({"role": "user", "content": prompt},)


def without_beginning(prompt: str, count: int) -> str:
    """Returns a prompt without the first characters of its text or of what its messages say, all of which stay."""
    if not isinstance(prompt, Conversation):
        return prompt[count:]
    messages = []
    for message in prompt.messages:
        messages.append({**message, "content": message["content"][count:]})
        count = max(count - len(message["content"]), 0)
    return Conversation(messages)


def parse_messages(value: Sequence[Any]) -> list[Message]:
    """Returns messages as a file has them, without what is null there.

    Raises:
      ValueError: there is none, or one is no such thing; says which.
    """
    if not value:
        raise ValueError("holds no messages")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        given = (
            {name: part for name, part in message.items() if part is not None} if isinstance(message, Mapping) else {}
        )
        if not all(isinstance(given.get(name), str) for name in ("role", "content")):
            raise ValueError(
                f"holds {message!r:.60} as message {number}; an object with a text as 'role' and one as 'content' is expected"
            )
        messages.append(given)
    return messages


def parse_prompt(value: object) -> str:
    """Returns a prompt as a file has it: a text, or messages that end before an answer.

    Raises:
      ValueError: it is neither, or says nothing.
    """
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"is {value!r:.60}; a text that is not empty, or messages, are expected")
    messages = parse_messages(value)
    if messages[-1]["role"] == "assistant":
        raise ValueError("ends with a message of the assistant; a prompt ends where the assistant is to answer")
    if not messages[-1]["content"].strip():
        raise ValueError("ends with a message that says nothing")
    return Conversation(messages)


def parse_answer(value: object) -> str:
    """Returns an answer as a file has it: a text, one message of the assistant, or null, which is "".

    Raises:
      ValueError: it is none of these.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | tuple):
        raise ValueError(f"is {value!r:.60}; a text, or one message of the assistant, is expected")
    messages = parse_messages(value)
    if len(messages) > 1 or messages[0]["role"] != "assistant":
        raise ValueError(
            f"holds messages of {', '.join(message['role'] for message in messages)}; one of the assistant is expected"
        )
    return messages[0]["content"]


def conversation_encoder(
    directory: Path, tokenizer: Tokenizer, max_tokens: int, *, as_pair: bool
) -> Callable[[str, str], list[int]]:
    """Returns how a prompt and its response become the token ids that a reward model reads.

    They become the turns of user and assistant in its tokenizer's chat template, those of a conversation as they are; without
    a template, one text with a
    space between them, unless there is one, and the EOS behind it (TL;DR models). It ends with the last token that is
    not the padding token of its config.json: there transformers reads the score. An encoder reads them as a pair,
    [CLS] prompt [SEP] response [SEP].

    Args:
      directory: holds the reward model's config.json.
      tokenizer: its own.
      max_tokens: of prompt and response together; the beginning of a longer prompt is cut. A response that alone is
        longer stays whole.
      as_pair: the reward model is an encoder.
    """
    padding = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("pad_token_id")

    def encode(prompt: str, response: str) -> list[int]:
        shown = (
            prompt if tokenizer.backend.chat_template and not as_pair else str(prompt)
        )  # of a conversation, its text

        def without(dropped: int) -> list[int]:
            kept = without_beginning(shown, dropped)
            if as_pair:
                first, second = (tokenizer.encode(tokenizer.quoted(text)) for text in (kept, response))
                return first + second[1:]
            return _conversation(tokenizer, kept, response)

        ids = without(0)
        if len(ids) > max_tokens:
            # By characters rather than tokens, since a token may be a part of a character.
            ids = without(bisect.bisect_left(range(len(prompt)), True, key=lambda n: len(without(n)) <= max_tokens))
        if as_pair:
            return ids
        end = max((i for i, token in enumerate(ids) if token != padding), default=0)
        return ids[: end + 1]

    return encode


def _conversation(tokenizer: Tokenizer, prompt: str, response: str) -> list[int]:
    """The token ids of a prompt and its response as a reward model reads them."""
    if tokenizer.backend.chat_template:
        said = [*messages_of(prompt), {"role": "assistant", "content": response}]
        turns = [{**message, "content": tokenizer.quoted(message["content"])} for message in said]
        # The template writes the BOS.
        return tokenizer.encode(tokenizer.chat(turns, generation_prompt=False), add_special=False)
    apart = prompt[-1:].isspace() or response[:1].isspace()
    ids = tokenizer.encode(f"{tokenizer.quoted(prompt)}{'' if apart else ' '}{tokenizer.quoted(response)}")
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]
