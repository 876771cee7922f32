"""Model configurations as frozen dataclasses, read from and written to the fields of a Hugging Face config.json."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from sea_jax.models import rope
from sea_jax.models.config import Config, DebertaConfig, EncoderConfig, Gating, ModelConfig
from sea_jax.models.layers import ACTIVATIONS


def from_hf(config: Mapping[str, Any]) -> Config:
    """Reads the fields of a Hugging Face config.json, of transformers 4 (rope_scaling) or 5 (rope_parameters) style.

    Raises:
      ValueError: an unknown model_type, or a field that is missing or has a value that is not supported.
    """
    model_type = config.get("model_type")
    match model_type:
        case "llama" | "mistral" | "qwen2" | "qwen3":
            return _llama(config, model_type)
        case "gpt_neox":
            return _gpt_neox(config)
        case "bert":
            return _bert(config)
        case "deberta-v2":
            return _deberta(config)
    known = "llama, mistral, qwen2, qwen3, gpt_neox, bert and deberta-v2"
    raise ValueError(f"config.json field 'model_type' is {model_type!r}; supported are {known}")


def to_hf(config: Config) -> dict[str, Any]:
    """Writes the fields that transformers reads from a config.json, the inverse of `from_hf`.

    They are plain JSON values, with rope both in the transformers 4 and in the transformers 5 style.
    """
    common: dict[str, Any] = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
    }
    if isinstance(config, EncoderConfig):
        return common | {
            "architectures": ["BertModel"],
            "layer_norm_eps": config.norm_eps,
            "type_vocab_size": config.num_token_types,
            "position_embedding_type": "absolute",
        }
    if isinstance(config, DebertaConfig):
        return common | {
            **(
                {"architectures": ["DebertaV2ForSequenceClassification"], **_ONE_LABEL}
                if config.scalar_head
                else {"architectures": ["DebertaV2Model"]}
            ),
            "pooler_hidden_act": config.pooler_activation,
            "pooler_hidden_size": config.d_model,
            "layer_norm_eps": config.norm_eps,
            "position_biased_input": config.absolute_positions,
            "type_vocab_size": config.num_token_types,
            "relative_attention": True,
            "max_relative_positions": config.max_relative_positions,
            "position_buckets": config.position_buckets or -1,
            "pos_att_type": list(config.relative_terms),
            "share_att_key": config.share_projections,
            "norm_rel_ebd": "layer_norm" if config.norm_relative else "none",
            "conv_kernel_size": config.conv_width,
            "conv_act": config.conv_activation,
        }
    scaling = _rope_scaling_to_hf(config)
    parameters: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"} | scaling
    if config.rope_fraction != 1.0 or config.family == "gpt_neox":
        parameters["partial_rotary_factor"] = config.rope_fraction
    common |= {"rope_parameters": parameters, "tie_word_embeddings": config.tie_embeddings}
    head = _GATED if config.gating else _SCORE if config.scalar_head else "ForCausalLM"
    common["architectures"] = [_CLASSES[config.family] + head]
    if config.scalar_head:
        common |= _ONE_LABEL
    if config.gating:
        common |= {
            "num_objectives": config.gating.num_objectives,
            "gating_n_hidden": config.gating.num_hidden,
            "gating_hidden_dim": config.gating.hidden_size,
            "gating_temperature": config.gating.temperature,
        }
    # Readers of the older style take rope_scaling alone where both stand, so it repeats everything.
    if scaling:
        common["rope_scaling"] = parameters
    if config.family != "gpt_neox":
        common |= {
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
        }
    match config.family:
        case "llama":
            return common | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
        case "mistral":
            return common | {"sliding_window": config.window}
        case "qwen2":
            return common | {"use_sliding_window": False}
        case "qwen3":
            return common | {"use_sliding_window": False, "attention_bias": config.attention_bias}
    return common | {
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.rope_fraction,
        "rotary_emb_base": config.rope_theta,
    }


_ONE_LABEL: Mapping[str, Any] = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_REQUIRED: Any = object()


def _field(config: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """One field of a config.json, checked to be of a kind; a null or absent field takes the default."""
    value = config.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"config.json has no field {name!r}; it must be there and of type {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"config.json field {name!r} is {value!r}; it must be of type {kind.__name__}")
    return value


def _size(config: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> int:
    """A field that must be a positive number."""
    value = _field(config, name, int, default)
    if value < 1:
        raise ValueError(f"config.json field {name!r} is {value}; it must be at least 1")
    return value


def _activation(config: Mapping[str, Any], default: str, field: str = "hidden_act") -> str:
    """A field that names one of the known activation functions."""
    name = _field(config, field, str, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json field {field!r} is {name!r}; supported are {', '.join(sorted(ACTIVATIONS))}")
    return name


def _head_dim(d_model: int, num_heads: int) -> int:
    """Features per head where no field of its own says so."""
    if d_model % num_heads:
        raise ValueError(
            f"config.json field 'hidden_size' is {d_model}, not a multiple of 'num_attention_heads' {num_heads}"
        )
    return d_model // num_heads


_CLASSES: Mapping[str, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt_neox": "GPTNeoX",
}
_SCORE = "ForSequenceClassification"
_GATED = "ForRewardModelWithGating"  # https://huggingface.co/RLHFlow/ArmoRM-Llama3-8B-v0.1


def _scalar_head(config: Mapping[str, Any], family: str) -> bool:
    """Whether the architectures name a model with one label, a reward model, rather than with an unembedding."""
    if _CLASSES[family] + _SCORE not in _field(config, "architectures", list, []):
        return False
    labels = _num_labels(config)
    if labels != 1:
        raise ValueError(
            f"config.json field 'architectures' names {_CLASSES[family] + _SCORE} with {labels} labels (num_labels, or "
            "id2label, or two without them); a reward model of one label is supported"
        )
    return True


def _gating(config: Mapping[str, Any], family: str) -> Gating | None:
    """How a reward model weighs its objectives, by the prompt as ArmoRM does; None: it has but one.

    Raises:
      ValueError: it makes one score of several in another way.
    """
    names = [str(name) for name in _field(config, "architectures", list, [])]
    several = [name for name in ("num_objectives", "num_quantiles") if config.get(name) is not None]
    if f"Llama{_GATED}" in names and family == "llama" and "num_quantiles" not in several:
        num_hidden, temperature = (
            _field(config, "gating_n_hidden", int, 3),
            _field(config, "gating_temperature", float, 10.0),
        )
        if num_hidden < 0 or not 0 < temperature < math.inf:
            raise ValueError(
                f"config.json fields 'gating_n_hidden' and 'gating_temperature' are {num_hidden} and {temperature}; they must "
                "be at least 0, and above 0 and finite"
            )
        return Gating(
            _size(config, "num_objectives", 19), num_hidden, _size(config, "gating_hidden_dim", 1024), temperature
        )
    if several or any("RewardModel" in name for name in names):
        told = "".join(f" and {name!r} {config[name]}" for name in several)
        raise ValueError(
            f"config.json names a reward model in a form of its own, 'architectures' {names}{told}; supported are "
            f"{_CLASSES[family]}{_SCORE} with one label, and Llama{_GATED} (ArmoRM)"
        )
    return None


def _num_labels(config: Mapping[str, Any]) -> int:
    """The labels of a classifier; transformers leaves id2label out where it has two, its default."""
    names = _field(config, "id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"})
    labels: int = _field(config, "num_labels", int, len(names))
    return labels


# What transformers assumes where the family's config.json leaves a field out, and LlamaConfig something else.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


def _window(config: Mapping[str, Any], family: str, num_layers: int, max_positions: int) -> int | None:
    """The sliding window of attention that some layer of the model would feel in long sequences, or None."""
    window = _field(config, "sliding_window", int, None)
    if family == "llama" or window is None or window >= max_positions:
        return None
    if family != "mistral":
        kinds = _field(config, "layer_types", list, None)
        sliding = "sliding_attention" in kinds if kinds else num_layers > _field(config, "max_window_layers", int, 28)
        if not _field(config, "use_sliding_window", bool, False) or not sliding:
            return None
    return window


def _llama(config: Mapping[str, Any], family: Literal["llama", "mistral", "qwen2", "qwen3"]) -> ModelConfig:
    """Llama 1 to 3.x, SmolLM, Mistral, Qwen2, Qwen2.5 and dense Qwen3, with the defaults of their classes."""
    config = {**_DEFAULTS[family], **config}
    gating = _gating(config, family)
    d_model, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"config.json field 'num_attention_heads' is {num_heads}, "
            f"not a multiple of 'num_key_value_heads' {num_kv_heads}"
        )
    head_dim = config.get("head_dim") and _size(config, "head_dim")
    head_dim = head_dim or _head_dim(d_model, num_heads)
    max_positions = _size(config, "max_position_embeddings", 2048)
    parameters = _rope_parameters(config, "rope_theta", "partial_rotary_factor", 1.0)
    fraction = _field(parameters, "partial_rotary_factor", float, 1.0)
    if fraction != 1.0 and parameters["rope_type"] != "proportional":
        raise ValueError(f"config.json field 'partial_rotary_factor' is {fraction}; {family} rotates whole heads (1.0)")
    num_layers = _size(config, "num_hidden_layers")
    # Qwen2 and Mistral have no field for what they always and never have.
    attention_bias = family == "qwen2" or (family != "mistral" and _field(config, "attention_bias", bool, False))
    return ModelConfig(
        family=family,
        vocab_size=_size(config, "vocab_size"),
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        d_ff=_size(config, "intermediate_size"),
        activation=_activation(config, "silu"),
        norm_eps=_field(config, "rms_norm_eps", float, 1e-6),
        max_positions=max_positions,
        rope_theta=_field(parameters, "rope_theta", float),
        rope_fraction=fraction,
        rope_scaling=_rope_scaling(config, parameters, head_dim, fraction, max_positions),
        tie_embeddings=_field(config, "tie_word_embeddings", bool, False),
        attention_bias=attention_bias,
        mlp_bias=family == "llama" and _field(config, "mlp_bias", bool, False),
        scalar_head=gating is not None or _scalar_head(config, family),
        gating=gating,
        init_std=_field(config, "initializer_range", float, 0.02),
        window=_window(config, family, num_layers, max_positions),
    )


def _gpt_neox(config: Mapping[str, Any]) -> ModelConfig:
    """GPT-NeoX and Pythia; defaults are those of transformers' GPTNeoXConfig."""
    d_model, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _head_dim(d_model, num_heads)
    max_positions = _size(config, "max_position_embeddings", 2048)
    parameters = _rope_parameters(config, "rotary_emb_base", "rotary_pct", 0.25)
    fraction = _field(parameters, "partial_rotary_factor", float, 0.25)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=_size(config, "vocab_size"),
        d_model=d_model,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        d_ff=_size(config, "intermediate_size"),
        activation=_activation(config, "gelu"),
        norm_eps=_field(config, "layer_norm_eps", float, 1e-5),
        max_positions=max_positions,
        rope_theta=_field(parameters, "rope_theta", float),
        rope_fraction=fraction,
        rope_scaling=_rope_scaling(config, parameters, head_dim, fraction, max_positions),
        tie_embeddings=_field(config, "tie_word_embeddings", bool, False),
        parallel_residual=_field(config, "use_parallel_residual", bool, True),
        attention_bias=_field(config, "attention_bias", bool, True),
        mlp_bias=True,
        scalar_head=_scalar_head(config, "gpt_neox"),
        init_std=_field(config, "initializer_range", float, 0.02),
    )


def _bert(config: Mapping[str, Any]) -> EncoderConfig:
    """BERT; defaults are those of transformers' BertConfig."""
    d_model, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    _head_dim(d_model, num_heads)
    positions = _field(config, "position_embedding_type", str, "absolute")
    if positions != "absolute":
        raise ValueError(f"config.json field 'position_embedding_type' is {positions!r}; supported is 'absolute'")
    if _field(config, "is_decoder", bool, False):
        raise ValueError("config.json field 'is_decoder' is True; BERT is supported as an encoder only (False)")
    return EncoderConfig(
        family="bert",
        vocab_size=_size(config, "vocab_size"),
        d_model=d_model,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        d_ff=_size(config, "intermediate_size"),
        activation=_activation(config, "gelu"),
        norm_eps=_field(config, "layer_norm_eps", float, 1e-12),
        max_positions=_size(config, "max_position_embeddings", 512),
        num_token_types=_size(config, "type_vocab_size", 2),
        init_std=_field(config, "initializer_range", float, 0.02),
    )


def _deberta(config: Mapping[str, Any]) -> DebertaConfig:
    """DeBERTa-v2 and -v3; defaults are those of transformers' DebertaV2Config and of the model that reads it."""
    d_model, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _head_dim(d_model, num_heads)
    fixed = {"relative_attention": True, "attention_head_size": head_dim, "embedding_size": d_model, "conv_groups": 1}
    for name, only in fixed.items():
        found = _field(config, name, type(only), False if name == "relative_attention" else only)
        if found != only:
            raise ValueError(f"config.json field {name!r} is {found}; supported for this DeBERTa is {only}")
    max_positions = _size(config, "max_position_embeddings", 512)
    max_relative = _field(config, "max_relative_positions", int, -1)
    max_relative = max_relative if max_relative >= 1 else max_positions
    buckets = max(_field(config, "position_buckets", int, -1), 0)
    if buckets == 1 or max_relative - 1 <= buckets // 2:
        raise ValueError(
            f"config.json field 'position_buckets' is {buckets}; it must be -1 or at least 2, and half of it less than "
            f"the farthest distance {max_relative - 1} (max_relative_positions, or max_position_embeddings, less 1)"
        )
    # Older files hold the terms as one string.
    terms = config.get("pos_att_type") or []
    terms = terms.lower().split("|") if isinstance(terms, str) else _field(config, "pos_att_type", list, [])
    terms = tuple(sorted({str(term).strip() for term in terms}))
    if not set(terms) <= {"c2p", "p2c"}:
        raise ValueError(f"config.json field 'pos_att_type' is {list(terms)}; supported are 'c2p' and 'p2c'")
    norms = _field(config, "norm_rel_ebd", str, "none").lower()
    if norms not in ("none", "layer_norm"):
        raise ValueError(f"config.json field 'norm_rel_ebd' is {norms!r}; supported are 'none' and 'layer_norm'")
    conv_width = _field(config, "conv_kernel_size", int, 0)
    if conv_width < 0 or (conv_width and conv_width % 2 == 0):
        raise ValueError(f"config.json field 'conv_kernel_size' is {conv_width}; supported are 0 and odd numbers")
    num_token_types = _field(config, "type_vocab_size", int, 0)
    if num_token_types < 0:
        raise ValueError(f"config.json field 'type_vocab_size' is {num_token_types}; it must be at least 0")
    # A head of several labels stands behind the hidden states that an encoder returns, and is left out.
    classifies = "DebertaV2ForSequenceClassification" in _field(config, "architectures", list, [])
    scalar_head = classifies and _num_labels(config) == 1
    if scalar_head:
        for name, found, only in (
            ("pooler_hidden_size", _size(config, "pooler_hidden_size", d_model), d_model),
            ("type_vocab_size", num_token_types, 0),
        ):
            if found != only:
                raise ValueError(
                    f"config.json field {name!r} is {found}; supported for a DeBERTa that scores is {only}"
                )
    return DebertaConfig(
        family="deberta-v2",
        vocab_size=_size(config, "vocab_size"),
        d_model=d_model,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        d_ff=_size(config, "intermediate_size"),
        activation=_activation(config, "gelu"),
        norm_eps=_field(config, "layer_norm_eps", float, 1e-7),
        max_positions=max_positions,
        absolute_positions=_field(config, "position_biased_input", bool, True),
        num_token_types=num_token_types,
        max_relative_positions=max_relative,
        position_buckets=buckets,
        relative_terms=terms,
        share_projections=_field(config, "share_att_key", bool, False),
        norm_relative=norms == "layer_norm",
        conv_width=conv_width,
        conv_activation=_activation(config, "tanh", "conv_act"),
        scalar_head=scalar_head,
        pooler_activation=_activation(config, "gelu", "pooler_hidden_act"),
        init_std=_field(config, "initializer_range", float, 0.02),
    )


def _rope_parameters(config: Mapping[str, Any], theta: str, fraction: str, default_fraction: float) -> dict[str, Any]:
    """The rope fields of either style as one dict of the newer; rope_scaling wins as it does in transformers."""
    parameters = dict(_field(config, "rope_scaling", dict, None) or _field(config, "rope_parameters", dict, {}))
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(f"config.json field 'rope_parameters' is {parameters}; one rule for all layers is supported")
    kind = parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", config.get(theta) or 10_000.0)
    parameters.setdefault("partial_rotary_factor", _field(config, fraction, float, default_fraction))
    if kind in ("llama3", "yarn", "longrope"):
        length = config.get("original_max_position_embeddings")
        length = length or parameters.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = length or _size(config, "max_position_embeddings", 2048)
    return parameters


def _rope_scaling(
    config: Mapping[str, Any], parameters: Mapping[str, Any], head_dim: int, fraction: float, max_positions: int
) -> rope.RopeScaling | None:
    """The scaling rule that the rope parameters name, with transformers' defaults for what they leave out."""
    kind, dim = parameters["rope_type"], int(head_dim * fraction)
    # An odd number of features is rounded up to a pair, which must still fit the head.
    if dim + dim % 2 > head_dim or dim < 1:
        raise ValueError(f"config.json: rope over {dim} of the {head_dim} features of a head is not possible")
    if kind == "default":
        return None
    if kind == "linear":
        return rope.Linear(_field(parameters, "factor", float))
    if kind == "dynamic":
        if dim <= 2:
            raise ValueError(f"config.json: 'dynamic' rope needs more than 2 rotated features, found {dim}")
        return rope.Dynamic(_field(parameters, "factor", float))
    if kind == "proportional":
        return rope.Proportional(_field(parameters, "factor", float, 1.0))
    if kind == "llama3":
        return rope.Llama3(
            _field(parameters, "factor", float),
            _field(parameters, "low_freq_factor", float),
            _field(parameters, "high_freq_factor", float),
            _size(parameters, "original_max_position_embeddings"),
        )
    if kind == "yarn":
        length = _size(parameters, "original_max_position_embeddings")
        factor = _field(parameters, "factor", float, max_positions / length)
        return rope.Yarn(
            factor=factor,
            attention_factor=_yarn_attention_factor(parameters, factor),
            original_max_positions=length,
            beta_fast=_field(parameters, "beta_fast", float, None) or 32.0,
            beta_slow=_field(parameters, "beta_slow", float, None) or 1.0,
            truncate=_field(parameters, "truncate", bool, True),
        )
    if kind == "longrope":
        length = _size(parameters, "original_max_position_embeddings")
        factor = _field(parameters, "factor", float, max_positions / length)
        grown = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(length))
        return rope.LongRope(
            short_factors=_factors(parameters, "short_factor", (dim + 1) // 2),
            long_factors=_factors(parameters, "long_factor", (dim + 1) // 2),
            attention_factor=_field(parameters, "attention_factor", float, grown),
            original_max_positions=length,
        )
    known = "default, dynamic, linear, llama3, longrope, proportional, yarn"
    raise ValueError(f"config.json field 'rope_type' is {kind!r}; supported are {known}")


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """What yarn multiplies cos and sin by: 0.1 log(factor) + 1 (https://arxiv.org/abs/2309.00071, eq. 22)."""

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight = _field(parameters, "mscale", float, None)
    weight_all = _field(parameters, "mscale_all_dim", float, None)
    inferred = grown(weight) / grown(weight_all) if weight and weight_all else grown(1.0)
    return _field(parameters, "attention_factor", float, inferred)


def _factors(parameters: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    """A list of longrope divisors, one per rotated pair of features."""
    values = _field(parameters, name, list)
    if len(values) != count:
        raise ValueError(f"config.json field {name!r} has {len(values)} numbers; {count} are needed, one per frequency")
    return tuple(float(value) for value in values)


def _rope_scaling_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The rope parameters beyond theta and fraction, empty for the plain frequencies."""
    match config.rope_scaling:
        case None:
            return {}
        case rope.Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case rope.Dynamic(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case rope.Proportional(factor):
            return {"rope_type": "proportional", "factor": factor}
        case rope.Llama3(factor, low, high, length):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
        case rope.Yarn(factor, attention_factor, length, fast, slow, truncate):
            return {
                "rope_type": "yarn",
                "factor": factor,
                "attention_factor": attention_factor,
                "original_max_position_embeddings": length,
                "beta_fast": fast,
                "beta_slow": slow,
                "truncate": truncate,
            }
        case rope.LongRope(short, long, attention_factor, length):
            return {
                "rope_type": "longrope",
                "short_factor": list(short),
                "long_factor": list(long),
                "attention_factor": attention_factor,
                "original_max_position_embeddings": length,
            }
