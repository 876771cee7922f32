"""Text to token ids and back, through the tokenizer files of a Hugging Face directory."""

import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import logging
from jinja2 import TemplateSyntaxError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # without it the import advises to install PyTorch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the special tokens that generation needs.

    Args:
      backend: the transformers tokenizer.
      eos_id: ends a text.
      pad_id: fills a batch; the EOS where the files name no padding token.
      vocab_size: the largest token id plus one.
      end_ids: tokens that end a response, the EOS first: it and those that the model's own files list.
      chat_arguments: further ones of the chat template, by name.
      now: the time that a chat template is told where it asks for it; None: that of the clock.
    """

    backend: "PreTrainedTokenizerBase"
    eos_id: int
    pad_id: int
    vocab_size: int
    end_ids: tuple[int, ...]
    chat_arguments: Mapping[str, Any] = field(default_factory=dict)
    now: datetime | None = None

    def encode(
        self, text: str, *, add_special: bool = True, max_length: int | None = None, goes_on: bool = False
    ) -> list[int]:
        """Returns the token ids of a text, not padded.

        Args:
          text: may hold special tokens in writing, which become their ids unless they are `quoted`.
          add_special: add what the tokenizer's own rules put around a text (a BOS for some models, none for others),
            unless the text already begins with a BOS.
          max_length: tokens, those around the text included; the end of a longer text is cut. None: nothing is.
          goes_on: something is to be written behind it, so that what the rules put at its end (an EOS) is left out.
        """
        has_bos = self.backend.bos_token is not None and text.startswith(self.backend.bos_token)
        if QUOTE in text:
            first, last = self._around() if add_special and not has_bos else ([], [])
            last = [] if goes_on else last
            room = None if max_length is None else max(max_length - len(first) - len(last), 0)
            return [*first, *self._quoting(text)[:room], *last]
        encoding = self.backend(
            text,
            add_special_tokens=add_special and not has_bos,
            return_special_tokens_mask=goes_on,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            verbose=False,
        )
        ids: list[int] = encoding["input_ids"]
        added = encoding["special_tokens_mask"] if goes_on else []
        end = max((position + 1 for position, is_added in enumerate(added) if not is_added), default=len(ids))
        return ids[:end]

    def quoted(self, text: str) -> str:
        """Returns a text in which special tokens are marked to stay text when it is encoded, alone or within another."""
        special = self.special_tokens
        if not any(piece in text for piece in special):
            return text
        return re.sub(_any_of(special), lambda found: f"{QUOTE}{found[0]}{UNQUOTE}", text)

    def _quoting(self, text: str) -> list[int]:
        """The ids of a text in which some special tokens in writing are quoted, and others are not."""
        special, plain = self.special_tokens, ""
        ids: list[int] = []

        def flush() -> list[int]:
            if not plain:
                return []
            encoding = self.backend(plain, add_special_tokens=False, split_special_tokens=True, verbose=False)
            return cast(list[int], encoding["input_ids"])

        for number, piece in enumerate(re.split(f"({QUOTE}.*?{UNQUOTE}|{_any_of(special)})", text, flags=re.DOTALL)):
            if number % 2 and piece in special:  # every other piece is what the text was split at
                ids, plain = [*ids, *flush(), special[piece]], ""
            else:
                plain += piece.removeprefix(QUOTE).removesuffix(UNQUOTE)
        return [*ids, *flush()]

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's own rules put before a text and behind it."""
        encoding = self.backend("a", return_special_tokens_mask=True)
        ids, mask = encoding["input_ids"], encoding["special_tokens_mask"]
        own = [place for place, added in enumerate(mask) if not added]
        return ids[: own[0]], ids[own[-1] + 1 :]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids, with or without special tokens."""
        plain_ids = [int(token_id) for token_id in token_ids]
        return cast(
            str,
            self.backend.decode(plain_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False),
        )

    def turn_end(self) -> tuple[str, str]:
        """Returns how the chat template ends an answer: up to its first special token, "" where there is none, and all.

        Raises:
          ValueError: as of `chat`.
        """
        answer = "0x616e73776572"
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
        tail = self.chat(turns, generation_prompt=False).rpartition(answer)[2]
        ends = [tail.index(token) + len(token) for token in self.special_tokens if token in tail]
        return tail[: min(ends, default=0)], tail

    def absent_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Returns the rows of a model's vocabulary that are no token, such as those that fill it up to a round number.

        Args:
          vocab_size: V, rows of the model's embedding.
        """
        return tuple(sorted({*range(vocab_size)}.difference(self.backend.get_vocab().values())))

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens in writing, with their ids."""
        return {token.content: number for number, token in self.backend.added_tokens_decoder.items() if token.special}

    def chat(self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> str:
        """Returns a conversation in the model's chat template.

        Args:
          messages: dicts of "role" ("system", "user" or "assistant") and "content".
          generation_prompt: end with what stands before an answer of the assistant, so that it is to write one.

        Raises:
          ValueError: the tokenizer has no chat template, or one that does not take this conversation.
        """
        if not self.backend.chat_template:
            raise ValueError(
                f"the tokenizer in {self.backend.name_or_path} has no chat template: set data.chat=False, or give its "
                "tokenizer_config.json a chat_template"
            )
        turns = [dict(message) for message in messages]
        try:
            template = None if self.now is None else at_time(self.backend.get_chat_template(), self.now)
            return cast(
                str,
                self.backend.apply_chat_template(
                    turns,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self.chat_arguments,
                ),
            )
        except Exception as error:  # a template is a program, which may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            roles = [message["role"] for message in messages]
            remedy = "mend it, in tokenizer_config.json or chat_template.jinja"
            if "system" in roles and not isinstance(error, TemplateSyntaxError):
                remedy = (
                    "if it has no place for a system message, set data.system='' and put it into data.template; else "
                    f"{remedy}"
                )
            raise ValueError(
                f"the chat template in {self.backend.name_or_path} does not take the turns {', '.join(roles)} "
                f"({reason:.300}): {remedy}"
            ) from error


QUOTE, UNQUOTE = "\ufdd0", "\ufdd1"  # around what is no special token; Unicode has them for a program's own use


def _any_of(special: Iterable[str]) -> str:
    """The pattern of any of some special tokens, the longest first."""
    return "|".join(re.escape(piece) for piece in sorted(special, key=len, reverse=True))


TIME_ASKED = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


def at_time(template: str, now: datetime) -> str:
    """Returns a chat template that is told a time where it asks for it: transformers gives it none but that of the clock."""
    return TIME_ASKED.sub(lambda asked: json.dumps(now.strftime(asked["format"])), template)


def load(directory: Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face directory.

    Args:
      directory: holds tokenizer.json, the tokenizer.model or spm.model of SentencePiece, or other files that transformers'
        AutoTokenizer reads without running their code.

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

    pieces = [name for name in ("tokenizer.model", "spm.model") if (directory / name).is_file()]
    if pieces and not (directory / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{directory / pieces[0]} is read by sentencepiece, which is not installed: pip install sentencepiece"
        )
    try:
        backend = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, down to the bare Exception of the Rust parser
        raise ValueError(f"{directory} holds no tokenizer that transformers can read: {error}") from error
    if pieces and not (directory / "tokenizer.json").is_file():
        _check_pieces(backend, directory / pieces[0])
    vocab_size, listed = max(backend.get_vocab().values()) + 1, _listed_ends(directory)
    own = [token for token in (backend.eos_token_id, backend.sep_token_id) if token is not None]
    ends = [*own[:1], *(token for token in listed if token < vocab_size)]
    if not ends:
        raise ValueError(f"the tokenizer in {directory} names no EOS: give its tokenizer_config.json an eos_token")
    pad_id = backend.pad_token_id
    return Tokenizer(
        backend=backend,
        eos_id=ends[0],
        pad_id=ends[0] if pad_id is None else pad_id,
        vocab_size=vocab_size,
        end_ids=tuple(dict.fromkeys(ends)),
    )


def _check_pieces(backend: "PreTrainedTokenizerBase", path: Path) -> None:
    """Refuses a tokenizer made from SentencePiece's file that cuts a text into other pieces than SentencePiece does."""
    import sentencepiece

    text = "The quick brown fox, 12 hours later: it jumps!"
    expected = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
    if backend(text, add_special_tokens=False)["input_ids"] != expected:
        raise ValueError(
            f"transformers makes a tokenizer of {path} that cuts text into other pieces than sentencepiece: put the model's "
            "own tokenizer_config.json beside it, which names its tokenizer_class, or its tokenizer.json"
        )


def _listed_ends(directory: Path) -> list[int]:
    """The ids by which the model's own files have a response end: one, several or none in each.

    Raises:
      ValueError: a file lists something else.
    """
    found: list[int] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        if not path.is_file():
            continue
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not valid JSON of an object ({error}); fetch it again") from error
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"{path} field 'eos_token_id' is {listed!r}; it must be a token id, or a list of them")
        found += ids
    return found


def list_end(directory: Path, tokenizer: Tokenizer, token_id: int) -> None:
    """Adds a token to those that end a model's responses, in the files of a directory whose tokenizer this is."""
    if token_id in tokenizer.end_ids:
        return
    path = directory / "generation_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    fields["eos_token_id"] = [*tokenizer.end_ids, token_id]
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def fitted(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Returns a tokenizer for a model whose embedding has `vocab_size` rows; the EOS pads where padding has none.

    Nobody looks at the embedding of padding, so that many a padding token was added without one.

    Raises:
      ValueError: the tokenizer has other ids that the model does not know.
    """
    unknown = {token for token in tokenizer.backend.get_vocab().values() if token >= vocab_size}
    if unknown == {tokenizer.pad_id} and tokenizer.eos_id not in unknown:
        logging.warning(
            "the tokenizer in %s pads with the id %d, of which the model has no embedding (%d rows): the EOS %d pads",
            *(tokenizer.backend.name_or_path, tokenizer.pad_id, vocab_size, tokenizer.eos_id),
        )
        return replace(tokenizer, pad_id=tokenizer.eos_id, vocab_size=vocab_size)
    if unknown:
        raise ValueError(
            f"the tokenizer in {tokenizer.backend.name_or_path} has token ids up to {tokenizer.vocab_size - 1}, but "
            f"the model's vocabulary has {vocab_size}: they do not belong together"
        )
    return tokenizer
