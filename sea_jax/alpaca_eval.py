"""Responses to AlpacaEval's instructions (https://github.com/tatsu-lab/alpaca_eval), in the file that its own package reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from sea_jax.actors import generation
from sea_jax.config import RunSettings
from sea_jax.data.prompts import Rendered, evaluation_batches, render_all
from sea_jax.data.records import Record
from sea_jax.types import Params, Prompts
from sea_jax.wiring import Parts


@dataclass(frozen=True)
class AlpacaEval:
    """What is to be answered, and how.

    Attributes:
      instructions: as `read_instructions` returns them.
      temperature: of the responses.
      max_new_tokens: of each.
    """

    instructions: Sequence[Mapping[str, str]]
    temperature: float
    max_new_tokens: int


def read_instructions(path: Path) -> list[dict[str, str]]:
    """Reads the instructions of AlpacaEval from a file like its alpaca_eval.json.

    Args:
      path: a JSON array of objects with an "instruction", and a "dataset" perhaps; what else they hold is another model's.

    Raises:
      ValueError: the file holds something else; says where.
      OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"--alpaca_eval={path}: is not valid JSON ({error}); take AlpacaEval's alpaca_eval.json"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"--alpaca_eval={path}: expected an array of objects, each with an 'instruction', as in alpaca_eval.json"
        )
    instructions = []
    for number, row in enumerate(rows, start=1):
        given = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(given, str) or not given.strip():
            raise ValueError(
                f"--alpaca_eval={path}: row {number} is {row!r:.80}; an object with a text as 'instruction' is needed"
            )
        dataset = row.get("dataset")
        instructions.append({"instruction": given} | ({"dataset": dataset} if isinstance(dataset, str) else {}))
    return instructions


def rendered(wanted: AlpacaEval, config: RunSettings, parts: Parts) -> list[Rendered]:
    """Returns the instructions as the policy reads them, in the run's own template.

    Raises:
      ValueError: one leaves no room for a response.
    """
    records: list[Record] = [
        {"id": str(number), "prompt": row["instruction"], "reference": ""}
        for number, row in enumerate(wanted.instructions, start=1)
    ]
    room = parts.policy.config.longest_sequence - wanted.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--alpaca_max_new_tokens={wanted.max_new_tokens}: the policy was made for {parts.policy.config.longest_sequence} "
            "tokens of instruction and response together"
        )
    prompts = render_all(records, parts.policy.tokenizer, replace(config.data, max_prompt_tokens=room))
    if len(prompts) < len(records):
        kept = {prompt.record["id"] for prompt in prompts}
        missing = next(record for record in records if record["id"] not in kept)
        raise ValueError(
            f"--alpaca_eval: row {missing['id']}, {missing['prompt']!r:.40}, has over {room} tokens, and the policy was made "
            f"for {parts.policy.config.longest_sequence} with a response of up to {wanted.max_new_tokens}: lower "
            "--alpaca_max_new_tokens"
        )
    return prompts


def outputs(
    wanted: AlpacaEval,
    prompts: Sequence[Rendered],
    config: RunSettings,
    parts: Parts,
    trained: Params,
    version: int,
    generator: str,
) -> list[dict[str, Any]]:
    """Writes a response to every instruction, sampled at a temperature, and returns them as AlpacaEval's package reads them.

    Args:
      wanted: AlpacaEval.
      prompts: as of `rendered`.
      config: of the run.
      parts: Parts.
      trained: the trained part of the policy's parameters.
      version: how many policy steps made them.
      generator: what the leaderboard calls the policy.
    """
    how = generation.configured(
        config.sampling,
        parts.policy,
        config.policy.dtype,
        num_samples=1,
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
    )
    write, root = parts.generate(how), jax.random.key(config.seed)
    batches = evaluation_batches(prompts, batch_size=config.eval.batch_size, **parts.padding(config.data.bucket))
    texts: list[str] = []
    for number, (batch, counts) in enumerate(batches):
        asked = Prompts(batch["tokens"], batch["valid"])
        candidates = write(trained, asked, jax.random.fold_in(root, number), version)
        texts += [row[0] for row, count in zip(parts.texts(candidates), counts, strict=True) if count]
    return [
        {**row, "output": text, "generator": generator} for row, text in zip(wanted.instructions, texts, strict=True)
    ]
