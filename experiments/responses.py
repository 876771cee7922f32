"""A fixed pool: real responses of the quickstart's starting policy to real prompts, and what can be known of each.

It is written once and kept in the cache directory, by its size and what it was made of. What was written before an
interruption is kept.
"""

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float32, Int32

from configs import quickstart
from sea_jax import config
from sea_jax.actors import generation
from sea_jax.actors.texts import texts_of
from sea_jax.data.prompts import Rendered, collate, load_prompts
from sea_jax.models import decoder
from sea_jax.models.config import ModelConfig
from sea_jax.oracles.embedding import embed_texts
from sea_jax.policy import Policy, load_policy
from sea_jax.runtime import cache, files
from sea_jax.types import Params, Prompts

HELD_OUT = 0.25  # of the prompts
SEED = 0
AT_A_TIME = 512  # responses written at a time
LAYERS = (6, 12, 18, 24, 30)  # hidden states are read behind these; the last is behind the last norm


@dataclass(frozen=True)
class Responses:
    """N responses to each of P prompts: the greedy one, then samples.

    Attributes:
      num_train: the first so many prompts are trained on, the others held out.
      prompts: P texts.
      references: P summaries that people wrote.
      texts: P lists of N.
      columns: by name, arrays [P, N, ...] float32 or int32: lengths (tokens), logprobs (summed, under the starting policy),
        mean-L and last-L (hidden states behind layer L: mean over the response's tokens, and its last), minilm.
      prompt_embeddings: MiniLM's, of norm 1.
      reference_embeddings: the same of the references.
    """

    num_train: int
    prompts: list[str]
    references: list[str]
    texts: list[list[str]]
    columns: dict[str, np.ndarray]
    prompt_embeddings: Float32[np.ndarray, "P e"]
    reference_embeddings: Float32[np.ndarray, "P e"]


def load_or_write(num_prompts: int, num_responses: int) -> Responses:
    """Returns the pool of a size, from the cache if it is there.

    Args:
      num_prompts: P.
      num_responses: samples per prompt, beside the greedy response.

    Raises:
      ValueError: there are not so many prompts, or the starting policy has not been made yet.
    """
    run = config.resolve(quickstart.get_config())
    policy = load_policy(run.policy.source, train_last_layers=0, dtype=run.policy.dtype)
    made_of = (
        num_prompts,
        num_responses,
        SEED,
        HELD_OUT,
        LAYERS,
        policy.fingerprint,
        repr(run.sampling),
        repr(run.data),
    )
    path = cache.cache_dir() / f"pool-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.npz"
    if path.exists():
        return _read(path)
    num_train = num_prompts - round(HELD_OUT * num_prompts)
    train, heldout = load_prompts(run.data, policy.tokenizer, num_prompts - num_train)
    rendered = [*train[:num_train], *heldout]
    if len(rendered) < num_prompts or len(heldout) < num_prompts - num_train:
        raise ValueError(f"--prompts={num_prompts}: there are {len(train)} to train on and {len(heldout)} held out")
    _save(path, _write_responses(run, policy, rendered, num_responses, num_train, path.with_suffix("")))
    return _read(path)  # as every later call will have it


def _write_responses(
    run: config.RunSettings,
    policy: Policy,
    rendered: Sequence[Rendered],
    num_responses: int,
    num_train: int,
    unfinished: Path,
) -> Responses:
    """Has every response written and read, a portion of the prompts at a time, each kept in a directory until all are there."""
    configured, decode = generation.configured, texts_of(policy.tokenizer, run.sampling)
    sampled = configured(run.sampling, policy, run.policy.dtype, num_samples=num_responses)
    greedy = configured(run.sampling, policy, run.policy.dtype, num_samples=1, temperature=0.0)
    model = policy.config
    if model.num_layers != LAYERS[-1]:
        raise ValueError(f"hidden states are read behind layers {LAYERS}; the model has {model.num_layers}")
    params = decoder.recut(decoder.join(policy.frozen, policy.reference), LAYERS[:-1])
    unfinished.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, np.ndarray]] = []
    portion = max(1, AT_A_TIME // num_responses)
    for start in range(0, len(rendered), portion):
        path = unfinished / f"{start}.npz"
        if not path.exists():
            some = list(rendered[start : start + portion])
            padded = some + some[-1:] * (portion - len(some))
            batch = collate(padded, pad_id=policy.tokenizer.pad_id, bucket=run.data.bucket)
            prompts = Prompts(batch["tokens"], batch["valid"])
            key = jax.random.fold_in(jax.random.key(SEED), start)
            both = [generation.generate(params, prompts, key, config=model, sampling=how) for how in (greedy, sampled)]
            tokens, lengths, logprobs = (
                jnp.concatenate([getattr(each, name) for each in both], axis=1)
                for name in ("tokens", "lengths", "logprobs")
            )
            states = hidden_states(params, prompts, tokens, lengths, config=model)
            columns = {"lengths": lengths, "logprobs": logprobs.sum(-1), **states}
            columns = {name: np.asarray(value)[: len(some)] for name, value in columns.items()}
            texts = [g + s for g, s in zip(*map(decode, both), strict=True)][: len(some)]
            _save_arrays(path, columns, texts)
            logging.info("%d of %d prompts answered", start + len(some), len(rendered))
        parts.append(_read_arrays(path))
    texts = [row for part in parts for row in json.loads(str(part.pop("json")))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    embed = embed_texts(run.oracle.encoder)
    flat = embed([text for row in texts for text in row])
    columns["minilm"] = flat.reshape(len(texts), -1, flat.shape[-1])
    prompt_texts = [each.record["prompt"] for each in rendered]
    references = [each.record["reference"] for each in rendered]
    return Responses(num_train, prompt_texts, references, texts, columns, embed(prompt_texts), embed(references))


@partial(jax.jit, static_argnames=("config",))
def hidden_states(
    params: Params,
    prompts: Prompts,
    tokens: Int32[jax.Array, "B M T"],
    lengths: Int32[jax.Array, "B M"],
    *,
    config: ModelConfig,
) -> dict[str, Float32[jax.Array, "B M d"]]:
    """Returns mean-L and last-L behind every stack of layers, the last stack's behind the last norm.

    Args:
      params: a decoder's parameters, cut at LAYERS.
      prompts: Prompts.
      tokens: padded on the right.
      lengths: at least 1.
      config: ModelConfig.
    """
    valid = jnp.arange(tokens.shape[-1]) < lengths[..., None]
    streams = decoder.embed(params, config, prompts.tokens, prompts.valid, tokens, valid, dtype="float32")
    found = {}
    for layer, stack in zip(LAYERS, params["stacks"], strict=True):
        streams, _ = decoder.run_stack(stack, config, streams)
        assert streams.responses is not None
        behind = streams.responses if layer < LAYERS[-1] else decoder.final(params, config, streams.responses)
        found[f"mean-{layer}"] = jnp.where(valid[..., None], behind, 0).sum(2) / lengths[..., None]
        found[f"last-{layer}"] = jnp.take_along_axis(behind, (lengths - 1)[..., None, None], axis=2)[:, :, 0]
    return found


TEXTS = ("num_train", "prompts", "references", "texts")


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray], texts: Any) -> None:
    """Writes arrays, hidden states and embeddings in half precision, and beside them what JSON can hold."""
    halved = {name: array.astype(np.float16) if array.ndim == 3 else array for name, array in arrays.items()}
    content = io.BytesIO()
    np.savez(content, json=np.array(json.dumps(texts)), **halved)  # type: ignore[arg-type]
    files.write_whole(path, content.getvalue())


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads what `_save_arrays` wrote, in single precision; the texts as "json"."""
    with np.load(path) as saved:
        arrays = {name: saved[name] for name in saved.files}
    return {name: array.astype(np.float32) if array.ndim == 3 else array for name, array in arrays.items()}


EMBEDDINGS = ("prompt_embeddings", "reference_embeddings")


def _save(path: Path, pool: Responses) -> None:
    """Writes a pool whole, in the place of its portions."""
    arrays = pool.columns | {name: getattr(pool, name) for name in EMBEDDINGS}
    _save_arrays(path, arrays, {name: getattr(pool, name) for name in TEXTS})
    shutil.rmtree(path.with_suffix(""))


def _read(path: Path) -> Responses:
    arrays = _read_arrays(path)
    texts = json.loads(str(arrays.pop("json")))
    of_prompts, of_references = (arrays.pop(name) for name in EMBEDDINGS)
    return Responses(**texts, columns=arrays, prompt_embeddings=of_prompts, reference_embeddings=of_references)


def main() -> None:
    """Writes the pool, or says that it is there."""
    parser = argparse.ArgumentParser(prog="python -m experiments.responses", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512, help="P, a quarter of them held out")
    parser.add_argument("--responses", type=int, default=32, help="N, samples per prompt")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    cache.keep_compiled_programs()
    pool = load_or_write(arguments.prompts, arguments.responses)
    print(f"{len(pool.prompts)} prompts, {pool.num_train} of them to train on, {len(pool.texts[0])} responses each")


if __name__ == "__main__":
    main()
