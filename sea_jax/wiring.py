"""From a configuration to the parts of a run: the policy and its tokenizer, the prompts, the oracle, the rule and the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from sea_jax import cache, data, features, learner, losses, oracles, sampling, tokenizer
from sea_jax.config import user_function
from sea_jax.data import Rendered
from sea_jax.generation import SamplingConfig
from sea_jax.learner import LearnerConfig
from sea_jax.models import decoder, hf
from sea_jax.models.config import ModelConfig
from sea_jax.tokenizer import Tokenizer
from sea_jax.types import Candidates, DuelRule, Oracle, PairLogps, Params, Preference


@dataclass(frozen=True)
class Policy:
    """A loaded decoder, divided for training.

    Attributes:
      config: ModelConfig.
      tokenizer: Tokenizer.
      directory: where both were read.
      frozen: the part of the parameters that is not trained.
      reference: the trained part as it was loaded: pi_ref, and where training starts.
      feature_stack: features stand behind this many stacks of layers; None: behind the last norm.
      features_are_frozen: no layer up to the features is trained.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    directory: Path
    frozen: Params
    reference: Params
    feature_stack: int | None
    features_are_frozen: bool


def policy(source: str, train_last_layers: int, feature_layer: int = 0) -> Policy:
    """Loads a decoder and divides its layers where training begins and where features are read.

    Args:
      source: anything that `hf.load` takes.
      train_last_layers: n; 0 trains everything.
      feature_layer: behind so many layers; 0: behind the last norm.

    Returns:
      Policy.

    Raises:
      ValueError: more layers are named than there are, the source is no decoder, or its tokenizer does not fit it.
    """
    if source.startswith(cache.PREFIX):
        directory = cache.resolve(source)
        if not directory.exists():
            raise ValueError(
                f"config.policy.source={source}: there is no {directory}; make it first with "
                "`python -m sea_jax.sft --config=...` of the config whose output it is"
            )
        source = str(directory)
    loaded = hf.load(source)
    config = loaded.config
    if not isinstance(config, ModelConfig):
        raise ValueError(f"config.policy.source={source}: expected a decoder, found an encoder")
    for field, value in (("policy.train_last_layers", train_last_layers), ("erm.feature_layer", feature_layer)):
        if value > config.num_layers:
            raise ValueError(f"config.{field}={value}: the model has {config.num_layers} layers")
    words = tokenizer.load(loaded.directory)
    tokenizer.check(words, config.vocab_size)
    first_trained = config.num_layers - train_last_layers if train_last_layers else 0
    cuts = tuple(sorted({first_trained, feature_layer} - {0, config.num_layers}))
    params = decoder.recut(loaded.params, cuts)
    bounds = (*cuts, config.num_layers)
    frozen, trained = learner.divide(
        params, sum(bound > first_trained for bound in bounds) if train_last_layers else None
    )
    inner_feature = 0 < feature_layer < config.num_layers
    return Policy(
        config=config,
        tokenizer=words,
        directory=loaded.directory,
        frozen=jax.device_put(frozen),
        reference=jax.device_put(trained),
        feature_stack=bounds.index(feature_layer) + 1 if inner_feature else None,
        features_are_frozen=inner_feature and feature_layer <= first_trained,
    )


def prompts(
    config: ml_collections.ConfigDict, words: Tokenizer, num_heldout: int
) -> tuple[list[Rendered], list[Rendered]]:
    """Loads the prompts and renders them with the policy's tokenizer.

    Args:
      config: the `data` part of a configuration.
      words: the policy's tokenizer.
      num_heldout: held-out prompts to keep, at most.

    Returns:
      (training prompts, held-out prompts).
    """
    rendered = [
        data.render_all(
            records,
            words,
            template=config.template,
            chat=config.chat,
            system=config.system,
            max_prompt_tokens=config.max_prompt_tokens,
        )
        for records in data.load(config)
    ]
    return rendered[0], rendered[1][:num_heldout]


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


def featurize(config: ml_collections.ConfigDict, loaded: Policy, how: SamplingConfig) -> features.Featurize:
    """Returns where the ERM's features come from.

    Args:
      config: the `erm` part of a configuration.
      loaded: Policy.
      how: SamplingConfig.

    Returns:
      Featurize.
    """
    if config.trunk:
        return features.of_trunk(config.trunk)
    if loaded.features_are_frozen:
        return features.from_sampler
    return features.of_reference(learner.join(loaded.frozen, loaded.reference), loaded.config, how)


def num_features(config: ml_collections.ConfigDict, loaded: Policy) -> int:
    """Returns d, the width of the ERM's features.

    Args:
      config: the `erm` part of a configuration.
      loaded: Policy.

    Returns:
      The hidden size of whatever is read.
    """
    return hf.read_config(config.trunk).d_model if config.trunk else loaded.config.d_model


def preference(config: ml_collections.ConfigDict) -> Preference:
    """Returns the taste behind the oracle.

    Args:
      config: the `oracle` part of a configuration.

    Returns:
      Preference.
    """
    if config.kind == "embedding":
        return oracles.by_reward(oracles.embedding_similarity(config.encoder), config.scale)
    return user_function(config.kind, "oracle.kind")


def oracle(config: ml_collections.ConfigDict, taste: Preference) -> Oracle:
    """Returns who labels the duels.

    Args:
      config: the `oracle` part of a configuration.
      taste: Preference.

    Returns:
      Oracle.
    """
    labeller = oracles.labelled(taste, oracles.LABELS[config.label])
    return oracles.flipped(labeller, config.flip_probability) if config.flip_probability else labeller


def rule(name: str) -> DuelRule:
    """Returns a duel rule, jitted.

    Args:
      name: one of sampling.RULES, or my_module:my_rule.

    Returns:
      DuelRule.
    """
    return jax.jit(sampling.RULES[name] if name in sampling.RULES else user_function(name, "exploration.rule"))


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
