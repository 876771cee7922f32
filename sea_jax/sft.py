"""Supervised fine-tuning of a starting policy: `python -m sea_jax.sft --config=configs/quickstart_sft.py`."""

import functools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from sea_jax import config as configuration
from sea_jax import learner
from sea_jax.config import SftSettings
from sea_jax.data.fingerprint import of_records
from sea_jax.data.prompts import DataSettings, Rendered, collate, load_prompts, load_records
from sea_jax.data.references import reference_ids
from sea_jax.learner import Learner, LearnerConfig
from sea_jax.models import decoder, tokenizer
from sea_jax.models.config import ModelConfig
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.policy import Policy, export_policy, load_weights, read_files
from sea_jax.preflight import check_length
from sea_jax.runtime import cache, console, files, metrics
from sea_jax.runtime.progress import Progress
from sea_jax.types import Array, Params, Prompts

flags.adopt_module_key_flags(console)  # so that --help shows --config

RECIPE = "sea_jax_sft.json"  # in the output: the configuration that made it
PROMPTS = "sea_jax_sft_prompts"  # there, too: what tells the prompts that it was made of from others


def negative_logprob(
    trained: Params,
    frozen: Params,
    prompts: Prompts,
    tokens: Array,
    lengths: Array,
    num_tokens: Array,
    *,
    config: ModelConfig,
    learner_config: LearnerConfig,
) -> Array:
    """Returns the mean negative log-prob of the references' tokens, or a microbatch's share of it.

    Args:
      trained: the trained part of the parameters.
      frozen: the frozen part.
      prompts: Prompts, [B, P].
      tokens: [B, 1, T] int32, references with the end-of-sequence token, padded on the right.
      lengths: [B, 1] int32.
      num_tokens: scalar int32, tokens that the mean is over: of the whole batch, of which this may be a part.
      config: ModelConfig.
      learner_config: LearnerConfig.

    Returns:
      Scalar float32, nats per token.
    """
    (values,) = learner.response_logprobs(
        frozen,
        (trained,),
        prompts,
        tokens,
        lengths,
        config=config,
        remat=learner_config.remat,
        dtype=learner_config.dtype,
    )
    return -values.sum() / num_tokens


@functools.partial(jax.jit, static_argnames=("config", "learner_config"), donate_argnames=("state",))
def update(
    state: Learner,
    frozen: Params,
    prompts: Prompts,
    tokens: Array,
    lengths: Array,
    *,
    config: ModelConfig,
    learner_config: LearnerConfig,
) -> tuple[Learner, Array]:
    """Takes one gradient step on a batch of references.

    Args:
      state: Learner; its buffers are donated.
      frozen: the frozen part of the parameters.
      prompts: Prompts, [B, P].
      tokens: [B, 1, T] int32.
      lengths: [B, 1] int32.
      config: ModelConfig.
      learner_config: LearnerConfig.

    Returns:
      Learner and the loss before the step, nats per token.
    """

    def gradient(microbatch: tuple[Prompts, Array, Array]) -> tuple[Params, Array]:
        share, of_trained = jax.value_and_grad(negative_logprob)(
            state.trained, frozen, *microbatch, lengths.sum(), config=config, learner_config=learner_config
        )
        return of_trained, share

    gradients, loss = learner.accumulated(
        gradient, (prompts, tokens, lengths), learner_config.microbatch_size, decoder.specs(config, state.trained)
    )
    updates, opt_state = learner.optimizer(learner_config).update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    return Learner(trained=trained, opt_state=opt_state, step=state.step + 1), loss


Pair = tuple[Rendered, list[int]]
"""A prompt and the token ids of its reference."""


def with_references(
    rendered: Sequence[Rendered], words: Tokenizer, data: DataSettings, max_response_tokens: int
) -> list[Pair]:
    """Returns the prompts whose reference, the end of the sequence included, is given and short enough.

    Args:
      rendered: prompts.
      words: the policy's tokenizer.
      data: as they were rendered with.
      max_response_tokens: T.

    Returns:
      Those that are kept, with their references.

    Raises:
      ValueError: none is.
    """
    pairs = [(one, reference_ids(one, words, data)) for one in rendered if one.record["reference"].strip()]
    kept = [(one, ids) for one, ids in pairs if len(ids) <= max_response_tokens]
    logging.info("%d of %d prompts have a reference of up to %d tokens", len(kept), len(rendered), max_response_tokens)
    if not kept:
        raise ValueError(
            f"none of {len(rendered)} prompts has a reference of up to config.max_response_tokens={max_response_tokens} "
            "tokens; name the references' field in config.data.reference_field, or raise the limit"
        )
    return kept


def _batches(
    pairs: Sequence[Pair], pad_id: int, *, max_response_tokens: int, bucket: int, batch_size: int, seed: int
) -> Iterator[tuple[Prompts, np.ndarray, np.ndarray]]:
    """Endless batches of prompts, reference tokens [B, 1, T] and lengths [B, 1], in an order of the seed's."""

    def collate_pairs(rows: Sequence[Pair]) -> tuple[Prompts, np.ndarray, np.ndarray]:
        batch = collate([one for one, _ in rows], pad_id, bucket)
        tokens = np.full((len(rows), 1, max_response_tokens), pad_id, np.int32)
        lengths = np.zeros((len(rows), 1), np.int32)
        for row, (_, ids) in enumerate(rows):
            tokens[row, 0, : len(ids)], lengths[row] = ids, len(ids)
        return Prompts(jnp.asarray(batch["tokens"]), jnp.asarray(batch["valid"])), tokens, lengths

    return iter(grain.MapDataset.source(pairs).shuffle(seed=seed).repeat().batch(batch_size, batch_fn=collate_pairs))


def fine_tune(config: SftSettings, output: Path) -> None:
    """Fine-tunes a policy on references and writes it as a Hugging Face directory.

    Args:
      config: SftSettings.
      output: where the model goes; an older one that was made here is replaced.

    Raises:
      ValueError: a field or file does not fit, or the output holds something that was not made here.
      NotFiniteError: the loss is not finite.
    """
    begin = time.perf_counter()
    if output.exists() and any(output.iterdir()) and not (output / RECIPE).exists():
        raise ValueError(f"config.output={config.output}: {output} holds something else; name another directory")
    records = load_records(config.data)
    found = read_files(config.policy.source)
    limit, words = config.max_response_tokens, found.tokenizer
    train_prompts, heldout_prompts = load_prompts(config.data, words, config.eval.num_prompts, records)
    batches = functools.partial(
        _batches,
        pad_id=words.pad_id,
        max_response_tokens=limit,
        bucket=config.data.bucket,
        batch_size=config.data.batch_size,
        seed=config.seed,
    )
    train_pairs = with_references(train_prompts, words, config.data, limit)
    train_batches = batches(train_pairs)
    heldout_pairs = with_references(heldout_prompts, words, config.data, limit)
    heldout_batches = batches(heldout_pairs)
    longest = max((*train_pairs, *heldout_pairs), key=lambda pair: len(pair[0].tokens) + len(pair[1]))
    check_length(found.config, len(longest[0].tokens), len(longest[1]), "max_response_tokens")
    policy = load_weights(found, config.policy.train_last_layers, dtype=config.policy.dtype)
    heldout = [next(heldout_batches) for _ in range(max(1, len(heldout_pairs) // config.data.batch_size))]
    learner_config = learner.configured(config.learner, total_steps=config.steps, dtype=config.policy.dtype)
    loss = jax.jit(functools.partial(negative_logprob, config=policy.config, learner_config=learner_config))

    def heldout_loss(trained: Params) -> float:
        return float(np.mean([loss(trained, policy.frozen, *batch, batch[2].sum()) for batch in heldout]))

    state = learner.init(policy.initial, learner_config)
    before = heldout_loss(state.trained)
    with Progress(config.steps, "step", 0) as progress:
        for step in range(1, config.steps + 1):
            state, value = update(
                state, policy.frozen, *next(train_batches), config=policy.config, learner_config=learner_config
            )
            metrics.check_finite({"train/loss": float(value)}, step, None)
            progress.update(step, {"loss": float(value)})
    after = heldout_loss(state.trained)
    end_id = heldout_pairs[0][1][-1]
    _write(policy, state.trained, config, of_records(*records), output, end_id)
    print(
        f"held-out loss {before:.3f} -> {after:.3f} nats per token after {config.steps} steps of {config.data.batch_size}; "
        f"{time.perf_counter() - begin:.0f} s in all. The model is in {output}"
    )


def _holds(output: Path, config: SftSettings) -> bool:
    """Whether a directory holds the model that a configuration makes."""
    recipe = output / RECIPE
    if not recipe.exists():
        return False
    try:
        found = configuration.sft_from_json(json.loads(recipe.read_text(encoding="utf-8")), str(recipe))
    except ValueError as error:
        logging.warning("%s is not readable (%s): the model is made anew", recipe, error)
        return False
    return found == config and _made_of(output, config)


def _made_of(output: Path, config: SftSettings) -> bool:
    """Whether a directory holds a model that was made of the prompts as they are now, as far as can be told."""
    known = output / PROMPTS
    if not known.exists():
        return True
    try:
        prompts = of_records(*load_records(config.data))
    except (OSError, ValueError) as error:
        logging.warning("whether %s was made of these prompts cannot be told (%s)", output, error)
        return True
    same = known.read_text(encoding="utf-8").strip() == prompts
    if not same:
        logging.warning("%s was made of other prompts than there are now: it is made anew", output)
    return same


def _write(policy: Policy, trained: Params, config: SftSettings, prompts: str, output: Path, end_id: int) -> None:
    """Puts a model with its recipe in the output's place when both are complete; what is there stays usable until then.

    The token that it was taught to end with, `end_id`, will end its responses.
    """
    output = output.resolve()  # of a link, what it points to is replaced
    workshop = output.with_name(f".{output.name}.unfinished")  # on the same disk, or it could not be renamed
    new, old = workshop / "new", workshop / "old"
    if workshop.exists():  # a run was killed here
        shutil.rmtree(workshop)
    export_policy(policy, trained, new, config.output_dtype)
    tokenizer.list_end(new, policy.tokenizer, end_id)
    files.write_whole(new / PROMPTS, prompts + "\n")
    files.write_whole(new / RECIPE, configuration.to_json(config))
    if output.exists():
        output.replace(old)
    new.replace(output)
    shutil.rmtree(workshop)


def main() -> None:
    """Reads the flags and fine-tunes, unless the output holds the same model already."""
    if console.HELP_CONFIG.value:
        print(configuration.table(configuration.unchecked(console.CONFIG.value)))
        return
    config = configuration.resolve_sft(console.CONFIG.value)
    cache.keep_compiled_programs()
    console.prepare_devices()
    output = cache.resolve(config.output)
    if _holds(output, config):
        print(f"{output} holds this model already; nothing to do")
        return
    fine_tune(config, output)


if __name__ == "__main__":
    console.run(main)
