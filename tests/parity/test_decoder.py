"""The decoder against transformers: hidden states, logits, rope and greedy text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from sea_jax.models import decoder, rope  # noqa: E402
from sea_jax.models.checkpoints import config_json as configs  # noqa: E402
from sea_jax.models.checkpoints import hf  # noqa: E402
from sea_jax.models.config import ModelConfig  # noqa: E402
from sea_jax.models.parameters import Params  # noqa: E402
from tests.support import tiny_torch  # noqa: E402

PROMPT_LENGTHS = (2, 6)
RESPONSE_LENGTHS = ((4, 1), (3, 4))

LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three to one, biases": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "one key head, tied, gelu": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-2,
    },
    "wide heads, llama3": {
        "head_dim": 10,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "narrow heads, yarn": {
        "head_dim": 4,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0},
    },
}
NEOXES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequential, fully rotated": {
        "use_parallel_residual": False,
        "hidden_act": "gelu_new",
        "attention_bias": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 100,
    },
    "tied, linear": {
        "rotary_pct": 0.5,
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-2,
        "hidden_act": "quick_gelu",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "odd rotation": {"num_attention_heads": 2, "rotary_pct": 0.3, "hidden_act": "gelu_fast"},
}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mistral, wide heads": (tiny_torch.mistral, {"head_dim": 10, "rms_norm_eps": 1e-2}),
    "mistral, a window as long as a text": (tiny_torch.mistral, {"sliding_window": 64}),
    "qwen2, tied, yarn": (
        tiny_torch.qwen2,
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0},
        },
    ),
    "qwen3": (tiny_torch.qwen3, {"rms_norm_eps": 1e-2}),
    "qwen3, one key head, biases": (tiny_torch.qwen3, {"num_key_value_heads": 1, "attention_bias": True}),
}
FAMILIES = [pytest.param(tiny_torch.llama, fields, id=f"llama, {name}") for name, fields in LLAMAS.items()]
FAMILIES += [pytest.param(tiny_torch.gpt_neox, fields, id=f"neox, {name}") for name, fields in NEOXES.items()]
FAMILIES += [pytest.param(*given, id=name) for name, given in OTHERS.items()]


_run_stack = jax.jit(decoder.run_stack, static_argnums=1)


def _streams(params: Params, config: ModelConfig, *tokens_and_valid: np.ndarray) -> list[Any]:
    """The streams before every layer, where each is a stack, and after the last."""
    streams = [decoder.embed(params, config, *map(jnp.asarray, tokens_and_valid), dtype=jnp.float32)]
    for stack in params["stacks"]:
        streams.append(_run_stack(stack, config, streams[-1])[0])
    return streams


def _batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts padded on the left, responses on the right, with random tokens in the padding too."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, tiny_torch.SIZES["vocab_size"], (2, max(PROMPT_LENGTHS) + 1))
    responses = rng.integers(0, tiny_torch.SIZES["vocab_size"], (2, 2, np.max(RESPONSE_LENGTHS)))
    prompt_valid = np.arange(prompt.shape[1]) >= prompt.shape[1] - np.array(PROMPT_LENGTHS)[:, None]
    return prompt, prompt_valid, responses, np.arange(responses.shape[2]) < np.array(RESPONSE_LENGTHS)[..., None]


@pytest.mark.parametrize(("make", "fields"), FAMILIES)
def test_hidden_states_and_logits(make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(**fields)
    layers = model.config.num_hidden_layers
    loaded = tiny_torch.handed_over(model, tmp_path, cuts=range(1, layers))
    assert isinstance(loaded.config, ModelConfig)
    prompt, prompt_valid, responses, responses_valid = _batch()
    streams = _streams(loaded.params, loaded.config, prompt, prompt_valid, responses, responses_valid)
    for b, m in np.ndindex(2, 2):
        tokens = np.concatenate([prompt[b][prompt_valid[b]], responses[b, m][responses_valid[b, m]]])
        with torch.no_grad():
            out = model(torch.tensor(tokens[None]), output_hidden_states=True)
        ours = [
            np.concatenate([s.prompt[b][prompt_valid[b]], s.responses[b, m][responses_valid[b, m]]]) for s in streams
        ]
        last = decoder.final(loaded.params, loaded.config, jnp.asarray(ours.pop()))
        np.testing.assert_allclose(last, out.hidden_states[-1][0], atol=2e-5, rtol=1e-5)
        for layer, (found, expected) in enumerate(zip(ours, out.hidden_states[:-1], strict=True)):
            np.testing.assert_allclose(found, expected[0], atol=2e-5, rtol=1e-5, err_msg=f"before layer {layer}")
        logits = last @ decoder.unembedding(loaded.params).T
        np.testing.assert_allclose(logits, out.logits[0], atol=5e-5, rtol=1e-5)


def _greedy(params: Params, config: ModelConfig, prompt: jax.Array, valid: jax.Array, steps: int) -> np.ndarray:
    """The tokens [B, steps] that score highest, one at a time through the cache."""

    @jax.jit
    def prefill() -> tuple[list[decoder.KV], jax.Array]:
        streams, kvs = decoder.embed(params, config, prompt, valid, dtype=jnp.float32), []
        for stack in params["stacks"]:
            streams, kv = decoder.run_stack(stack, config, streams)
            kvs.append(kv)
        return kvs, streams.prompt[:, -1:]

    @jax.jit
    def advance(hidden: jax.Array, kvs: Any, caches: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        token = jnp.argmax(decoder.final(params, config, hidden) @ decoder.unembedding(params).T, axis=-1)
        hidden, written = params["embed"][token], []
        for stack, kv, cache in zip(params["stacks"], kvs, caches, strict=True):
            hidden, cache = decoder.decode(stack, config, hidden, kv, valid, cache, step)
            written.append(cache)
        return token, hidden, written

    kvs, hidden = prefill()
    params = jax.tree.map(jnp.asarray, params)
    caches: Any = [decoder.empty_cache(stack, config, len(prompt), 1, steps, jnp.float32) for stack in params["stacks"]]
    tokens = []
    for step in range(steps):
        token, hidden, caches = advance(hidden, kvs, caches, jnp.int32(step))
        tokens.append(token[:, 0])
    return np.stack(tokens, axis=1)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(tiny_torch.llama(num_attention_heads=6, num_key_value_heads=2), id="llama"),
        pytest.param(tiny_torch.gpt_neox(), id="neox"),
        pytest.param(tiny_torch.qwen3(), id="qwen3"),
    ],
)
def test_greedy_text_is_that_of_generate(model: Any, tmp_path: Path) -> None:
    steps = 12
    loaded = tiny_torch.handed_over(model, tmp_path, cuts=(1,))
    assert isinstance(loaded.config, ModelConfig)
    prompt, valid, _, _ = _batch()
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(prompt),
            attention_mask=torch.tensor(valid),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    found = _greedy(loaded.params, loaded.config, jnp.asarray(prompt), jnp.asarray(valid), steps)
    assert len(np.unique(found)) > 2  # a constant answer would show little
    np.testing.assert_array_equal(found, expected[:, prompt.shape[1] :])


@pytest.mark.parametrize(
    ("make", "window"),
    [
        (tiny_torch.mistral, {"sliding_window": 15}),
        (tiny_torch.mistral, {"sliding_window": 16}),
        (tiny_torch.mistral, {"sliding_window": None}),
        (tiny_torch.qwen2, {"use_sliding_window": False, "sliding_window": 4}),
        (tiny_torch.qwen2, {"use_sliding_window": True, "sliding_window": 4}),
        (tiny_torch.qwen2, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        (tiny_torch.qwen2, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        (tiny_torch.qwen3, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
        (
            tiny_torch.qwen3,
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
        ),
    ],
)
def test_a_window_ends_what_can_be_read_if_and_only_if_attention_is_cut_by_it(
    make: Any, window: dict[str, Any], tmp_path: Path
) -> None:
    windowed = make(max_position_embeddings=16, **window)
    plain = make(max_position_embeddings=16, sliding_window=None)
    plain.load_state_dict(windowed.state_dict())
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        cut = not torch.allclose(windowed(tokens).logits, plain(tokens).logits, atol=1e-6)
        inside = tokens[:, : window["sliding_window"]]
        torch.testing.assert_close(windowed(inside).logits, plain(inside).logits)
    loaded = tiny_torch.handed_over(windowed, tmp_path / "windowed")
    assert isinstance(loaded.config, ModelConfig)
    assert loaded.config.longest_sequence == (window["sliding_window"] if cut else 16)
    if cut:
        hf.save(tmp_path / "again", loaded.config, loaded.params, tmp_path / "windowed")
        again = type(windowed).from_pretrained(tmp_path / "again").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(tokens).logits, windowed(tokens).logits)


def _scalings(pairs: int) -> st.SearchStrategy[dict[str, Any]]:
    """Rope parameters of every kind, with the optional ones there or not."""
    factor = st.floats(1.0, 16.0)
    factors = st.lists(st.floats(1.0, 9.0), min_size=pairs, max_size=pairs)
    original = st.integers(4, 64)
    return st.one_of(
        st.fixed_dictionaries({"rope_type": st.just("default")}),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factor}),
        st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factor}),
        st.fixed_dictionaries(
            {"rope_type": st.just("proportional"), "partial_rotary_factor": st.floats(0.2, 1.0)},
            optional={"factor": factor},
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("llama3"),
                "factor": factor,
                "low_freq_factor": st.floats(0.5, 2.0),
                "high_freq_factor": st.floats(2.5, 8.0),
            },
            optional={"original_max_position_embeddings": original},
        ),
        st.fixed_dictionaries(
            {"rope_type": st.just("yarn"), "factor": st.one_of(st.none(), factor)},
            optional={
                "original_max_position_embeddings": original,
                "attention_factor": st.floats(0.5, 2.0),
                "beta_fast": st.floats(8.0, 64.0),
                "beta_slow": st.floats(0.5, 4.0),
                "mscale": st.floats(0.5, 2.0),
                "mscale_all_dim": st.floats(0.5, 2.0),
                "truncate": st.booleans(),
            },
        ),
        st.fixed_dictionaries(
            {"rope_type": st.just("longrope"), "short_factor": factors, "long_factor": factors},
            optional={
                "original_max_position_embeddings": original,
                "factor": factor,
                "attention_factor": st.floats(0.5, 2.0),
            },
        ),
    )


@settings(max_examples=150)
@given(
    scaling=_scalings(pairs=4),
    theta=st.floats(10.0, 1e6),
    length=st.integers(1, 300),
    neox=st.booleans(),
    old_style=st.booleans(),
)
def test_rotations(scaling: dict[str, Any], theta: float, length: int, neox: bool, old_style: bool) -> None:
    # 8 rotated features: whole heads for Llama, half of them for GPT-NeoX unless the rule has a fraction of its own.
    head_dim = 16 if neox and scaling["rope_type"] != "proportional" else 8
    fields: dict[str, Any] = tiny_torch.SIZES | {"hidden_size": 4 * head_dim}
    if neox:
        fields |= {"rotary_pct": 0.5, "rotary_emb_base": theta}
    else:
        fields |= {"rope_theta": theta}
    fields |= {"rope_scaling" if old_style else "rope_parameters": dict(scaling)}
    theirs = (transformers.GPTNeoXConfig if neox else transformers.LlamaConfig)(**fields)
    embedding = (GPTNeoXRotaryEmbedding if neox else LlamaRotaryEmbedding)(theirs)
    expected = embedding(torch.zeros(1), torch.arange(length)[None])
    positions = jnp.arange(300)[None]  # of one shape, so that nothing is compiled anew for every length
    # The fields as a config.json of the older style has them, and as transformers writes them today.
    for ours in (fields | {"model_type": theirs.model_type}, theirs.to_dict()):
        config = configs.from_hf(ours)
        assert isinstance(config, ModelConfig)
        found = rope.rotations(config, positions, jnp.array([length]))
        for part, reference in zip(found, expected, strict=True):
            half = reference[..., : reference.shape[-1] // 2]
            np.testing.assert_allclose(np.asarray(part)[:, :length], half, atol=2e-4 * float(half.abs().max()))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length(kind: str, tmp_path: Path) -> None:
    parameters = {
        "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 50.0},
        "longrope": {
            "rope_type": "longrope",
            "rope_theta": 50.0,
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [2.0, 4.0, 8.0],
            "original_max_position_embeddings": 8,
        },
    }
    fields = {"max_position_embeddings": 8} if kind == "dynamic" else {}
    model = tiny_torch.llama(rope_parameters=parameters[kind], **fields)
    loaded = tiny_torch.handed_over(model, tmp_path)
    assert isinstance(loaded.config, ModelConfig)
    prompt, prompt_valid, responses, _ = _batch()
    # Sequences of 5 and of 9 tokens, one below and one above the threshold, each prompt with responses of one length.
    responses_valid = np.arange(4) < np.full((2, 2, 1), 3)
    streams = _streams(loaded.params, loaded.config, prompt, prompt_valid, responses, responses_valid)
    last = decoder.final(loaded.params, loaded.config, streams[-1].responses)
    for b, m in np.ndindex(2, 2):
        tokens = np.concatenate([prompt[b][prompt_valid[b]], responses[b, m][responses_valid[b, m]]])
        # A fresh rope each time: transformers keeps frequencies that an earlier, longer call has grown.
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        with torch.no_grad():
            expected = model(torch.tensor(tokens[None])).logits[0, PROMPT_LENGTHS[b] :]
        np.testing.assert_allclose(last[b, m, :3] @ decoder.unembedding(loaded.params).T, expected, atol=5e-5)
