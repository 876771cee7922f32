"""Our side: the parts of a step by the library's own functions, put together as `sea_jax.train` does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import Inputs, Settings
from sea_jax import ensemble, features, learner, losses
from sea_jax.actors import generation
from sea_jax.actors.generation import GenerationConfig, SamplingSettings
from sea_jax.actors.texts import texts_of
from sea_jax.ensemble import EnsembleSettings
from sea_jax.learner import LearnerConfig
from sea_jax.models import decoder
from sea_jax.oracles import preferences
from sea_jax.oracles.embedding import embedding_similarity
from sea_jax.policy import Policy, load_policy
from sea_jax.replay import Replay
from sea_jax.types import Array, Candidates, PairLogps, PreferenceBatch, Prompts

response_logprobs = jax.jit(learner.response_logprobs, static_argnames=("config", "remat", "dtype"))


class JaxStep:
    """The parts of a step in sea_jax; `generate`, `features`, `oracle`, `erm` and `learn` are what is measured."""

    def __init__(self, settings: Settings, inputs: Inputs, policy: Path, encoder: Path):
        """Loads the models.

        Args:
          settings: Settings.
          inputs: Inputs.
          policy: directory of a decoder in the format of transformers.
          encoder: directory of a BERT in that format.
        """
        self.settings, self.inputs = settings, inputs
        self.policy = load_policy(
            str(policy), train_last_layers=0, feature_layer=settings.feature_layer, dtype="float32"
        )
        self.prompts = Prompts(jnp.asarray(inputs.tokens), jnp.asarray(inputs.valid))
        self.sampling = sampling_config(settings, self.policy)
        self.texts = texts_of(self.policy.tokenizer, SamplingSettings())
        self.featurize = features.of_reference(
            self.policy.reference,
            self.policy.config,
            feature_stack=self.sampling.feature_stack,
            dtype=self.sampling.dtype,
        )
        self.reward = embedding_similarity(str(encoder))
        self.label = preferences.labelled(
            preferences.by_reward(self.reward, settings.oracle_scale), preferences.LABELS["bradley_terry"]
        )
        self.learner_config = learner_config(settings, len(inputs.posts))
        self.learner = learner.init(self.policy.reference, self.learner_config)
        self.loss = dpo(settings.beta)
        erm = ensemble_config(settings)
        heads = jax.tree.map(jnp.asarray, inputs.heads)
        self.ensemble = ensemble.Ensemble(
            heads=heads,
            anchor=heads,
            opt_state=ensemble.optimizer(erm).init(heads),
            shift=jnp.asarray(inputs.shift),
            scale=jnp.asarray(inputs.scale),
        )
        self.replay = Replay(
            features=jnp.asarray(inputs.replay_features),
            labels=jnp.asarray(inputs.replay_labels),
            added=jnp.asarray(len(inputs.replay_labels), jnp.int32),
        )
        self.learn_rewards = jax.jit(partial(ensemble.update, config=erm))

    def candidates(self) -> Candidates:
        """The given responses, as the sampler hands them on."""
        responses, lengths = jnp.asarray(self.inputs.responses), jnp.asarray(self.inputs.lengths)
        return Candidates(
            tokens=responses,
            lengths=lengths,
            logprobs=jnp.zeros(responses.shape),
            features=jnp.zeros((*lengths.shape, 0)),
        )

    def generate(self, seed: int, new_tokens: int, greedy: bool = False) -> np.ndarray:
        """Writes M responses to each prompt, all of the same length; greedy: one.

        Args:
          seed: of the sampler.
          new_tokens: T.
          greedy: take the most probable token.

        Returns:
          [B, M, T] int32.
        """
        how = replace(self.sampling, max_new_tokens=new_tokens)
        how = replace(how, num_samples=1, temperature=0.0) if greedy else how
        out = generation.generate(
            decoder.join(self.policy.frozen, self.learner.trained),
            self.prompts,
            jax.random.key(seed),
            config=self.policy.config,
            sampling=how,
        )
        return np.asarray(out.tokens)

    def features(self) -> np.ndarray:
        """Returns the mean hidden state over the tokens of every candidate, [B, M, d] float32."""
        batch = {"tokens": self.inputs.tokens, "valid": self.inputs.valid}
        return np.asarray(self.featurize(batch, self.candidates(), ()))

    def similarities(self, posts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns the cosine of the embeddings of posts and responses.

        Args:
          posts: N texts.
          responses: a multiple of N texts.

        Returns:
          [multiple, N] float64.
        """
        multiple = len(responses) // len(posts)
        return self.reward([*posts] * multiple, responses).reshape(multiple, -1)

    def oracle(self, posts: Sequence[str], seed: int) -> np.ndarray:
        """Decodes the candidates and labels the duels by the similarity of response and post (Bradley-Terry).

        Args:
          posts: B texts.
          seed: of the labels.

        Returns:
          [B] float64 in {0, 1}.
        """
        texts = self.texts(self.candidates())
        first, second = ([row[i] for row, i in zip(texts, self.inputs.duel[:, side], strict=True)] for side in (0, 1))
        asks = [f"benchmark/{seed}-{row}" for row in range(len(posts))]
        keys = jax.random.split(jax.random.key(seed), len(posts))
        (judgement,) = self.label(posts, first, second, preferences.drawn_order(keys), keys, asks)
        return judgement.label

    def erm(self, seed: int) -> np.ndarray:
        """Computes the rewards of all candidates, then takes the ERM's gradient steps on the replay.

        Args:
          seed: of the batches drawn from the replay.

        Returns:
          [K, B, M] float32, the rewards before the steps.
        """
        rewards = ensemble.rewards(self.ensemble, jnp.asarray(self.inputs.features))
        self.ensemble, _ = self.learn_rewards(self.ensemble, self.replay, jax.random.key(seed))
        jax.block_until_ready(self.ensemble)
        return np.asarray(rewards)

    def logprobs(self, responses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns the log-probs of response tokens under the policy.

        Args:
          responses: [B, M, T] int32.
          lengths: [B, M] int32.

        Returns:
          [B, M, T] float32; 0 on padding.
        """
        (values,) = response_logprobs(
            self.policy.frozen,
            (self.learner.trained,),
            self.prompts,
            responses,
            lengths,
            config=self.policy.config,
            remat=self.learner_config.remat,
            dtype=self.learner_config.dtype,
        )
        return np.asarray(values)

    def learn(self) -> float:
        """Takes one DPO step on all weights of the policy; returns the loss before it."""
        responses, lengths = self.inputs.duellists()
        batch = PreferenceBatch(
            prompts=self.prompts,
            tokens=jnp.asarray(responses),
            lengths=jnp.asarray(lengths),
            labels=jnp.asarray(self.inputs.labels),
            weights=jnp.ones(len(self.inputs.labels)),
        )
        self.learner, report = learner.update(
            self.learner,
            self.policy.frozen,
            self.policy.reference,
            batch,
            loss=self.loss,
            config=self.policy.config,
            learner_config=self.learner_config,
        )
        jax.block_until_ready(self.learner)
        return float(report["loss"])


@cache  # one function per beta, so that a step is compiled once
def dpo(beta: float) -> Callable[[PairLogps], Array]:
    """Returns the loss.

    Args:
      beta: DPO's.
    """
    return losses.bind(losses.LOSSES["dpo"], {"beta": beta})


def sampling_config(settings: Settings, policy: Policy) -> GenerationConfig:
    """Returns how candidates are drawn: no token ends a response, so that both sides write the same number of them.

    Args:
      settings: Settings.
      policy: Policy.
    """
    return GenerationConfig(
        num_samples=settings.samples,
        max_new_tokens=settings.new_tokens,
        eos_ids=(),
        pad_id=policy.tokenizer.pad_id,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        feature_stack=policy.feature_stack,
        frozen_stacks=len(policy.frozen["stacks"]),
        dtype=settings.dtype,
    )


def ensemble_config(settings: Settings) -> EnsembleSettings:
    """Returns the ERM's hyper-parameters.

    Args:
      settings: Settings.
    """
    return EnsembleSettings(
        num_heads=settings.num_heads,
        hidden_size=settings.hidden_size,
        learning_rate=settings.erm_learning_rate,
        weight_decay=settings.erm_weight_decay,
        anchor_strength=settings.anchor_strength,
        steps=settings.erm_steps,
        batch_size=settings.erm_batch_size,
    )


def learner_config(settings: Settings, num_pairs: int) -> LearnerConfig:
    """Returns the policy's hyper-parameters: a constant learning rate, all pairs at once, activations kept.

    Args:
      settings: Settings.
      num_pairs: pairs of the step.
    """
    return LearnerConfig(
        learning_rate=settings.learning_rate,
        warmup_fraction=0.0,
        final_fraction=1.0,
        b1=settings.b1,
        b2=settings.b2,
        clip_norm=settings.clip_norm,
        microbatch_size=num_pairs,
        remat=False,
        total_steps=1000,
        dtype=settings.dtype,
    )
