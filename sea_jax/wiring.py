"""From a configuration to the parts of a run, each on its place in the mesh: policy, prompts, features, oracle, evaluation."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sea_jax import ensemble, evaluation, features, learner, losses
from sea_jax.actors.bridge import bridge
from sea_jax.actors.generation import SamplingConfig
from sea_jax.actors.in_process import at_once, in_process
from sea_jax.actors.journal import Journal
from sea_jax.actors.responder import EngineResponder
from sea_jax.agent import FillSlots, State, named_keys, step_key
from sea_jax.config import RunSettings
from sea_jax.data.prompts import Batch, Record, Rendered, evaluation_batches, load_records, render_all
from sea_jax.ensemble import Ensemble, EnsembleConfig
from sea_jax.evaluation import Evaluation, Responses
from sea_jax.learner import LearnerConfig
from sea_jax.methods.online import online
from sea_jax.methods.sea import sea
from sea_jax.models import decoder, partition, reward
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import Config, ModelConfig
from sea_jax.models.mesh import check_divides
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.oracles import preferences
from sea_jax.oracles.embedding import embedding_similarity
from sea_jax.oracles.reward_model import remote_reward, reward_model_scores
from sea_jax.policy import Policy, load_policy
from sea_jax.replay import empty_replay
from sea_jax.runtime import cache, processes
from sea_jax.settings import addresses, naming, user_function
from sea_jax.types import (
    Array,
    Candidates,
    Generate,
    Oracle,
    PairLogps,
    Params,
    PolicyServers,
    Preference,
    Prompts,
    Respond,
)


def prompts(
    config: ml_collections.ConfigDict,
    words: Tokenizer,
    num_heldout: int,
    loaded: tuple[list[Record], list[Record]] | None = None,
) -> tuple[list[Rendered], list[Rendered]]:
    """Renders the prompts with the policy's tokenizer.

    Args:
      config: the `data` part of a configuration.
      words: the policy's tokenizer.
      num_heldout: held-out prompts to keep, at most.
      loaded: training and held-out records; None: they are read.

    Returns:
      (training prompts, held-out prompts).
    """
    rendered = [
        render_all(
            records,
            words,
            template=config.template,
            chat=config.chat,
            system=config.system,
            max_prompt_tokens=config.max_prompt_tokens,
        )
        for records in loaded or load_records(config)
    ]
    return rendered[0][: config.num_prompts or None], rendered[1][:num_heldout]


def sampling_config(
    config: ml_collections.ConfigDict, loaded: Policy, *, num_samples: int, max_new_tokens: int, temperature: float
) -> SamplingConfig:
    """Returns how responses are drawn.

    Args:
      config: a whole configuration.
      loaded: Policy.
      num_samples: M.
      max_new_tokens: T.
      temperature: 0 is greedy.

    Returns:
      SamplingConfig.
    """
    return SamplingConfig(
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        eos_ids=(loaded.tokenizer.eos_id,),
        pad_id=loaded.tokenizer.pad_id,
        temperature=temperature,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        feature_stack=loaded.feature_stack,
        dtype=config.policy.dtype,
    )


def texts(words: Tokenizer) -> Callable[[Candidates], list[list[str]]]:
    """Returns the function that decodes candidates for people and oracles; learning uses the ids as they were sampled.

    Args:
      words: the policy's tokenizer.

    Returns:
      Candidates [B, M, T] -> B lists of M texts, special tokens left out and stripped.
    """

    def decode(candidates: Candidates) -> list[list[str]]:
        tokens, lengths = np.asarray(candidates.tokens), np.asarray(candidates.lengths)
        return [
            [words.decode(ids[:length].tolist()).strip() for ids, length in zip(*row, strict=True)]
            for row in zip(tokens, lengths, strict=True)
        ]

    return decode


def featurize(
    config: ml_collections.ConfigDict,
    loaded: Policy,
    how: SamplingConfig,
    actor: str = "in_process",
    batch_size: int = 0,
) -> features.Featurize:
    """Returns where the ERM's features come from.

    Args:
      config: the `erm` part of a configuration.
      loaded: Policy.
      how: SamplingConfig.
      actor: who writes; the sampler in this process alone reads features on its way.
      batch_size: the reference policy reads the responses to so many prompts at a time; 0: to all of a batch.

    Returns:
      Featurize.
    """
    if config.trunk:
        with naming("erm.trunk", config.trunk):
            return features.of_trunk(config.trunk, dtype=config.trunk_dtype, batch_size=config.trunk_batch_size)
    if loaded.features_are_frozen and actor == "in_process":
        return features.from_sampler
    return features.of_reference(
        decoder.join(loaded.frozen, loaded.reference),
        loaded.config,
        feature_stack=how.feature_stack,
        dtype=how.dtype,
        batch_size=batch_size,
    )


def num_features(config: ml_collections.ConfigDict, loaded: Policy) -> int:
    """Returns d, the width of the ERM's features.

    Args:
      config: the `erm` part of a configuration.
      loaded: Policy.

    Returns:
      The hidden size of whatever is read.
    """
    if not config.trunk:
        return loaded.config.d_model
    with naming("erm.trunk", config.trunk):
        return features.trunk_width(config.trunk)


def policy_servers(config: ml_collections.ConfigDict, token_file: str) -> PolicyServers:
    """Returns the servers that write the responses.

    Args:
      config: the `actor` part of a configuration.
      token_file: holds their token; "": the environment does.

    Raises:
      ValueError: there is no token.
    """
    from gpu_bridge import client, weights  # the library works without

    route = weights.Route(config.transport, Path(config.weights_directory), config.weights_host, config.weights_port)
    patience = client.Patience(config.timeout_s, config.retries)
    return client.PolicyClient(addresses(config.urls), client.read_token(token_file), patience, route)


def remote_scores(config: ml_collections.ConfigDict, token_file: str) -> Callable[[list[list[int]]], np.ndarray]:
    """Returns the scores of the servers of a reward model.

    Args:
      config: the `oracle` part of a configuration.
      token_file: holds their token; "": the environment does.

    Returns:
      Token ids of N conversations -> [N].

    Raises:
      ValueError: there is no token.
    """
    from gpu_bridge import client  # the library works without

    patience = client.Patience(config.timeout_s, config.retries)
    return client.OracleClient(addresses(config.urls), client.read_token(token_file), patience, config.batch_size).score


def preference(config: ml_collections.ConfigDict, token_file: str = "") -> Preference:
    """Returns the taste behind the oracle.

    Args:
      config: the `oracle` part of a configuration.
      token_file: holds the token of the oracle's servers; "": the environment does.

    Returns:
      Preference.
    """
    if config.kind == "embedding":
        with naming("oracle.encoder", config.encoder):
            return preferences.by_reward(embedding_similarity(config.encoder), config.scale)
    if config.kind == "reward_model":
        with naming("oracle.reward_model", config.reward_model):
            scores = reward_model_scores(
                config.reward_model, dtype=config.dtype, batch_size=config.batch_size, max_tokens=config.max_tokens
            )
        return preferences.by_reward(scores, config.scale)
    if config.kind == "remote":
        served = remote_scores(config, token_file)
        with naming("oracle.reward_model", config.reward_model):
            scores = remote_reward(served, config.reward_model, config.max_tokens)
        return processes.asked_by_first(preferences.by_reward(scores, config.scale))
    return processes.asked_by_first(user_function(config.kind, "oracle.kind"))


def oracle(config: ml_collections.ConfigDict, taste: Preference) -> Oracle:
    """Returns who labels the duels.

    Args:
      config: the `oracle` part of a configuration.
      taste: Preference.

    Returns:
      Oracle.
    """
    labeller = preferences.labelled(taste, preferences.LABELS[config.label])
    return preferences.flipped(labeller, config.flip_probability) if config.flip_probability else labeller


METHODS: Mapping[str, Callable[[RunSettings], FillSlots]] = {"sea": sea, "online": online}


def method(settings: RunSettings) -> FillSlots:
    """Returns how the slots of an agent are filled.

    Raises:
      ValueError: there is no such method, or it cannot take a setting; nothing has been loaded then.
    """
    name = settings.method
    if name not in METHODS and name.count(":") != 1:
        raise ValueError(f"config.method={name!r}: must be one of {', '.join(METHODS)}, or my_module:my_method")
    build = METHODS[name] if name in METHODS else user_function(name, "method")
    return build(settings)


def loss(config: ml_collections.ConfigDict) -> Callable[[PairLogps], Any]:
    """Returns the direct optimizer with its hyper-parameters bound.

    Args:
      config: the `loss` part of a configuration.

    Returns:
      PairLogps [B] -> [B].
    """
    own = losses.LOSSES[config.name] if config.name in losses.LOSSES else user_function(config.name, "loss.name")
    return losses.bind(own, {field: value for field, value in config.items() if field != "name"})


def learner_config(config: ml_collections.ConfigDict, dtype: str, total_steps: int) -> LearnerConfig:
    """Returns how the policy is optimised.

    Args:
      config: the `learner` part of a configuration.
      dtype: compute dtype.
      total_steps: policy steps of the schedule.

    Returns:
      LearnerConfig.
    """
    return LearnerConfig(**config.to_dict(), dtype=dtype, total_steps=total_steps)


@dataclass(frozen=True)
class Parts:
    """What training and evaluation have in common.

    Attributes:
      policy: Policy.
      train_prompts: rendered.
      heldout_prompts: rendered.
      preference: the oracle's taste, free of noise.
      sampling: how candidates are drawn.
      features: what the ERM sees.
      num_features: d, its width.
      servers: those that write the responses; None: this process does.
      weights_dtype: of the weights on their way to them.
    """

    policy: Policy
    train_prompts: list[Rendered]
    heldout_prompts: list[Rendered]
    preference: Preference
    sampling: SamplingConfig
    features: features.Featurize
    num_features: int
    servers: PolicyServers | None
    weights_dtype: str

    def padding(self, bucket: int) -> dict[str, int]:
        """Returns how batches of prompts are padded."""
        return {"pad_id": self.policy.tokenizer.pad_id, "bucket": bucket}

    def generate(self, how: SamplingConfig, batch_size: int = 0) -> Generate:
        """Returns an actor that writes with this policy.

        Args:
          how: SamplingConfig.
          batch_size: this process writes to so many prompts at a time; 0: to all of a batch.
        """
        frozen, model = self.policy.frozen, self.policy.config
        if self.servers is None:
            return in_process(frozen, model, how, batch_size)
        return bridge(self.servers, frozen, model, how, weights_dtype=self.weights_dtype)


def parts(config: ml_collections.ConfigDict, mesh: Mesh, training: bool = True) -> Parts:
    """Loads what a run works with.

    Args:
      config: a whole configuration.
      mesh: the one that is set.
      training: False: no policy step will be taken.

    Returns:
      Parts.

    Raises:
      ValueError: a field or file does not fit.
    """
    records = read_sources(config)
    loaded = load_policy(
        config.policy.source, config.policy.train_last_layers, config.erm.feature_layer, config.policy.dtype
    )
    check_mesh(config, mesh, loaded.config, training=training)
    train_prompts, heldout_prompts = prompts(config.data, loaded.tokenizer, config.eval.num_prompts, records)
    how = sampling_config(
        config,
        loaded,
        num_samples=config.sampling.num_samples,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
    )
    return Parts(
        policy=loaded,
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        preference=preference(config.oracle, config.bridge_token_file),
        sampling=how,
        features=featurize(config.erm, loaded, how, config.actor.kind, config.sampling.batch_size),
        num_features=num_features(config.erm, loaded),
        servers=policy_servers(config.actor, config.bridge_token_file) if config.actor.kind == "bridge" else None,
        weights_dtype=config.actor.weights_dtype,
    )


def read_sources(config: ml_collections.ConfigDict) -> tuple[list[Record], list[Record]]:
    """Reads the prompts and fetches the models of a run, or says of all that cannot be had at once.

    Args:
      config: a whole configuration.

    Returns:
      (training records, held-out records).

    Raises:
      ValueError: one line per model or data set that is not there or cannot be read.
    """
    sources = {"policy.source": config.policy.source, "erm.trunk": config.erm.trunk}
    if config.oracle.kind in ("reward_model", "remote"):
        sources["oracle.reward_model"] = config.oracle.reward_model
    faults = []
    for field, source in sources.items():
        try:
            if field == "oracle.reward_model" and config.oracle.kind == "remote":
                hf.locate(source, weights=False)
            elif source and not source.startswith(cache.PREFIX):
                hf.read_config(source)
        except (OSError, ValueError) as error:
            remedy = (
                f"; a copy of your own is named with --config.{field}=DIRECTORY" if isinstance(error, OSError) else ""
            )
            faults.append(f"config.{field}={source}: {error}{remedy}")
    try:
        records = load_records(config.data)
    except OSError as error:
        faults.append(
            f"config.data.path={config.data.path}: {error}; a copy of your own is named with --config.data.path=PATH"
        )
    if faults:
        raise ValueError("\n".join(faults))
    return records


def check_mesh(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    model: ModelConfig,
    describe: Callable[[str], Config] = hf.read_config,
    training: bool = True,
) -> None:
    """Refuses a mesh that does not divide the batches or the models.

    Args:
      config: a whole configuration.
      mesh: the one that is set.
      model: the policy's configuration.
      describe: source of another model -> its configuration.
      training: False: no policy step is taken.

    Raises:
      ValueError: one line per size that is not divided.
    """
    batch_sizes = {
        "data.batch_size": config.data.batch_size,
        "eval.batch_size": config.eval.batch_size,
        "sampling.batch_size": config.sampling.batch_size,
    }
    models = {"policy.source": model}
    if training:
        batch_sizes["learner.microbatch_size"] = config.learner.microbatch_size
    if config.erm.trunk:
        batch_sizes["erm.trunk_batch_size"] = config.erm.trunk_batch_size
    if config.oracle.kind == "reward_model":
        batch_sizes["oracle.batch_size"] = config.oracle.batch_size
        with naming("oracle.reward_model", config.oracle.reward_model):
            models["oracle.reward_model"] = reward.check(describe(config.oracle.reward_model))
    check_divides(mesh, batch_sizes, models)


def ensemble_config(config: ml_collections.ConfigDict) -> EnsembleConfig:
    """Returns how the ERM is built and learns.

    Args:
      config: the `erm` part of a configuration.

    Returns:
      EnsembleConfig.
    """
    return EnsembleConfig(**{name: config[name] for name in EnsembleConfig.__dataclass_fields__})


def replay_capacity(config: ml_collections.ConfigDict) -> int:
    """Returns how many duels the replay holds: never more than the run pays for, and always a batch.

    Args:
      config: a whole configuration.
    """
    return max(min(config.erm.replay_capacity, config.max_queries), config.data.batch_size)


def initial_state(config: ml_collections.ConfigDict, loaded: Parts, total_steps: int) -> State:
    """Returns the state of a run before its first step.

    Args:
      config: a whole configuration.
      loaded: Parts.
      total_steps: policy steps of the schedule.

    Returns:
      State.
    """
    model, initial = loaded.policy.config, loaded.policy.initial
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return State(
        learner=learner.init(
            partition.put(initial, decoder.specs(model, initial)),
            learner_config(config.learner, config.policy.dtype, total_steps),
        ),
        ensemble=ensemble.init(ensemble_config(config.erm), loaded.num_features, key),
        replay=empty_replay(replay_capacity(config), loaded.num_features),
        step=0,
        queries=0,
        batches=0,
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def logprobs(
    frozen: Params,
    trained: Params,
    prompts: Prompts,
    tokens: Array,
    lengths: Array,
    *,
    config: ModelConfig,
    dtype: str,
) -> Array:
    """Returns the learner's own log-probs of responses that others wrote.

    Args:
      frozen: the frozen part of the policy's parameters.
      trained: the trained part.
      prompts: Prompts, [B, P].
      tokens: [B, m, T] int32.
      lengths: [B, m] int32.
      config: ModelConfig.
      dtype: compute dtype.

    Returns:
      [B, m, T] float32; 0 on padding.
    """
    (own,) = learner.response_logprobs(
        frozen, (trained,), prompts, tokens, lengths, config=config, remat=False, dtype=dtype
    )
    return partition.whole(own)


@dataclass(frozen=True)
class Responder:
    """Who answers the batches of prompts.

    Attributes:
      respond: answers one.
      settle: returns when nothing is on its way any more; before a checkpoint is saved.
      checkpointed: told how many batches were used when a checkpoint is saved.
    """

    respond: Respond
    settle: Callable[[], None]
    checkpointed: Callable[[int], None]


@contextmanager
def responder(
    config: ml_collections.ConfigDict, loaded: Parts, batches: Callable[[int], Batch], directory: Path
) -> Iterator[Responder]:
    """Opens the way from prompts to candidates.

    Args:
      config: a whole configuration.
      loaded: Parts.
      batches: batch number -> a batch of training prompts.
      directory: where the responses of an engine are kept until a checkpoint has passed them.

    Yields:
      Responder.
    """
    generate = loaded.generate(loaded.sampling, config.sampling.batch_size)
    if config.actor.kind == "in_process":
        yield Responder(at_once(generate), lambda: None, lambda batches: None)
        return
    if config.actor.lag and jax.process_count() > 1:
        raise ValueError("config.actor.lag=1: only a learner of one process writes ahead; set it to 0")
    policy = loaded.policy

    def following(number: int) -> tuple[Prompts, Array]:
        batch = batches(number)  # without planning, batch i is that of step i
        key = named_keys(step_key(jax.random.key(config.seed), number))["generate"]
        return Prompts(jnp.asarray(batch["tokens"]), jnp.asarray(batch["valid"])), key

    journal = Journal(directory, config.checkpoint.keep)
    with EngineResponder(
        generate,
        functools.partial(logprobs, policy.frozen, config=policy.config, dtype=config.policy.dtype),
        journal,
        max_logprob_gap=config.actor.max_logprob_gap,
        initial=policy.reference,
        sync_every=config.actor.sync_every,
        next_batch=following if config.actor.lag else None,
    ) as answers:
        yield Responder(answers, answers.settle, journal.checkpointed)


def heldout_evaluation(
    config: ml_collections.ConfigDict,
    loaded: Parts,
    best_of_n: int,
    watched: Callable[[Generate], Generate] = lambda generate: generate,
) -> Evaluation:
    """Returns how a policy is evaluated; the initial policy's responses are written on the way.

    Args:
      config: a whole configuration.
      loaded: Parts.
      best_of_n: responses to choose from where the ERM chooses; 0: it never will.
      watched: put around whoever writes the responses, to see how far he is.

    Returns:
      Evaluation.
    """
    padding, decode = loaded.padding(config.data.bucket), texts(loaded.policy.tokenizer)
    how = functools.partial(sampling_config, config, loaded.policy, max_new_tokens=config.eval.max_new_tokens)
    heldout = list(evaluation_batches(loaded.heldout_prompts, batch_size=config.eval.batch_size, **padding))
    few = loaded.heldout_prompts[: config.eval.best_of_n_prompts]
    many = how(num_samples=max(best_of_n, 1), temperature=config.sampling.temperature)
    write_one = watched(loaded.generate(how(num_samples=1, temperature=0.0)))
    write_many = watched(loaded.generate(many, config.sampling.batch_size))

    def greedy(trained: Params, version: int) -> Responses:
        return evaluation.greedy(write_one, decode, trained, version, heldout)

    def chosen(trained: Params, reward_model: Ensemble, version: int) -> Responses:
        batches = list(evaluation_batches(few, batch_size=config.data.batch_size, **padding))
        key = jax.random.key(config.seed)
        return evaluation.best_of_n(write_many, decode, loaded.features, trained, version, reward_model, batches, key)

    return Evaluation(
        records=[one.record for one in loaded.heldout_prompts],
        preference=loaded.preference,
        greedy=greedy,
        best_of_n=chosen,
        initial=greedy(loaded.policy.reference, version=0),
        swapped=preferences.drawn_order(jax.random.split(jax.random.key(config.seed), len(loaded.heldout_prompts))),
    )
