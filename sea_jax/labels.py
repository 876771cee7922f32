"""The labels that a run has left, with the texts that they are about, for other runs and for other programs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float32, PRNGKeyArray

from sea_jax import ensemble
from sea_jax.agent import Agent, State
from sea_jax.data import batching
from sea_jax.data.prompts import Batch, DataSettings, Record, evaluation_batches, load_records, render_all
from sea_jax.features import Featurize
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.oracles.labelling import CUT, ORACLE, Question
from sea_jax.oracles.ledger import Ledger
from sea_jax.replay import add_pairs
from sea_jax.types import Candidates
from sea_jax.workdir import saved_settings


@dataclass(frozen=True)
class Label:
    """What a run's ledger says of a pair.

    Attributes:
      key: names the pair within the run.
      prompt_id: of the prompt.
      prompt: text shown to the oracle.
      first: text of the first response.
      second: text of the second response.
      label: that the first wins, as it was learnt from.
      probability: the same before noise.
      labeller: who labelled, ORACLE, ERM or CUT.
      counted: it was paid for.
      swapped: the second response was shown first.
    """

    key: str
    prompt_id: str
    prompt: str
    first: str
    second: str
    label: float
    probability: float
    labeller: str
    counted: bool
    swapped: bool


def read_labels(workdir: Path) -> list[Label]:
    """Reads a run's labels; the prompts, of which its ledger holds the names, are read where the run read them.

    Args:
      workdir: where `train` wrote.

    Raises:
      ValueError: there is no run, or its prompts are not there as they were asked about.
    """
    settings = saved_settings(workdir)
    if not (workdir / "queries.jsonl").is_file():
        raise ValueError(f"{workdir} holds no queries.jsonl: no label was asked for there")
    with Ledger(workdir / "queries.jsonl", writes=False) as ledger:
        lines = ledger.lines()
    train, heldout = load_records(settings.data)
    texts = {record["id"]: record["prompt"] for record in (*heldout, *train)}
    return [_label(line, texts, workdir, settings.data) for line in lines]


def _label(line: Mapping[str, Any], texts: Mapping[str, str], workdir: Path, data: DataSettings) -> Label:
    """A line of the ledger with its prompt, which must be the one that was asked about."""
    prompt, found = texts.get(line["prompt_id"]), None
    given = None if line["labeller"] == ORACLE else line["label"]
    if prompt is not None:
        about = line["prompt_id"], prompt, line["first"], line["second"], given
        found = Question(line["key"], line["step"], *about, cut=line["labeller"] == CUT).entry()["digest"]
    if prompt is None or found != line["digest"]:
        raise ValueError(
            f"{workdir / 'queries.jsonl'}: the prompt {line['prompt_id']} of the label {line['key']} is not in "
            f"data.source={data.source}, data.path={data.path}, as it was when the oracle was asked; put the data back"
        )
    names = ("key", "prompt_id", "first", "second", "label", "probability", "labeller", "counted")
    return Label(prompt=prompt, swapped=line.get("swapped", False), **{name: line[name] for name in names})


Carried = tuple[Batch, Candidates, list[list[str]], Float32[np.ndarray, " B"], Bool[np.ndarray, " B"]]


def batches(
    labels: Sequence[Label], tokenizer: Tokenizer, data: DataSettings, *, max_new_tokens: int
) -> Iterator[Carried]:
    """Yields the pairs of labels as a run's features are computed from them.

    A response is encoded anew: of its tokens only the text is known, and one that leaves room for it gets an EOS.

    Args:
      labels: any number.
      tokenizer: the policy's.
      data: how prompts are rendered and batched; those that are longer than it says are left out.
      max_new_tokens: T.

    Yields:
      Prompts, the two responses as candidates [B, 2, T], their texts, labels, and which rows count.
    """
    records = [Record(id=str(number), prompt=label.prompt, reference="") for number, label in enumerate(labels)]
    rendered = render_all(records, tokenizer, data)

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(tokenizer.quoted(text), add_special=False)
        return [*ids, tokenizer.eos_id] if len(ids) < max_new_tokens else ids[:max_new_tokens]

    padding = {"pad_id": tokenizer.pad_id, "bucket": data.bucket}
    for batch, counts in evaluation_batches(rendered, batch_size=data.batch_size, **padding):
        rows = [labels[int(number)] for number in batch["id"]]
        ids = [encode(text) for row in rows for text in (row.first, row.second)]
        tokens, valid = batching.pad(ids, (len(ids), max_new_tokens), tokenizer.pad_id)
        shape = (len(rows), 2, max_new_tokens)
        candidates = Candidates(
            tokens=jnp.asarray(tokens.reshape(shape)),
            lengths=jnp.asarray(valid.sum(-1, dtype=np.int32).reshape(shape[:2])),
            logprobs=jnp.zeros(shape, jnp.float32),
            features=jnp.zeros((*shape[:2], 0), jnp.float32),
        )
        texts = [[row.first, row.second] for row in rows]
        yield batch, candidates, texts, np.array([row.label for row in rows], np.float32), counts


def carry_over(
    state: State, agent: Agent, featurize: Featurize, carried: Iterator[Carried], key: PRNGKeyArray
) -> State:
    """Fills the replay with labels of another run and lets the ensemble learn from them, batch by batch.

    Args:
      state: of a run before its first step, whose replay has room for them.
      agent: with a reward model that learns.
      featurize: of responses that the policy may not have written.
      carried: from `batches`.
      key: random key.
    """
    assert agent.learn_rewards is not None
    reward_model, replay = state.ensemble, state.replay
    for number, (batch, candidates, texts, labels, counts) in enumerate(carried):
        features = featurize(batch, candidates, texts)
        if agent.standardise and number == 0:
            reward_model = ensemble.calibrate(reward_model, features)
        replay = add_pairs(replay, features, jnp.asarray(labels), jnp.asarray(counts))
        reward_model, _ = agent.learn_rewards(reward_model, replay, jax.random.fold_in(key, number))
    logging.info("the ensemble begins with %d labels of another run", int(replay.added))
    return replace(state, ensemble=reward_model, replay=replay)
