"""Prompts: where they come from, how they are split, and the batches of token ids that a run reads."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import grain
import ml_collections
import numpy as np
from absl import logging

from sea_jax import docstrings as docstring_miner
from sea_jax.tokenizer import Tokenizer

# Two texts are near-duplicates if they share this share of the shorter one's runs of four words.
NEAR_DUPLICATE_SHARE = 1 / 3


class Record(TypedDict):
    """One prompt: a name that is unique in its source, the text, and a human answer ("" where there is none)."""

    id: str
    prompt: str
    reference: str


class Batch(TypedDict):
    """B prompts as text and as token ids.

    Args:
      id, prompt, reference: of the records, B each.
      tokens: int32 [B, P], left-padded.
      valid: bool [B, P], false on padding.
    """

    id: list[str]
    prompt: list[str]
    reference: list[str]
    tokens: np.ndarray
    valid: np.ndarray


class Rendered(NamedTuple):
    """A record and the token ids that the model reads for it."""

    record: Record
    tokens: list[int]


def load(config: ml_collections.ConfigDict) -> tuple[list[Record], list[Record]]:
    """Reads the prompts that a config names, to train on and held out.

    Args:
      config: the fields are `source` ("docstrings" or "jsonl"), `heldout_fraction`, and for jsonl `path`,
        `heldout_path` ("": hold out `heldout_fraction` of `path`), `prompt_field` and `reference_field` ("": none).

    Returns:
      Training and held-out records; no prompt is in both.

    Raises:
      ValueError: a field or a file's content is not usable, or one of the two parts is empty.
      FileNotFoundError: a file is missing.
    """
    if config.source == "docstrings":
        train, heldout = split(docstrings(), config.heldout_fraction)
    elif config.source == "jsonl":
        records = jsonl(config.path, config.prompt_field, config.reference_field)
        if config.heldout_path:
            heldout = jsonl(config.heldout_path, config.prompt_field, config.reference_field)
            heldout_prompts = {record["prompt"] for record in heldout}
            train = [record for record in records if record["prompt"] not in heldout_prompts]
            logging.info("dropped %d training prompts that are also held out", len(records) - len(train))
        else:
            train, heldout = split(records, config.heldout_fraction)
    else:
        raise ValueError(f"data.source is {config.source!r}; it can be 'docstrings' or 'jsonl'")
    if not train or not heldout:
        raise ValueError(
            f"data.source={config.source!r} leaves {len(train)} prompts to train on and {len(heldout)} held out; both "
            f"are needed: change data.heldout_fraction (now {config.heldout_fraction}) or the files"
        )
    logging.info("%d training prompts, %d held out", len(train), len(heldout))
    return train, heldout


def docstrings() -> list[Record]:
    """Returns the docstrings of the installed packages as prompts, with their one-sentence summaries as references."""
    return [
        {"id": digest(pair.post)[:16], "prompt": pair.post, "reference": pair.summary}
        for pair in docstring_miner.mine()
    ]


def jsonl(path: str | Path, prompt_field: str, reference_field: str = "") -> list[Record]:
    """Reads prompts from a file of one JSON object a line; of lines with the same prompt the first counts.

    Args:
      path: UTF-8 text; empty lines are passed over. An object may carry an "id"; the default is a hash of the prompt.
      prompt_field: the key of the prompt, a text that is not empty.
      reference_field: the key of the human answer, a text or null; "": there are none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not as described or repeats another prompt's id (file and line are named), or none is left.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; data.path and data.heldout_path name files of JSON lines")
    by_prompt: dict[str, Record] = {}
    line_of_id: dict[str, int] = {}
    repeated = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = record_of_line(line, prompt_field, reference_field)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if record["prompt"] in by_prompt:
                repeated += 1
                continue
            if record["id"] in line_of_id:
                raise ValueError(
                    f"{path}, line {number}: the id {record['id']!r} is that of line {line_of_id[record['id']]}, whose "
                    "prompt is another"
                )
            line_of_id[record["id"]] = number
            by_prompt[record["prompt"]] = record
    if not by_prompt:
        raise ValueError(f"{path} holds no prompts; one JSON object a line is expected")
    logging.info("%s: %d prompts; %d lines that repeat one are left out", path, len(by_prompt), repeated)
    return list(by_prompt.values())


def record_of_line(line: bytes, prompt_field: str, reference_field: str) -> Record:
    """Returns the record of one line of a JSON lines file.

    Args:
      line: one JSON object.
      prompt_field: the key of the prompt.
      reference_field: the key of the human answer; "": there is none.

    Raises:
      ValueError: the line does not hold such a record; says why.
    """
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is expected, found {type(fields).__name__}")
    for name, field in (("data.prompt_field", prompt_field), ("data.reference_field", reference_field)):
        if field and field not in fields:
            raise ValueError(f"no field {field!r} ({name}); there are: {', '.join(map(repr, fields)) or 'none'}")
    prompt = fields[prompt_field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the field {prompt_field!r} (data.prompt_field) is {prompt!r:.60}; a text is expected")
    reference = fields[reference_field] if reference_field else ""
    if not isinstance(reference, str | None):
        raise ValueError(
            f"the field {reference_field!r} (data.reference_field) is {reference!r:.60}; a text is expected"
        )
    given_id, default_id = fields.get("id"), digest(prompt)[:16]
    return {
        "id": default_id if given_id is None else str(given_id),
        "prompt": prompt,
        "reference": reference or "",
    }


def digest(text: str) -> str:
    """Returns the hexadecimal sha256 of a text.

    Args:
      text: any text.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def split(records: Sequence[Record], heldout_fraction: float) -> tuple[list[Record], list[Record]]:
    """Divides records by a hash of the prompt, so that a prompt is held out or not whatever the other records are.

    Args:
      records: no prompt twice.
      heldout_fraction: expected share held out, between 0 and 1, both excluded.

    Returns:
      Training records without near-duplicates of held-out ones, and held-out records; each in the order of the hash,
      so that the first N are a fixed random sample.

    Raises:
      ValueError: the fraction is out of range.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"data.heldout_fraction is {heldout_fraction}; it must lie between 0 and 1")
    by_hash = sorted((digest(record["prompt"]), index) for index, record in enumerate(records))
    ordered = [records[index] for _, index in by_hash]
    # The first eight of the hexadecimal digits as a fraction of their range.
    count = sum(int(hash_of_prompt[:8], 16) < heldout_fraction * 16**8 for hash_of_prompt, _ in by_hash)
    heldout, others = ordered[:count], ordered[count:]
    train = without_near_duplicates(others, heldout)
    logging.info("dropped %d training prompts that nearly repeat a held-out one", len(others) - len(train))
    return train, heldout


def without_near_duplicates(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """Returns the records whose prompt is not nearly that of one of the others.

    Args:
      records: what to choose from.
      others: what to keep clear of.
    """
    others_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for index, other in enumerate(others):
        shingles = word_shingles(other["prompt"])
        sizes.append(len(shingles))
        for shingle in shingles:
            others_with[shingle].append(index)
    kept = []
    for record in records:
        shingles = word_shingles(record["prompt"])
        shared = Counter(index for shingle in shingles for index in others_with.get(shingle, ()))
        if all(count < NEAR_DUPLICATE_SHARE * min(len(shingles), sizes[index]) for index, count in shared.items()):
            kept.append(record)
    return kept


def word_shingles(text: str) -> set[tuple[str, ...]]:
    """Returns all runs of four words of a text, in lower case; a shorter text is one run.

    Args:
      text: any text.
    """
    words = docstring_miner.bare(text).split()
    return set(zip(words, words[1:], words[2:], words[3:], strict=False)) or {tuple(words)}


def render(prompt: str, tokenizer: Tokenizer, *, template: str, chat: bool, system: str = "") -> list[int]:
    """Returns the token ids of a prompt as the model reads it, ready to be continued with a response.

    Args:
      prompt: the text of a record.
      tokenizer: the model's.
      template: a text with `{prompt}` in it once, which the prompt takes the place of; other braces are left alone.
      chat: make the result a user's turn in the tokenizer's chat template.
      system: the system message before that turn; "": what the chat template does without one.

    Raises:
      ValueError: the template or the system message cannot be used.
    """
    if template.count("{prompt}") != 1:
        raise ValueError(f"data.template is {template!r}; it must contain {{prompt}} exactly once")
    if system and not chat:
        raise ValueError("data.system is set and data.chat is False: only a chat template has a place for it")
    text = template.replace("{prompt}", prompt)
    if not chat:
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": system}] if system else []
    # The chat template writes the BOS itself where the model wants one.
    return tokenizer.encode(tokenizer.chat([*messages, {"role": "user", "content": text}]), add_special=False)


def render_all(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    template: str,
    chat: bool,
    system: str = "",
    max_prompt_tokens: int,
) -> list[Rendered]:
    """Returns the records that fit into a number of tokens, rendered; says in the log how many do not.

    Args:
      records: in any order, which is kept.
      tokenizer, template, chat, system: as in `render`.
      max_prompt_tokens: longer prompts are left out.

    Raises:
      ValueError: no record is left.
    """
    rendered = [
        Rendered(record, render(record["prompt"], tokenizer, template=template, chat=chat, system=system))
        for record in records
    ]
    if not rendered:
        raise ValueError("there are no prompts to render")
    kept = [one for one in rendered if len(one.tokens) <= max_prompt_tokens]
    if not kept:
        lengths = [len(one.tokens) for one in rendered]
        raise ValueError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, and all {len(lengths)} prompts are longer: from "
            f"{min(lengths)} to {max(lengths)} tokens"
        )
    logging.info("%d of %d prompts are over %d tokens", len(rendered) - len(kept), len(rendered), max_prompt_tokens)
    return kept


def collate(rendered: Sequence[Rendered], pad_id: int, bucket: int) -> Batch:
    """Puts prompts into one batch, padded on the left to the next multiple of a bucket.

    Args:
      rendered: B records with their tokens.
      pad_id: the token id of the padding.
      bucket: tokens; P is the length of the longest prompt rounded up to a multiple of it.
    """
    longest = max(len(one.tokens) for one in rendered)
    shape = (len(rendered), -(-longest // bucket) * bucket)
    tokens = np.full(shape, pad_id, np.int32)
    valid = np.zeros(shape, bool)
    for row, one in enumerate(rendered):
        start = shape[1] - len(one.tokens)
        tokens[row, start:] = one.tokens
        valid[row, start:] = True
    return {
        "id": [one.record["id"] for one in rendered],
        "prompt": [one.record["prompt"] for one in rendered],
        "reference": [one.record["reference"] for one in rendered],
        "tokens": tokens,
        "valid": valid,
    }


def prompts(rendered: Sequence[Rendered], *, pad_id: int, bucket: int, batch_size: int, seed: int) -> grain.MapDataset:
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


def once(
    rendered: Sequence[Rendered], *, pad_id: int, bucket: int, batch_size: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields every prompt once, in order, in batches of one size, to evaluate on.

    Args:
      rendered: N prompts.
      pad_id, bucket: as in `collate`.
      batch_size: B; the last batch is filled up by repeating its last prompt.

    Yields:
      A batch, and a mask bool [B] that is false on those repetitions: it is true N times in all.
    """
    for start in range(0, len(rendered), batch_size):
        batch = list(rendered[start : start + batch_size])
        mask = np.arange(batch_size) < len(batch)
        yield collate(batch + batch[-1:] * (batch_size - len(batch)), pad_id, bucket), mask
