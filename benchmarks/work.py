"""How much work each part of the step has to do, counted by hand: what no implementation can avoid.

A product of [m, k] and [k, n] counts 2 m k n operations. Norms, softmax, activations and sampling are not counted, nor
is anything computed twice. Letters: B prompts, M samples, T new tokens, L layers, d width, f inner width, H heads, G
key-value heads, h head size, V vocabulary.
"""

from dataclasses import dataclass

from benchmarks.inputs import Inputs, Settings
from sea_jax.models.config import EncoderConfig, ModelConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What a part has to do at least.

    Attributes:
      flops: operations.
      bytes_read: weights and key-value caches that decoding reads from memory; 0: not counted.
    """

    flops: float
    bytes_read: float = 0.0


def layer_weights(config: ModelConfig) -> int:
    """Returns the weights of one layer's matrices: q, o of d x Hh; k, v of d x Gh; gate, up, down of d x f.

    Args:
      config: ModelConfig.
    """
    attention = 2 * config.d_model * config.head_dim * (config.num_heads + config.num_kv_heads)
    return attention + (3 if config.gated_mlp else 2) * config.d_model * config.d_ff


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Returns one layer's operations for so many (query, key) pairs: 2 H h for the score and 2 H h for the mixture.

    Args:
      config: ModelConfig.
      pairs: allowed by the mask.
    """
    return 4 * config.num_heads * config.head_dim * pairs


def count(
    config: ModelConfig, encoder: EncoderConfig, settings: Settings, inputs: Inputs, text_tokens: list[int]
) -> dict[str, Work]:
    """Returns the work of each part; prompts are shared by their responses, padding is not counted.

    Args:
      config: the policy's.
      encoder: the oracle's.
      settings: Settings.
      inputs: Inputs.
      text_tokens: tokens of each text that the oracle encodes.

    Returns:
      "first token", "other tokens", "generate" (their sum), "features", "oracle", "ERM", "learn", "step".
    """
    lengths = inputs.valid.sum(1).astype(float)  # of the prompts
    num_prompts, samples, new = len(lengths), settings.samples, settings.new_tokens
    layers, weights, itemsize = config.num_layers, layer_weights(config), ITEMSIZE[settings.dtype]
    vocab_weights = config.vocab_size * config.d_model

    # Prompts: 2 x weights per token, causal attention, and the unembedding of the last token.
    prompt_layer = 2 * weights * lengths.sum() + attention_flops(config, (lengths * (lengths + 1) / 2).sum())
    prefill = layers * prompt_layer + 2 * num_prompts * vocab_weights

    def responses_layer(count: int, tokens: int) -> float:
        """`count` responses per prompt: 2 x weights per token, attention to the prompt and to themselves."""
        pairs = count * (tokens * lengths + tokens * (tokens + 1) / 2).sum()
        return 2 * weights * num_prompts * count * tokens + attention_flops(config, pairs)

    # The last token drawn need not be fed again: T - 1 tokens of each sample pass the layers and the unembedding.
    decode = layers * responses_layer(samples, new - 1) + 2 * num_prompts * samples * (new - 1) * vocab_weights
    # Each step reads all weights, the prompts' keys and values once, and those of the responses so far.
    kv_bytes = 2 * layers * config.num_kv_heads * config.head_dim * itemsize
    own_tokens = num_prompts * samples * sum(range(1, new))
    decode_bytes = (new - 1) * (itemsize * (layers * weights + vocab_weights) + kv_bytes * lengths.sum())
    decode_bytes += kv_bytes * own_tokens

    # Reference: the first layers over prompts and candidates.
    features = settings.feature_layer * (prompt_layer + responses_layer(samples, new))

    # Encoder: per token 2 x (4 d d + 2 d f); attention 4 d per pair of tokens.
    width = encoder.d_model
    per_token = 2 * (4 * width * width + 2 * width * encoder.d_ff)
    oracle = encoder.num_layers * sum(per_token * tokens + 4 * width * tokens**2 for tokens in text_tokens)

    # Heads: d h + h h + h weights each; a gradient step costs three forward passes over both features of a pair.
    d, h = inputs.features.shape[-1], settings.hidden_size
    head = 2 * (d * h + h * h + h)
    erm_rows = num_prompts * samples + 3 * 2 * settings.erm_steps * settings.erm_batch_size
    erm = settings.num_heads * head * erm_rows

    # Policy forward 1 and backward 2, reference forward 1; the vocabulary at the two responses' positions only.
    forward = layers * (prompt_layer + responses_layer(2, new)) + 2 * num_prompts * 2 * new * vocab_weights
    learn = 4 * forward

    generate = prefill + decode
    return {
        "first token": Work(prefill),
        "other tokens": Work(decode, decode_bytes),
        "generate": Work(generate),
        "features": Work(features),
        "oracle": Work(oracle),
        "ERM": Work(erm),
        "learn": Work(learn),
        "step": Work(generate + features + oracle + erm + learn),
    }
