"""From a configuration to the parts of a run, each on its place in the mesh: policy, prompts, features, oracle, evaluation."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sea_jax import evaluation, features
from sea_jax.actors import generation
from sea_jax.actors.bridge import bridge, connect
from sea_jax.actors.generation import GenerationConfig
from sea_jax.actors.in_process import in_process
from sea_jax.actors.responder import Responder, open_responder
from sea_jax.actors.stop import ending
from sea_jax.actors.texts import finished_by, texts_of
from sea_jax.agent import FillSlots, named_keys, step_key
from sea_jax.config import RunSettings
from sea_jax.data.prompts import Batch, Rendered, load_prompts
from sea_jax.methods.by_name import METHODS
from sea_jax.oracles import oracle, people
from sea_jax.policy import Policy, load_weights, read_files
from sea_jax.policy_logprobs import under_policy
from sea_jax.preflight import check_judge, check_length, check_mesh, check_reward_model, read_sources
from sea_jax.runtime import processes
from sea_jax.settings import user_function
from sea_jax.types import Array, Generate, PolicyServers, Preference, Prompts


def method(settings: RunSettings) -> FillSlots:
    """Returns how the slots of an agent are filled.

    Raises:
      ValueError: there is no such method, or it cannot take a setting; nothing has been loaded then.
    """
    name = settings.method
    if name not in METHODS and name.count(":") != 1:
        raise ValueError(f"config.method={name!r}: must be one of {', '.join(METHODS)}, or my_module:my_method")
    if settings.loss.name == "xpo" and name in METHODS and name != "xpo":
        raise ValueError(
            f"config.loss.name=xpo: method={name} has no responses of the reference policy; take method=xpo"
        )
    build = METHODS[name] if name in METHODS else user_function(name, "method")
    return build(settings)


@dataclass(frozen=True)
class Parts:
    """What training and evaluation have in common.

    Attributes:
      policy: Policy.
      train_prompts: rendered; none where no policy step will be taken.
      heldout_prompts: rendered.
      preference: the oracle's taste, free of noise; None: people label, and are asked about nothing else.
      judge: that of who compares in evaluations besides; None: nobody does.
      sampling: how candidates are drawn.
      stop: texts that end a response.
      texts: Candidates -> B lists of M texts, as an oracle reads them.
      finished: Candidates -> which of them ended by themselves, [B, M].
      features: what the ERM sees.
      num_features: d, its width.
      servers: those that write the responses; None: this process does.
      weights_dtype: of the weights on their way to them.
    """

    policy: Policy
    train_prompts: list[Rendered]
    heldout_prompts: list[Rendered]
    preference: Preference | None
    judge: Preference | None
    sampling: GenerationConfig
    stop: tuple[str, ...]
    texts: evaluation.Decode
    finished: evaluation.Finished
    features: features.Featurize
    num_features: int
    servers: PolicyServers | None
    weights_dtype: str

    def spent(self) -> dict[str, float]:
        """Returns what chat models as oracle and judge were asked so far and what that cost, in the first process."""
        asked = {"oracle": self.preference, "judge": self.judge} if processes.is_first() else {}
        return {
            f"{who}/{name}": value
            for who, taste in asked.items()
            if (spent := getattr(taste, "spent", None))
            for name, value in asdict(spent()).items()
        }

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


def parts(
    config: RunSettings,
    mesh: Mesh,
    training: bool = True,
    began: datetime | None = None,
    workdir: Path | None = None,
) -> Parts:
    """Loads what a run works with.

    Args:
      config: RunSettings.
      mesh: the one that is set.
      training: False: no policy step will be taken.
      began: when the run did, which is what chat templates are told where they ask for the time; None: now.
      workdir: where a judge's answers are kept; None: nowhere.

    Raises:
      ValueError: a field or file does not fit.
    """
    for field, some in (("oracle", config.oracle), ("eval.judge", config.eval.judge)):
        check_judge(some, field)
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
    check_reward_model(config.oracle, "oracle")
    check_reward_model(config.eval.judge, "eval.judge")
    loaded = load_weights(found, config.policy.train_last_layers, config.erm.feature_layer, dtype=config.policy.dtype)
    sampled = generation.configured(config.sampling, loaded, config.policy.dtype)
    references = {
        record["prompt"]: text for some in records for record in some if (text := record["reference"].strip())
    }
    taste = functools.partial(
        oracle.preference,
        token_file=config.bridge_token_file,
        now=began,
        references=references,
        workdir=workdir,
    )
    return Parts(
        policy=loaded,
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        preference=None if config.oracle.kind == people.KIND else taste(config.oracle, field="oracle"),
        judge=taste(config.eval.judge, field="eval.judge") if config.eval.judge.kind else None,
        sampling=sampled,
        stop=config.sampling.stop,
        texts=texts_of(loaded.tokenizer, config.sampling),
        finished=finished_by(sampled.eos_ids, loaded.tokenizer, config.sampling.stop),
        features=features_for(config, loaded, read_by_sampler=sampler_reads_features(config)),
        num_features=features.width(config.erm, loaded),
        servers=connect(config.actor, config.bridge_token_file) if config.actor.kind == "bridge" else None,
        weights_dtype=config.actor.weights_dtype,
    )


def features_for(config: RunSettings, policy: Policy, *, read_by_sampler: bool) -> features.Featurize:
    """Returns what the ERM sees of responses."""
    return features.build(
        config.erm,
        policy,
        dtype=config.policy.dtype,
        read_by_sampler=read_by_sampler,
        batch_size=config.sampling.batch_size,
    )


def features_of_any(config: RunSettings, loaded: Parts) -> features.Featurize:
    """Returns what the ERM sees of responses that the policy here may not have written."""
    by_sampler = loaded.features is features.from_sampler  # else a trunk that is there is not loaded once more
    return features_for(config, loaded.policy, read_by_sampler=False) if by_sampler else loaded.features


def sampler_reads_features(config: RunSettings) -> bool:
    """Returns whether who writes reads the features of a response on the way: in this process, and all of the response."""
    return config.actor.kind == "in_process" and not config.sampling.stop


def responder(
    config: RunSettings, loaded: Parts, batches: Callable[[int], Batch], directory: Path
) -> AbstractContextManager[Responder]:
    """Opens the way from prompts to candidates.

    Args:
      config: RunSettings.
      loaded: Parts.
      batches: batch number -> a batch of training prompts.
      directory: where responses are kept until a checkpoint has passed them.
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
