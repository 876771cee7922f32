"""Text to token ids and back, through the tokenizer files of a Hugging Face directory."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # without it the import advises to install PyTorch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the special tokens that generation needs.

    Args:
      backend: the transformers tokenizer.
      eos_id: ends a response.
      pad_id: fills a batch; the EOS where the files name no padding token.
      vocab_size: the largest token id plus one.
      now: the time that a chat template is told where it asks for it; None: that of the clock.
    """

    backend: "PreTrainedTokenizerBase"
    eos_id: int
    pad_id: int
    vocab_size: int
    now: datetime | None = None

    def encode(self, text: str, *, add_special: bool = True, max_length: int | None = None) -> list[int]:
        """Returns the token ids of a text, not padded.

        Args:
          text: may hold special tokens in writing, which become their ids.
          add_special: add what the tokenizer's own rules put around a text (a BOS for some models, none for others),
            unless the text already begins with a BOS.
          max_length: tokens, those around the text included; the end of a longer text is cut. None: nothing is.
        """
        has_bos = self.backend.bos_token is not None and text.startswith(self.backend.bos_token)
        encoding = self.backend(
            text,
            add_special_tokens=add_special and not has_bos,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            verbose=False,
        )
        return encoding["input_ids"]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids, with or without special tokens."""
        plain_ids = [int(token_id) for token_id in token_ids]
        return cast(
            str,
            self.backend.decode(plain_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False),
        )

    def chat(self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> str:
        """Returns a conversation in the model's chat template.

        Args:
          messages: dicts of "role" ("system", "user" or "assistant") and "content".
          generation_prompt: end with what stands before an answer of the assistant, so that it is to write one.

        Raises:
          ValueError: the tokenizer has no chat template.
        """
        if not self.backend.chat_template:
            raise ValueError(
                f"the tokenizer in {self.backend.name_or_path} has no chat template: set data.chat=False, or give its "
                "tokenizer_config.json a chat_template"
            )
        turns = [dict(message) for message in messages]
        template = None if self.now is None else at_time(self.backend.get_chat_template(), self.now)
        return cast(
            str,
            self.backend.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
            ),
        )


TIME_ASKED = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


def at_time(template: str, now: datetime) -> str:
    """Returns a chat template that is told a time where it asks for it: transformers gives it none but that of the clock."""
    return TIME_ASKED.sub(lambda asked: json.dumps(now.strftime(asked["format"])), template)


def load(directory: Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face directory.

    Args:
      directory: holds tokenizer.json or other files that transformers' AutoTokenizer reads without running their code.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: it holds no readable tokenizer, or one without an EOS (or separator) token.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; a tokenizer is read from a directory with a tokenizer.json"
        )
    from transformers import AutoTokenizer  # takes seconds, which only those should wait who read a model

    try:
        backend = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, down to the bare Exception of the Rust parser
        raise ValueError(f"{directory} holds no tokenizer that transformers can read: {error}") from error
    eos_id = backend.eos_token_id
    if eos_id is None:
        eos_id = backend.sep_token_id
    if eos_id is None:
        raise ValueError(f"the tokenizer in {directory} names no EOS: give its tokenizer_config.json an eos_token")
    pad_id = backend.pad_token_id
    return Tokenizer(
        backend=backend,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        vocab_size=max(backend.get_vocab().values()) + 1,
    )


def check(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids that the model, whose embedding has `vocab_size` rows, does not know.

    Raises:
      ValueError: the tokenizer has more ids than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.backend.name_or_path} has token ids up to {tokenizer.vocab_size - 1}, but "
            f"the model's vocabulary has {vocab_size}: they do not belong together"
        )
