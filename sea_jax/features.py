"""What the ERM sees of a response: hidden states of a transformer that is never trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from sea_jax.data import batching
from sea_jax.data.conversations import conversation_encoder
from sea_jax.models import deberta, decoder, encoder, packing, partition, tokenizer
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import Config, DebertaConfig, EncoderConfig, ModelConfig
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.policy import Policy
from sea_jax.settings import AT_LEAST_1, DTYPE, NOT_NEGATIVE, naming, setting
from sea_jax.types import AnyArray, Array, Candidates, Params, Prompts

Texts = Sequence[Sequence[str]]  # B lists of M responses
Featurize = Callable[[Mapping[str, Any], Candidates, Texts], Float32[Array, "B M d"]]
"""A batch of prompts, its candidates and their texts -> features."""


@dataclass(frozen=True)
class FeatureSettings:
    """What the ERM sees."""

    trunk: str = setting(
        "",
        '"": hidden states of the reference policy; else an encoder, or a reward model, that reads prompt and response',
    )
    trunk_dtype: str = setting("float32", "compute dtype of the trunk", DTYPE)
    trunk_batch_size: int = setting(16, "texts that the trunk reads at a time", AT_LEAST_1)
    feature_layer: int = setting(
        0, "behind this many layers of the reference policy; 0: behind the last norm", NOT_NEGATIVE
    )
    standardise: bool = setting(
        True, "features by their spread among the first responses; neither the paper nor its code does"
    )

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        if self.trunk and self.feature_layer:
            yield (
                f"config.erm.feature_layer={self.feature_layer}: features come from erm.trunk={self.trunk}; "
                "set one of them"
            )


def build(
    settings: FeatureSettings, policy: Policy, *, dtype: str, read_by_sampler: bool, batch_size: int
) -> Featurize:
    """Returns where the ERM's features come from.

    Args:
      settings: FeatureSettings.
      policy: Policy.
      dtype: the policy's compute dtype.
      read_by_sampler: the sampler in this process writes, which reads features on its way through frozen layers.
      batch_size: the reference policy reads the responses to so many prompts at a time; 0: to all of a batch.
    """
    if settings.trunk:
        with naming("erm.trunk", settings.trunk):
            return of_trunk(settings.trunk, dtype=settings.trunk_dtype, batch_size=settings.trunk_batch_size)
    if policy.features_are_frozen and read_by_sampler:
        return from_sampler
    reference = decoder.join(policy.frozen, policy.reference)
    return of_reference(
        reference, policy.config, feature_stack=policy.feature_stack, dtype=dtype, batch_size=batch_size
    )


def width(settings: FeatureSettings, policy: Policy) -> int:
    """Returns d, the width of the ERM's features: the hidden size of whatever is read."""
    if not settings.trunk:
        return policy.config.d_model
    with naming("erm.trunk", settings.trunk):
        return trunk_width(settings.trunk)


BUCKET = 64  # tokens; sequences of a trunk are padded to a multiple of it

SOURCE, CANDIDATE = "<|source|>", "<|candidate|>"  # what PairRM puts before a prompt and before a response
MAX_SOURCE_TOKENS, MAX_TOKENS = 1224, 2048  # of a prompt's part and of the whole (https://github.com/sail-sg/oat)
MAX_CONVERSATION_TOKENS = 4096  # of a decoder's sequences

_Row = tuple[list[int], tuple[int, int]]  # a sequence's tokens and the two places in it that features are read by
_Encode = Callable[[str, Sequence[str]], list[_Row]]  # a prompt and its responses
_Tokens = Int32[AnyArray, "b S"]
_Valid = Bool[AnyArray, "b S"]
_Places = Int32[AnyArray, "b 2"]
_Read = Callable[[Params, _Tokens, _Valid, _Places], Float[Array, "b d"]]


def from_sampler(batch: Mapping[str, Any], candidates: Candidates, texts: Texts) -> Float32[Array, "B M d"]:
    """Features that the sampler read on its way through layers that are frozen: they cost nothing."""
    return candidates.features


def of_reference(
    reference: Params, config: ModelConfig, *, feature_stack: int | None, dtype: str, batch_size: int = 0
) -> Featurize:
    """Features are hidden states of the frozen reference policy, run again over what the trained policy wrote.

    Args:
      reference: the reference policy's parameters.
      config: ModelConfig.
      feature_stack: as of `response_features`.
      dtype: compute dtype.
      batch_size: prompts whose responses are read at a time, which bounds the memory of their activations; 0: all.
    """

    def featurize(batch: Mapping[str, Any], candidates: Candidates, texts: Texts) -> Float32[Array, "B M d"]:
        parts = []
        for rows in batching.portions(len(candidates.tokens), batch_size):
            prompts = Prompts(batch["tokens"][rows], batch["valid"][rows])
            tokens, lengths = candidates.tokens[rows], candidates.lengths[rows]
            num_tokens = int(np.asarray(prompts.valid).sum() + np.asarray(lengths).sum())
            parts.append(
                response_features(
                    reference,
                    prompts,
                    tokens,
                    lengths,
                    config=config,
                    feature_stack=feature_stack,
                    dtype=dtype,
                    rows=packing.rounded(num_tokens, prompts.valid.size + tokens.size),
                )
            )
        return jnp.concatenate(parts)

    return featurize


@partial(jax.jit, static_argnames=("config", "feature_stack", "dtype", "rows"))
def response_features(
    params: Params,
    prompts: Prompts,
    tokens: Int32[Array, "B M T"],
    lengths: Int32[Array, "B M"],
    *,
    config: ModelConfig,
    feature_stack: int | None,
    dtype: str,
    rows: int | None = None,
) -> Float32[Array, "B M d"]:
    """Returns the mean hidden state over each response's tokens, read from a model that did not write them.

    It is what the sampler reads on the way when the weights are the same.

    Args:
      params: a decoder's parameters; only the first `feature_stack` stacks are run.
      prompts: Prompts.
      tokens: padded on the right.
      lengths: at least 1.
      config: ModelConfig.
      feature_stack: behind this many stacks of layers; None: behind the last norm.
      dtype: compute dtype.
      rows: so many tokens are computed, at least as many as are valid; None: padding too.
    """
    valid = jnp.arange(tokens.shape[-1]) < lengths[..., None]
    streams = decoder.embed(params, config, prompts.tokens, prompts.valid, tokens, valid, dtype=dtype)
    counted = None if rows is None else packing.choose(decoder.valid_tokens(prompts.valid, valid), rows)
    for stack in params["stacks"][:feature_stack]:
        streams, _ = decoder.run_stack(stack, config, streams, counted=counted)
    assert streams.responses is not None
    hidden = streams.responses if feature_stack is not None else decoder.final(params, config, streams.responses)
    hidden = jnp.where(valid[..., None], hidden.astype(jnp.float32), 0)
    return partition.whole(hidden.sum(2) / lengths[..., None])


def of_trunk(source: str, *, dtype: Any, batch_size: int) -> Featurize:
    """Features are hidden states of a separate model that reads prompt and response together.

    A BERT reads them as a pair of sentences: [CLS] prompt [SEP] response [SEP]. Its features are the mean of the last
    hidden states over the response and its separator; where both do not fit, the prompt's beginning is cut.

    A DeBERTa-v2/v3 with the tokens of PairRM (https://huggingface.co/llm-blender/PairRM-hf), the paper's trunk, reads
    [CLS] <|source|> prompt [SEP] [CLS] <|candidate|> response [SEP], as in https://github.com/sail-sg/oat. Its features
    are the last hidden states of <|source|> and <|candidate|>, side by side; what is too long is cut at its end.

    A reward model that is a decoder (paper, App. G.4) reads the turns of its chat template, see `conversation_encoder`. Its
    features are the hidden state from which it would score.

    Args:
      source: anything that `hf.load` takes.
      dtype: of the trunk's matrices and its computation.
      batch_size: sequences read at a time, sorted by length.

    Returns:
      Featurize, d as `trunk_width` says.

    Raises:
      ValueError: the source is not such a model, or its tokenizer does not fit it or lacks the tokens.
    """
    trunk_width(source)  # refuses what is no trunk before it is loaded
    loaded = hf.load(source)
    config = loaded.config
    own_tokenizer = tokenizer.fitted(tokenizer.load(loaded.directory), config.vocab_size)
    if isinstance(config, DebertaConfig):
        max_tokens = min(MAX_TOKENS, config.max_positions) if config.absolute_positions else MAX_TOKENS
        encode, read = _of_prefix_tokens(config, own_tokenizer, max_tokens, dtype)
    elif isinstance(config, ModelConfig):
        max_tokens = None  # a response may alone be longer than the prompts are cut for
        encode, read = _of_last_token(config, own_tokenizer, loaded.directory, dtype)
    else:
        assert isinstance(config, EncoderConfig)
        max_tokens = config.max_positions
        encode, read = _of_response_mean(config, own_tokenizer, max_tokens, dtype)
    left = isinstance(config, ModelConfig)
    specs = trunk_specs(config)
    params = partition.put({name: loaded.params[name] for name in specs}, specs, dtype)

    @jax.jit
    def features(params: Params, tokens: _Tokens, valid: _Valid, marks: _Places) -> Float32[Array, "b d"]:
        tokens, valid, marks = partition.batches((tokens, valid, marks))
        return partition.whole(read(params, tokens, valid, marks).astype(jnp.float32))

    def featurize(batch: Mapping[str, Any], candidates: Candidates, texts: Texts) -> Float32[Array, "B M d"]:
        rows = [row for pair in zip(batch["prompt"], texts, strict=True) for row in encode(*pair)]
        sequences, places = [ids for ids, _ in rows], np.array([marks for _, marks in rows], np.int32)
        parts, order = [], []
        for some, tokens, valid in batching.by_length(
            sequences, batch_size=batch_size, bucket=BUCKET, pad_id=own_tokenizer.pad_id, longest=max_tokens, left=left
        ):
            marks = np.zeros((batch_size, 2), np.int32)
            marks[: len(some)] = places[some]
            parts.append(features(params, tokens, valid, marks))
            order.append(some)
        back = np.argsort(np.concatenate(order))
        return jnp.concatenate(parts)[back].reshape(len(texts), -1, parts[0].shape[-1])

    return featurize


def trunk_width(source: str) -> int:
    """Returns d, the width of the features that `of_trunk` reads, without loading the trunk.

    Raises:
      ValueError: the source is no model that can be a trunk.
    """
    return width_as_trunk(hf.read_config(source))


def width_as_trunk(config: Config) -> int:
    """Returns d, the width of the features that `of_trunk` reads from a model; refuses one that cannot be a trunk.

    Raises:
      ValueError: it is a decoder that does not score.
    """
    if isinstance(config, DebertaConfig):
        return 2 * config.d_model
    if isinstance(config, ModelConfig) and not config.scalar_head:
        raise ValueError(
            "expected a BERT or DeBERTa-v2/v3 encoder, or a decoder that is a reward model, found one with an unembedding"
        )
    return config.d_model


def trunk_specs(config: Config) -> Params:
    """Returns a ParamSpec for every parameter that a trunk's hidden states come from: not for what stands behind them."""
    specs = hf.abstract(config)
    if not isinstance(config, ModelConfig):
        return specs
    return {name: specs[name] for name in ("embed", "stacks", "final_norm")}


def longest_conversation(config: ModelConfig) -> int:
    """Returns to how many tokens of prompt and response a decoder's prompts are cut."""
    return min(MAX_CONVERSATION_TOKENS, config.longest_sequence)


def _of_response_mean(
    config: EncoderConfig, tokenizer: Tokenizer, max_tokens: int, dtype: Any
) -> tuple[_Encode, _Read]:
    """BERT: the marks are where the response begins and ends."""

    def encode(prompt: str, responses: Sequence[str]) -> list[_Row]:
        prompt_ids, rows = tokenizer.encode(tokenizer.quoted(prompt)), []  # [CLS] ... [SEP]
        for response in responses:
            response_ids = tokenizer.encode(tokenizer.quoted(response))[1:][: max_tokens // 2]
            room = max_tokens - len(response_ids)
            kept = prompt_ids if len(prompt_ids) <= room else [prompt_ids[0], *prompt_ids[1 - room :]]
            rows.append((kept + response_ids, (len(kept), len(kept) + len(response_ids))))
        return rows

    def read(params: Params, tokens: _Tokens, valid: _Valid, marks: _Places) -> Float32[Array, "b d"]:
        position = jnp.arange(tokens.shape[1])
        in_response = (position >= marks[:, :1]) & (position < marks[:, 1:])
        types = in_response.astype(jnp.int32)
        hidden = encoder.apply(params, config, tokens, valid, token_types=types, dtype=dtype)
        return encoder.mean_pool(hidden, in_response)

    return encode, read


def _of_prefix_tokens(
    config: DebertaConfig, tokenizer: Tokenizer, max_tokens: int, dtype: Any
) -> tuple[_Encode, _Read]:
    """DeBERTa: the marks are the positions of the two prefix tokens."""
    known = tokenizer.backend.get_vocab()
    if missing := [token for token in (SOURCE, CANDIDATE) if token not in known]:
        raise ValueError(
            f"its tokenizer has no token {' and no token '.join(missing)}; a DeBERTa trunk needs both {SOURCE} and "
            f"{CANDIDATE}, as llm-blender/PairRM-hf has them"
        )

    def cut(ids: list[int], limit: int) -> list[int]:
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]  # the separator stays

    def encode(prompt: str, responses: Sequence[str]) -> list[_Row]:
        source_ids = tokenizer.encode(SOURCE + tokenizer.quoted(prompt))
        prompt_ids, rows = cut(source_ids, MAX_SOURCE_TOKENS * max_tokens // MAX_TOKENS), []
        for response in responses:
            response_ids = cut(tokenizer.encode(CANDIDATE + tokenizer.quoted(response)), max_tokens - len(prompt_ids))
            marks = prompt_ids.index(known[SOURCE]), len(prompt_ids) + response_ids.index(known[CANDIDATE])
            rows.append((prompt_ids + response_ids, marks))
        return rows

    def read(params: Params, tokens: _Tokens, valid: _Valid, marks: _Places) -> Float[Array, "b d"]:
        hidden = deberta.apply(params, config, tokens, valid, dtype=dtype)
        return jnp.take_along_axis(hidden, marks[..., None], axis=1).reshape(len(tokens), -1)

    return encode, read


def _of_last_token(config: ModelConfig, tokenizer: Tokenizer, directory: Path, dtype: Any) -> tuple[_Encode, _Read]:
    """A decoder: its sequences are padded on the left, so that all end together; the marks are not needed."""
    encode_pair = conversation_encoder(directory, tokenizer, longest_conversation(config), as_pair=False)
    encode_pair("Q", "A")  # a template that takes no conversation says so now

    def encode(prompt: str, responses: Sequence[str]) -> list[_Row]:
        return [(encode_pair(prompt, response), (0, 0)) for response in responses]

    def read(params: Params, tokens: _Tokens, valid: _Valid, marks: _Places) -> Float[Array, "b d"]:
        return decoder.final(params, config, decoder.hidden_states(params, config, tokens, valid, dtype=dtype)[:, -1])

    return encode, read
