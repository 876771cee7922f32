"""Prompts: how they are split, rendered and put into the batches of token ids that a run reads."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypedDict

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Int32

from sea_jax.data import batching, sources
from sea_jax.data.conversations import Conversation, messages_of
from sea_jax.data.near_duplicates import exact_repeats, near_repeats
from sea_jax.data.records import Columns, Record, check_characters, digest
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.settings import AT_LEAST_1, FRACTION, GIVEN, JSON_OBJECT, NOT_NEGATIVE, naming, one_of, setting

# The sources that are files.
FILES = ("jsonl", "csv", "parquet")

# What data.path names for the sources that need one.
PATHS: Mapping[str, str] = {
    **dict.fromkeys(FILES, "a file of training prompts, a directory of such files or a pattern"),
    "huggingface": "a directory, or the name of a data set on the hub",
    "tfds": "the name of a data set",
}

# The sources that read a field, for fields that not all read: the others refuse it rather than pass over it.
READ_BY: Mapping[str, tuple[str, ...]] = {
    "heldout_path": FILES,
    "split": ("huggingface", "tfds"),
    "heldout_split": ("huggingface", "tfds"),
    "subset": ("huggingface",),
    "directory": ("tfds",),
}

CHARACTERS_SHOWN = 80  # of a prompt in a message


@dataclass(frozen=True)
class DataSettings:
    """Where prompts come from, how they are split, rendered and batched."""

    source: str = setting(
        "docstrings",
        'prompts: "docstrings" (built in), "jsonl", "csv", "parquet", "huggingface" or "tfds"',
        one_of("docstrings", *PATHS),
    )
    path: str = setting(
        "",
        "file (jsonl, csv: also .gz or .zst), directory of them, or pattern; huggingface: directory or hub name; tfds: name",
    )
    heldout_path: str = setting("", 'jsonl, csv, parquet: evaluation prompts, as path; "": heldout_fraction of path')
    split: str = setting("train", "huggingface, tfds: split of the training prompts", GIVEN)
    heldout_split: str = setting("", 'huggingface, tfds: split to evaluate on; "": heldout_fraction of split')
    subset: str = setting("", 'huggingface: name of the data set\'s configuration; "": the default one')
    directory: str = setting("", 'tfds: its data_dir; "": ~/tensorflow_datasets')
    heldout_fraction: float = setting(
        0.1,
        "share of the prompts held out, by a hash of the prompt",
        (lambda v: 0 < v < 1, "a number between 0 and 1"),
    )
    prompt_field: str = setting(
        "prompt",
        'name of the field that holds the prompt, a text or messages; "": of pairs, what both responses begin with',
    )
    reference_field: str = setting("", 'name of the field that holds a reference response; "": there are none')
    rejected_field: str = setting(
        "",
        'of preference data, name of the field of the response that lost to that of reference_field; "": no such data',
    )
    id_field: str = setting(
        "id", 'name of the field with an id for each prompt, where there is one; "": ids are made from the prompts'
    )
    skip_bad_rows: bool = setting(
        False, "rows without a usable prompt are left out and counted; False: they end the run at its start"
    )
    near_duplicate_share: float = setting(
        0.0,
        "training prompts that share this share of the shorter one's runs of four words with a held-out one are left out; "
        "0: only those that are the same but for case and white space",
        FRACTION,
        before=1 / 3,
    )
    template: str = setting(
        "{prompt}",
        "what the policy reads, {prompt} once",
        (lambda v: v.count("{prompt}") == 1, "a text with {prompt} in it exactly once"),
    )
    chat: bool = setting(False, "wrap the filled template into the tokenizer's chat template")
    system: str = setting("", 'system message of the chat template where a prompt has none of its own; "": none')
    chat_arguments: str = setting(
        "",
        'further arguments of the chat template, a JSON object such as {"enable_thinking": false}; "": none',
        JSON_OBJECT,
    )
    special_tokens: str = setting(
        "text",
        'special tokens that prompts and references have in writing: they stay "text", or become "tokens"',
        one_of("text", "tokens"),
        before="tokens",
    )
    num_prompts: int = setting(
        0, "training prompts used, a fixed random sample where they are split by hash; 0: all", NOT_NEGATIVE
    )
    max_prompt_tokens: int = setting(
        1024, "longer prompts are filtered and counted", AT_LEAST_1, unit="tokens", source="paper, App. F"
    )
    bucket: int = setting(128, "prompts of a batch are padded to a multiple of it", AT_LEAST_1, unit="tokens")
    batch_size: int = setting(128, "b, prompts per step", AT_LEAST_1, source="paper, App. F")

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        if self.source in PATHS and not self.path:
            yield f"config.data.path='': data.source={self.source} needs {PATHS[self.source]}"
        for name, readers in READ_BY.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.source not in readers and value not in ("", default):
                only = " and ".join(readers)
                yield f"config.data.{name}={value!r}: data.source={self.source} does not read it; only {only} do"
        for name in ("template", "system"):
            try:
                check_characters(getattr(self, name))
            except ValueError as error:
                yield f"config.data.{name}={getattr(self, name)!r}: {error}"
        if not self.prompt_field and not self.rejected_field:
            yield "config.data.prompt_field='': must be a non-empty text where data.rejected_field is none"
        if self.rejected_field and not self.reference_field:
            yield (
                f"config.data.rejected_field={self.rejected_field!r}: data.reference_field must name the field of the "
                "response that was chosen"
            )
        if self.chat_arguments and JSON_OBJECT[0](self.chat_arguments) and not self.chat:
            yield (
                f"config.data.chat_arguments={self.chat_arguments!r}: only a chat template takes them; set "
                "config.data.chat=True"
            )
        if self.system and not self.chat:
            yield (
                f"config.data.system={self.system!r}: only a chat template has a place for it; set config.data.chat=True"
            )

    @property
    def columns(self) -> Columns:
        """Which fields of a row a record is made of; whoever names one for the ids must find it there."""
        return Columns(
            prompt=self.prompt_field,
            reference=self.reference_field,
            rejected=self.rejected_field,
            id=self.id_field,
            id_optional=self.id_field == type(self).__dataclass_fields__["id_field"].default,
            skip_bad_rows=self.skip_bad_rows,
        )


class Batch(TypedDict):
    """B prompts as text and, left-padded, as token ids; valid: False on padding."""

    id: list[str]
    prompt: list[str]
    reference: list[str]
    tokens: Int32[np.ndarray, "B P"]
    valid: Bool[np.ndarray, "B P"]


class Rendered(NamedTuple):
    """A record and the token ids that the model reads for it."""

    record: Record
    tokens: list[int]


def load_records(settings: DataSettings) -> tuple[list[Record], list[Record]]:
    """Reads the prompts that a config names, to train on and held out.

    Args:
      settings: `source` says where from: "docstrings"; "jsonl", "csv" or "parquet", files at
        `path` and, to hold out, at `heldout_path`; "huggingface" or "tfds", the splits `split` and `heldout_split` of
        the data set `path`. Where nothing is named to hold out, `heldout_fraction` of the prompts is.

    Returns:
      Training and held-out records; no prompt is in both.

    Raises:
      ValueError: a field or the content of a source is not usable, or one of the two parts is empty.
      FileNotFoundError: a file or data set is missing.
    """
    warn_of_escapes(settings)
    columns = settings.columns
    heldout: list[Record] | None = None
    if settings.source == "docstrings":
        records = sources.docstrings()
    elif settings.source in FILES:
        read_file = {"jsonl": sources.jsonl, "csv": sources.csv, "parquet": sources.parquet}[settings.source]
        records = read_file(settings.path, columns)
        if settings.heldout_path:
            heldout = read_file(settings.heldout_path, columns)
    elif settings.source in ("huggingface", "tfds"):
        read_split = (
            partial(sources.huggingface, settings.path, columns, subset=settings.subset)
            if settings.source == "huggingface"
            else partial(sources.tfds, settings.path, columns, directory=settings.directory)
        )
        records = read_split(split=settings.split)
        if settings.heldout_split:
            heldout = read_split(split=settings.heldout_split)
    else:
        raise ValueError(
            f"data.source is {settings.source!r}; it can be docstrings, {', '.join(FILES)}, huggingface or tfds"
        )
    check_conversations(settings, [*records, *(heldout or ())])
    if heldout is None:
        records, heldout = split_records(records, settings.heldout_fraction)
    train = without_repeats(records, heldout, settings.near_duplicate_share)
    if not train or not heldout:
        raise ValueError(
            f"data.source={settings.source!r} leaves {len(train)} prompts to train on and {len(heldout)} held out; both "
            f"are needed: change data.heldout_fraction (now {settings.heldout_fraction}) or the data. Left out of training "
            f"are {len(records) - len(train)} prompts that repeat a held-out one "
            f"(data.near_duplicate_share={settings.near_duplicate_share:.3g})"
        )
    logging.info("%d training prompts, %d held out", len(train), len(heldout))
    return train, heldout


def warn_of_escapes(settings: DataSettings) -> None:
    """Warns of a line break or tab that the shell has left a backslash and a letter."""
    for name in ("template", "system"):
        text = getattr(settings, name)
        if escape := re.search(r"\\[nt]", text):
            quoted = text.replace("'", r"\'")
            logging.warning(
                "config.data.%s holds a backslash and the letter %s, which the model reads as these two characters; if a %s is "
                "meant, bash and zsh write it as --config.data.%s=$'%s'",
                name,
                escape[0][1],
                "line break" if escape[0][1] == "n" else "tab",
                name,
                quoted,
            )


def check_conversations(settings: DataSettings, records: Sequence[Record]) -> None:
    """Refuses settings that conversations, which are read as they are, have no use for.

    Raises:
      ValueError: there is no chat template, or something is put around the prompts.
    """
    found = next((record["prompt"] for record in records if isinstance(record["prompt"], Conversation)), None)
    if found is None:
        return
    if not settings.chat:
        raise ValueError(
            f"config.data.chat=False: there are prompts that are messages, such as {shortened(found)!r}, and only a chat "
            "template reads these; set config.data.chat=True"
        )
    if settings.template != "{prompt}":
        raise ValueError(
            f"config.data.template={settings.template!r}: there are prompts that are messages, such as "
            f"{shortened(found)!r}, which are read as they are; set config.data.template='{{prompt}}'"
        )


def split_records(records: Sequence[Record], heldout_fraction: float) -> tuple[list[Record], list[Record]]:
    """Divides records by a hash of the prompt, so that a prompt is held out or not whatever the other records are.

    Args:
      records: no prompt twice.
      heldout_fraction: expected share held out, between 0 and 1, both excluded.

    Returns:
      Training and held-out records; each in the order of the hash, so that the first N are a fixed random sample.

    Raises:
      ValueError: the fraction is out of range.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"data.heldout_fraction is {heldout_fraction}; it must lie between 0 and 1")
    by_hash = sorted((digest(record["prompt"]), index) for index, record in enumerate(records))
    ordered = [records[index] for _, index in by_hash]
    # The first eight of the hexadecimal digits as a fraction of their range.
    count = sum(int(hash_of_prompt[:8], 16) < heldout_fraction * 16**8 for hash_of_prompt, _ in by_hash)
    return ordered[count:], ordered[:count]


def without_repeats(train: Sequence[Record], heldout: Sequence[Record], near_duplicate_share: float) -> list[Record]:
    """Returns the training records whose prompt repeats no held-out one; counts the others in a warning and shows one.

    Args:
      train, heldout: records.
      near_duplicate_share: how near is a repeat, as the setting says.
    """
    repeats = exact_repeats(train, heldout)
    if near_duplicate_share:
        repeats = near_repeats(train, heldout, near_duplicate_share) | repeats
    if repeats:
        row, other = min(repeats.items())
        logging.warning(
            "left out %d of %d training prompts that %srepeat a held-out one (data.near_duplicate_share=%.3g%s): %r repeats %r",
            len(repeats),
            len(train),
            "nearly " if near_duplicate_share else "",
            near_duplicate_share,
            "; at 0 only those that are the same" if near_duplicate_share else "",
            shortened(train[row]["prompt"]),
            shortened(heldout[other]["prompt"]),
        )
    return [record for row, record in enumerate(train) if row not in repeats]


def shortened(text: str) -> str:
    """Returns the beginning of a text, for messages."""
    return text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN].rstrip() + " ..."


def load_prompts(
    settings: DataSettings,
    tokenizer: Tokenizer,
    num_heldout: int,
    records: tuple[list[Record], list[Record]] | None = None,
    training: bool = True,
) -> tuple[list[Rendered], list[Rendered]]:
    """Returns the training and the held-out prompts, rendered with the policy's tokenizer; no more than are used.

    Args:
      settings: DataSettings.
      tokenizer: the policy's.
      num_heldout: held-out prompts to keep, at most.
      records: training and held-out records; None: they are read.
      training: False: no prompts to train on are needed.
    """
    train, heldout = records or load_records(settings)
    return (
        render_all(train, tokenizer, settings, settings.num_prompts) if training else [],
        render_all(heldout, tokenizer, settings, num_heldout),
    )


class Written(NamedTuple):
    """What a model reads, in writing.

    Attributes:
      text: special tokens included, but for a BOS that the tokenizer adds by itself.
      is_chat: its chat template wrote it, with whatever stands around it.
    """

    text: str
    is_chat: bool


def write(prompt: str, tokenizer: Tokenizer, settings: DataSettings, answer: str = "") -> Written:
    """Returns a prompt as the model reads it.

    A conversation is read as it is, in the tokenizer's chat template.

    Args:
      prompt: of a record; braces in it are left alone.
      tokenizer: the model's.
      settings: DataSettings; without a system message, the chat template does what it does without one.
      answer: the assistant's turn behind it in a chat; "": where one begins.
    """
    quote: Callable[[str], str] = tokenizer.quoted if settings.special_tokens == "text" else str
    if not isinstance(prompt, Conversation):
        prompt = settings.template.replace("{prompt}", quote(prompt))
        if not settings.chat:
            return Written(prompt, False)
        turns = [*messages_of(prompt)]
    else:
        turns = [{**message, "content": quote(message["content"])} for message in messages_of(prompt)]
    if settings.system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": settings.system})
    if answer:
        turns.append({"role": "assistant", "content": quote(answer)})
    with naming("data.chat", settings.chat):
        return Written(with_arguments(tokenizer, settings).chat(turns, generation_prompt=not answer), True)


def with_arguments(tokenizer: Tokenizer, settings: DataSettings) -> Tokenizer:
    """Returns a tokenizer whose chat template is given the settings' arguments."""
    return replace(tokenizer, chat_arguments=json.loads(settings.chat_arguments or "{}"))


def encode(written: Written, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of what is ready to be continued with a response."""
    # The chat template writes the BOS itself where the model wants one.
    return tokenizer.encode(written.text, add_special=not written.is_chat, goes_on=True)


def render(prompt: str, tokenizer: Tokenizer, settings: DataSettings) -> list[int]:
    """Returns the token ids of a prompt as the model reads it, ready to be continued with a response; see `write`."""
    return encode(write(prompt, tokenizer, settings), tokenizer)


def render_all(
    records: Sequence[Record], tokenizer: Tokenizer, settings: DataSettings, limit: int = 0
) -> list[Rendered]:
    """Returns the records that fit into a number of tokens, rendered, in their order; says in the log how many do not.

    Args:
      records: what to render.
      tokenizer, settings: as in `write`.
      limit: those behind the first so many that fit are not looked at; 0: all are.

    Raises:
      ValueError: no record is left, or one has a token that the model does not know.
    """
    if not records:
        raise ValueError("there are no prompts to render")
    max_prompt_tokens = settings.max_prompt_tokens
    kept: list[Rendered] = []
    lengths: list[int] = []
    for record in records:
        tokens = render(record["prompt"], tokenizer, settings)
        lengths.append(len(tokens))
        if len(tokens) <= max_prompt_tokens:
            kept.append(Rendered(record, tokens))
        if limit and len(kept) == limit:
            break
    if not kept:
        raise ValueError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, and all {len(lengths)} prompts are longer: from "
            f"{min(lengths)} to {max(lengths)} tokens"
        )
    logging.info("%d of %d prompts are over %d tokens", len(lengths) - len(kept), len(lengths), max_prompt_tokens)
    _tell_special_tokens(kept, tokenizer, settings)
    return kept


def _tell_special_tokens(rendered: Sequence[Rendered], tokenizer: Tokenizer, settings: DataSettings) -> None:
    """Says in the log how many prompts have special tokens in writing, and refuses one that the model does not know."""
    spelt = {token: sum(token in one.record["prompt"] for one in rendered) for token in tokenizer.special_tokens}
    if settings.special_tokens == "text" and any(spelt.values()):
        most = max(spelt, key=lambda token: spelt[token])
        logging.warning(
            "%d of %d prompts have %s in writing, which stays text; data.special_tokens=tokens makes it a token",
            *(spelt[most], len(rendered), most),
        )
    highest = max((token for one in rendered for token in one.tokens), default=0)
    if highest >= tokenizer.vocab_size:
        raise ValueError(
            f"config.data.special_tokens={settings.special_tokens}: a prompt has the token "
            f"{tokenizer.decode([highest], skip_special=False)}, {highest}, of which the model has no embedding; set it to "
            "text, or take it out of the data and the templates"
        )


def collate(rendered: Sequence[Rendered], pad_id: int, bucket: int) -> Batch:
    """Puts prompts into one batch, padded on the left with `pad_id` to the next multiple of a bucket of tokens."""
    longest = max(len(prompt.tokens) for prompt in rendered)
    shape = (len(rendered), batching.rounded(longest, bucket))
    tokens, valid = batching.pad([prompt.tokens for prompt in rendered], shape, pad_id, left=True)
    return {
        "id": [prompt.record["id"] for prompt in rendered],
        "prompt": [prompt.record["prompt"] for prompt in rendered],
        "reference": [prompt.record["reference"] for prompt in rendered],
        "tokens": tokens,
        "valid": valid,
    }


def training_batches(
    rendered: Sequence[Rendered], *, pad_id: int, bucket: int, batch_size: int, seed: int
) -> grain.MapDataset:
    """Returns endless batches to train on: batch i, `dataset[i]`, depends on the arguments and i alone.

    Every epoch has its own order. Epochs follow each other without a gap, so a batch can hold the end of one and the
    beginning of the next: none is smaller than the others and no prompt is left out.

    Args:
      rendered: the training prompts.
      pad_id, bucket: as in `collate`.
      batch_size: B.
      seed: of the order, from 0 to 2**32 - 1.
    """
    dataset = grain.MapDataset.source(rendered).shuffle(seed=seed).repeat()
    return dataset.batch(batch_size, batch_fn=lambda batch: collate(batch, pad_id, bucket))


def evaluation_batches(
    rendered: Sequence[Rendered], *, pad_id: int, bucket: int, batch_size: int
) -> Iterator[tuple[Batch, Bool[np.ndarray, " B"]]]:
    """Yields every prompt once, in order, in batches of one size, to evaluate on.

    Args:
      rendered: N prompts.
      pad_id, bucket: as in `collate`.
      batch_size: B; the last batch is filled up by repeating its last prompt.

    Yields:
      A batch, and a mask that is false on those repetitions: it is true N times in all.
    """
    for start in range(0, len(rendered), batch_size):
        batch = list(rendered[start : start + batch_size])
        mask = np.arange(batch_size) < len(batch)
        yield collate(batch + batch[-1:] * (batch_size - len(batch)), pad_id, bucket), mask
