"""What both sides of the benchmark work on, and what each of them can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Settings:
    """The sizes and hyper-parameters of the step.

    Attributes:
      samples: M, responses per prompt.
      new_tokens: T, tokens of every response; the end-of-sequence token ends none.
      temperature: of the sampler.
      dtype: compute dtype; parameters and Adam's moments are float32.
      feature_layer: the ERM reads the reference policy behind so many layers, one or more of them.
      num_heads: K, of the ERM.
      hidden_size: width of the heads' two hidden layers.
      erm_learning_rate: Adam's.
      erm_weight_decay: L2 in Adam.
      anchor_strength: pull of each head towards its initial weights.
      erm_steps: gradient steps.
      erm_batch_size: pairs per gradient step.
      learning_rate: the policy's, constant.
      b1: Adam's first decay.
      b2: Adam's second decay.
      clip_norm: of the policy's gradient.
      beta: DPO's.
      oracle_scale: of the similarity, inside Bradley-Terry's sigmoid.
    """

    samples: int
    new_tokens: int
    temperature: float
    dtype: str
    feature_layer: int
    num_heads: int
    hidden_size: int
    erm_learning_rate: float
    erm_weight_decay: float
    anchor_strength: float
    erm_steps: int
    erm_batch_size: int
    learning_rate: float
    b1: float
    b2: float
    clip_norm: float
    beta: float
    oracle_scale: float


@dataclass(frozen=True)
class Inputs:
    """The data of the step.

    Attributes:
      posts: B texts, as the oracle sees the prompts.
      tokens: [B, P] int32, the prompts, padded on the left.
      valid: [B, P] bool.
      pad_id: of the policy's tokenizer.
      responses: [B, M, T] int32, candidates.
      lengths: [B, M] int32.
      duel: [B, 2] int32, which candidates are compared.
      labels: [B] float32, 1 where the first wins, 0 where the second.
      features: [B, M, d] float32, of the candidates.
      replay_features: [N, 2, d] float32, of labelled pairs.
      replay_labels: [N] float32 in {0, 1}.
      shift: [d] float32, subtracted from the features of candidates and replay.
      scale: [d] float32, multiplied into them.
      heads: the ERM's initial weights, as in `sea_jax.ensemble.Ensemble`.
    """

    posts: list[str]
    tokens: np.ndarray
    valid: np.ndarray
    pad_id: int
    responses: np.ndarray
    lengths: np.ndarray
    duel: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    replay_features: np.ndarray
    replay_labels: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    heads: dict[str, np.ndarray]

    def duellists(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the compared responses [B, 2, T] and their lengths [B, 2]."""
        rows = np.arange(len(self.duel))[:, None]
        return self.responses[rows, self.duel], self.lengths[rows, self.duel]


class Step(Protocol):
    """One side of the benchmark; what each part returns is described by the two implementations."""

    def generate(self, seed: int, new_tokens: int) -> np.ndarray: ...
    def features(self) -> np.ndarray: ...
    def oracle(self, posts: Sequence[str], seed: int) -> np.ndarray: ...
    def erm(self, seed: int) -> np.ndarray: ...
    def learn(self) -> float: ...
