"""What a model is: sizes and options of a decoder or an encoder, static under jit."""

import math
from dataclasses import dataclass
from typing import Literal

from sea_jax.models import rope


@dataclass(frozen=True)
class Gating:
    """How a reward model weighs several objectives by the prompt (https://arxiv.org/abs/2406.12845).

    Attributes:
      num_objectives: that it scores.
      num_hidden: hidden layers of the network that weighs them.
      hidden_size: of each.
      temperature: of the softmax over the objectives.
    """

    num_objectives: int
    num_hidden: int
    hidden_size: int
    temperature: float


@dataclass(frozen=True)
class ModelConfig:
    """A decoder; hashable, so that jit takes it as a static argument.

    Attributes:
      family: the model_type of its config.json; decides norm and MLP.
      vocab_size: V, tokens with an embedding.
      d_model: d, features of a hidden state.
      num_layers: L.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      head_dim: features of a head.
      d_ff: hidden features of the MLP.
      activation: of the MLP, a key of layers.ACTIVATIONS.
      norm_eps: added to the variance, or mean square, in norms.
      max_positions: longest sequence in tokens that the model was made for, but for some rope scaling rules, which read it.
      window: tokens that some layers attend to, in longer sequences than `longest_sequence`; None: all layers to all.
      rope_theta: base of the rotary frequencies.
      rope_fraction: share of each head's features that is rotated (GPT-NeoX), or of the frequencies (Proportional).
      rope_scaling: how the frequencies are changed for longer sequences, None for not at all.
      tie_embeddings: whether the unembedding is the embedding.
      parallel_residual: whether the MLP reads the layer's input rather than the attention's output (GPT-NeoX).
      attention_bias: whether q, k and v have biases, and o too except in Qwen2.
      mlp_bias: whether the matrices of the MLP have biases.
      scalar_head: whether the last norm is followed by one score (a reward model) rather than by an unembedding.
      gating: of a reward model whose one score is made of several objectives; None: it is one head's.
      init_std: standard deviation of freshly drawn matrices.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt_neox"]
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    activation: str
    norm_eps: float
    max_positions: int
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: rope.RopeScaling | None = None
    tie_embeddings: bool = False
    parallel_residual: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    scalar_head: bool = False
    gating: Gating | None = None
    init_std: float = 0.02
    window: int | None = None

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the layers here read as those of the model do."""
        match self.rope_scaling:
            case rope.Linear(factor) | rope.Dynamic(factor):
                reach = int(self.max_positions * factor)
            case rope.Yarn(factor=factor, original_max_positions=original):
                reach = max(self.max_positions, int(original * factor))
            case _:
                reach = self.max_positions
        return min(reach, self.window or reach)

    @property
    def norm(self) -> Literal["rms", "layer"]:
        """The norm of the family: layer norm with a bias for GPT-NeoX, root mean square for Llama and its kin."""
        return "layer" if self.family == "gpt_neox" else "rms"

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP multiplies its hidden features by a gate, as Llama's does."""
        return self.family != "gpt_neox"

    @property
    def output_bias(self) -> bool:
        """Whether o has a bias."""
        return self.attention_bias and self.family != "qwen2"

    @property
    def head_norms(self) -> bool:
        """Whether q and k are normed head by head before they are rotated, as Qwen3's are."""
        return self.family == "qwen3"


@dataclass(frozen=True)
class EncoderConfig:
    """A BERT encoder; hashable, so that jit takes it as a static argument.

    Attributes:
      family: the model_type of its config.json.
      vocab_size: V, tokens with an embedding.
      d_model: d, features of a hidden state.
      num_layers: L.
      num_heads: heads; each has d_model / num_heads features.
      d_ff: hidden features of the MLP.
      activation: of the MLP, a key of layers.ACTIVATIONS.
      norm_eps: added to the variance in norms.
      max_positions: positions with an embedding, so the longest sequence in tokens.
      num_token_types: token types (sentences of a pair) with an embedding.
      init_std: standard deviation of freshly drawn matrices.
    """

    family: Literal["bert"]
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    activation: str
    norm_eps: float
    max_positions: int
    num_token_types: int
    init_std: float = 0.02


@dataclass(frozen=True)
class DebertaConfig:
    """A DeBERTa-v2 or -v3 encoder; hashable, so that jit takes it as a static argument.

    Attributes:
      family: the model_type of its config.json, which v3 shares with v2.
      vocab_size: V, tokens with an embedding.
      d_model: d, features of a hidden state.
      num_layers: L.
      num_heads: heads; each has d_model / num_heads features.
      d_ff: hidden features of the MLP.
      activation: of the MLP, a key of layers.ACTIVATIONS.
      norm_eps: added to the variance in norms.
      max_positions: positions with an absolute embedding where there are any, so then the longest sequence in tokens.
      absolute_positions: whether token embeddings get absolute positions added.
      num_token_types: token types (sentences of a pair) with an embedding; 0 for none.
      max_relative_positions: distance in tokens at which the buckets, or the embeddings of distances, end.
      position_buckets: buckets to either side that share an embedding, logarithmic in the distance; 0: none share.
      relative_terms: what attention adds for distances: content to position ("c2p"), position to content ("p2c").
      share_projections: whether distances are projected by the matrices that project content.
      norm_relative: whether the embeddings of distances pass a layer norm.
      conv_width: tokens that a convolution beside the first layer sees, an odd number; 0 for no convolution.
      conv_activation: of the convolution, a key of layers.ACTIVATIONS.
      scalar_head: whether one score is read off the first token (a reward model).
      pooler_activation: of the layer before the score, a key of layers.ACTIVATIONS.
      init_std: standard deviation of freshly drawn matrices.
    """

    family: Literal["deberta-v2"]
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    activation: str
    norm_eps: float
    max_positions: int
    absolute_positions: bool
    num_token_types: int
    max_relative_positions: int
    position_buckets: int
    relative_terms: tuple[str, ...]
    share_projections: bool
    norm_relative: bool
    conv_width: int = 0
    conv_activation: str = "tanh"
    scalar_head: bool = False
    pooler_activation: str = "gelu"
    init_std: float = 0.02

    @property
    def num_kv_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.num_heads

    @property
    def longest_sequence(self) -> float:
        """Tokens of the longest sequence that there are positions for; relative ones have no end."""
        return self.max_positions if self.absolute_positions else math.inf

    @property
    def relative_span(self) -> int:
        """Distances to either side that have an embedding of their own."""
        return self.position_buckets or self.max_relative_positions


Config = ModelConfig | EncoderConfig | DebertaConfig
"""The configuration of any model."""
