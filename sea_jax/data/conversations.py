"""Prompts of several turns: messages to a chat template, one text to everybody else."""

from collections.abc import Mapping, Sequence
from typing import Any

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
