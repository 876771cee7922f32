"""From a configuration to the parts of a run, each on its place in the mesh: policy, prompts, features, oracle, evaluation."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sea_jax import ensemble, evaluation, features, learner
from sea_jax.actors import generation
from sea_jax.actors.bridge import bridge, connect
from sea_jax.actors.generation import GenerationConfig
from sea_jax.actors.in_process import in_process
from sea_jax.actors.responder import Responder, open_responder
from sea_jax.actors.stop import ending
from sea_jax.actors.texts import texts_of
from sea_jax.agent import FillSlots, State, named_keys, step_key
from sea_jax.config import RunSettings
from sea_jax.data.prompts import Batch, Rendered, evaluation_batches, load_prompts
from sea_jax.ensemble import Ensemble
from sea_jax.evaluation import Evaluation, Responses
from sea_jax.methods.online import online
from sea_jax.methods.sea import sea
from sea_jax.models import decoder, partition
from sea_jax.oracles import oracle, preferences
from sea_jax.policy import Policy, load_weights, read_files
from sea_jax.policy_logprobs import under_policy
from sea_jax.preflight import check_length, check_mesh, check_reward_model, read_sources
from sea_jax.replay import empty_replay
from sea_jax.settings import user_function
from sea_jax.types import (
    Array,
    Generate,
    Params,
    PolicyServers,
    Preference,
    Prompts,
)

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


@dataclass(frozen=True)
class Parts:
    """What training and evaluation have in common.

    Attributes:
      policy: Policy.
      train_prompts: rendered; none where no policy step will be taken.
      heldout_prompts: rendered.
      preference: the oracle's taste, free of noise.
      sampling: how candidates are drawn.
      stop: texts that end a response.
      texts: Candidates -> B lists of M texts, as an oracle reads them.
      features: what the ERM sees.
      num_features: d, its width.
      servers: those that write the responses; None: this process does.
      weights_dtype: of the weights on their way to them.
    """

    policy: Policy
    train_prompts: list[Rendered]
    heldout_prompts: list[Rendered]
    preference: Preference
    sampling: GenerationConfig
    stop: tuple[str, ...]
    texts: evaluation.Texts
    features: features.Featurize
    num_features: int
    servers: PolicyServers | None
    weights_dtype: str

    def padding(self, bucket: int) -> dict[str, int]:
        """Returns how batches of prompts are padded."""
        return {"pad_id": self.policy.tokenizer.pad_id, "bucket": bucket}

    def generate(self, how: GenerationConfig, batch_size: int = 0, *, again: bool = False) -> Generate:
        """Returns an actor that writes with this policy.

        Args:
          how: GenerationConfig.
          batch_size: this process writes to so many prompts at a time; 0: to all of a batch.
          again: the same prompts will come again.
        """
        frozen, model = self.policy.frozen, self.policy.config
        write = (
            in_process(frozen, model, how, batch_size, again=again)
            if self.servers is None
            else bridge(self.servers, frozen, model, how, weights_dtype=self.weights_dtype)
        )
        return ending(write, self.policy.tokenizer, self.stop)


def parts(config: RunSettings, mesh: Mesh, training: bool = True, began: datetime | None = None) -> Parts:
    """Loads what a run works with.

    Args:
      config: RunSettings.
      mesh: the one that is set.
      training: False: no policy step will be taken.
      began: when the run did, which is what chat templates are told where they ask for the time; None: now.

    Raises:
      ValueError: a field or file does not fit.
    """
    records = read_sources(config)
    found = read_files(config.policy.source)
    found = replace(found, tokenizer=replace(found.tokenizer, now=began))
    check_mesh(config, mesh, found.config, training=training)
    train_prompts, heldout_prompts = load_prompts(
        config.data, found.tokenizer, config.eval.num_prompts, records, training
    )
    for part, field, tokens in (
        (train_prompts, "sampling.max_new_tokens", config.sampling.max_new_tokens),
        (heldout_prompts, "eval.max_new_tokens", config.eval.max_new_tokens),
    ):
        check_length(found.config, max((len(one.tokens) for one in part), default=0), tokens, field)
    check_reward_model(config.oracle)
    loaded = load_weights(found, config.policy.train_last_layers, config.erm.feature_layer, dtype=config.policy.dtype)
    return Parts(
        policy=loaded,
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        preference=oracle.preference(config.oracle, config.bridge_token_file, began),
        sampling=generation.configured(config.sampling, loaded, config.policy.dtype),
        stop=config.sampling.stop,
        texts=texts_of(loaded.tokenizer, config.sampling),
        features=features.build(
            config.erm,
            loaded,
            dtype=config.policy.dtype,
            read_by_sampler=sampler_reads_features(config),
            batch_size=config.sampling.batch_size,
        ),
        num_features=features.width(config.erm, loaded),
        servers=connect(config.actor, config.bridge_token_file) if config.actor.kind == "bridge" else None,
        weights_dtype=config.actor.weights_dtype,
    )


def sampler_reads_features(config: RunSettings) -> bool:
    """Returns whether who writes reads the features of a response on the way: in this process, and all of the response."""
    return config.actor.kind == "in_process" and not config.sampling.stop


def replay_capacity(config: RunSettings) -> int:
    """Returns how many duels the replay holds: never more than the run pays for, and always a batch."""
    return max(min(config.erm.replay_capacity, config.max_queries), config.data.batch_size)


def initial_state(config: RunSettings, loaded: Parts, total_steps: int) -> State:
    """Returns the state of a run before its first step.

    Args:
      config: RunSettings.
      loaded: Parts.
      total_steps: policy steps of the schedule.
    """
    model, initial = loaded.policy.config, loaded.policy.initial
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return State(
        learner=learner.init(
            partition.put(initial, decoder.specs(model, initial)),
            learner.configured(config.learner, total_steps=total_steps, dtype=config.policy.dtype),
        ),
        ensemble=ensemble.init(config.erm, loaded.num_features, key),
        replay=empty_replay(replay_capacity(config), loaded.num_features),
        step=0,
        queries=0,
        batches=0,
    )


def responder(
    config: RunSettings, loaded: Parts, batches: Callable[[int], Batch], directory: Path
) -> AbstractContextManager[Responder]:
    """Opens the way from prompts to candidates.

    Args:
      config: RunSettings.
      loaded: Parts.
      batches: batch number -> a batch of training prompts.
      directory: where the responses of an engine are kept until a checkpoint has passed them.
    """

    def following(number: int) -> tuple[Prompts, Array]:
        batch = batches(number)  # without planning, batch i is that of step i
        key = named_keys(step_key(jax.random.key(config.seed), number))["generate"]
        return Prompts(jnp.asarray(batch["tokens"]), jnp.asarray(batch["valid"])), key

    return open_responder(
        config.actor,
        loaded.generate(loaded.sampling, config.sampling.batch_size),
        logprobs=under_policy(loaded.policy, config.policy.dtype),
        initial=loaded.policy.reference,
        next_batch=following,
        directory=directory,
        checkpoints_kept=config.checkpoint.keep,
    )


def heldout_evaluation(
    config: RunSettings,
    loaded: Parts,
    best_of_n: int,
    watched: Callable[[Generate], Generate] = lambda generate: generate,
) -> Evaluation:
    """Returns how a policy is evaluated; the initial policy's responses are written on the way.

    Args:
      config: RunSettings.
      loaded: Parts.
      best_of_n: responses to choose from where the ERM chooses; 0: it never will.
      watched: put around whoever writes the responses, to see how far he is.
    """
    padding, decode = loaded.padding(config.data.bucket), loaded.texts
    how = functools.partial(
        generation.configured,
        config.sampling,
        loaded.policy,
        config.policy.dtype,
        max_new_tokens=config.eval.max_new_tokens,
    )
    heldout = list(evaluation_batches(loaded.heldout_prompts, batch_size=config.eval.batch_size, **padding))
    few = loaded.heldout_prompts[: config.eval.best_of_n_prompts]
    many = how(num_samples=max(best_of_n, 1))
    write_one = watched(loaded.generate(how(num_samples=1, temperature=0.0), again=True))
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
