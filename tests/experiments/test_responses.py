"""A pool written by a tiny random policy: what is in it, and that an interruption costs one portion alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import quickstart, tiny_random
from experiments import responses
from experiments.responses import Responses
from sea_jax import config, features
from sea_jax.actors import generation
from sea_jax.data.prompts import collate, load_prompts
from sea_jax.models import decoder
from sea_jax.models.checkpoints import builtin
from sea_jax.policy import load_policy
from sea_jax.runtime import cache
from sea_jax.types import Prompts

NUM_PROMPTS, NUM_RESPONSES, AT_A_TIME = 8, 3, 9  # three portions, the last of which is not full


def embed_texts(source: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Embeddings as nobody trained them: a text's digest."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.array([list(hashlib.sha256(text.encode()).digest()) for text in texts], np.float32) / 256

    return embed


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """The tiny configuration in the quickstart's place, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        own = tiny_random.get_config()
        own.policy.source = str(builtin.directory("tiny-random-llama"))  # from the cache of all tests
        patch.setattr(cache, "cache_dir", lambda: tmp_path_factory.getbasetemp() / "cache")
        patch.setattr(quickstart, "get_config", lambda: own)
        patch.setattr(responses, "embed_texts", embed_texts)
        patch.setattr(responses, "LAYERS", (1, 2))
        patch.setattr(responses, "AT_A_TIME", AT_A_TIME)
        (tmp_path_factory.getbasetemp() / "cache").mkdir()
        yield patch


def files_of(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*.npz"))


@pytest.fixture(scope="module")
def pool(laboratory: pytest.MonkeyPatch) -> Responses:
    """Written in two calls, the first of which is cut off within its third portion."""
    hidden_states, calls = responses.hidden_states, []

    def stopped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden_states(*arguments, **named)

    laboratory.setattr(responses, "hidden_states", stopped)
    with pytest.raises(KeyboardInterrupt):
        responses.load_or_write(NUM_PROMPTS, NUM_RESPONSES)
    assert [Path(name).name for name in files_of(cache.cache_dir())] == ["0.npz", "3.npz"]
    written = responses.load_or_write(NUM_PROMPTS, NUM_RESPONSES)
    assert len(calls) == 4  # the third portion alone has been read again
    return written


def test_a_pool_is_in_the_cache_whole_and_written_once(pool: Responses, laboratory: pytest.MonkeyPatch) -> None:
    (name,) = files_of(cache.cache_dir())
    assert Path(name).parent == Path()
    laboratory.setattr(responses, "_write_responses", None)
    again = responses.load_or_write(NUM_PROMPTS, NUM_RESPONSES)
    assert (again.texts, again.prompts, again.references) == (pool.texts, pool.prompts, pool.references)
    for column, values in pool.columns.items():
        np.testing.assert_array_equal(again.columns[column], values)


def test_a_pool_that_was_cut_off_is_the_pool_that_was_not(pool: Responses, laboratory: pytest.MonkeyPatch) -> None:
    """By hand: the first of the two calls of another portion, whose key is that of its place."""
    run = config.resolve(quickstart.get_config())
    policy = load_policy(run.policy.source, train_last_layers=0, dtype=run.policy.dtype)
    train, heldout = load_prompts(run.data, policy.tokenizer, 2)
    assert pool.num_train == 6
    assert pool.prompts == [each.record["prompt"] for each in [*train[:6], *heldout[:2]]]
    assert pool.references == [each.record["reference"] for each in [*train[:6], *heldout[:2]]]
    batch = collate([*heldout[:2], heldout[1]], pad_id=policy.tokenizer.pad_id, bucket=run.data.bucket)
    prompts = Prompts(batch["tokens"], batch["valid"])
    params = decoder.recut(decoder.join(policy.frozen, policy.reference), (1,))
    how = generation.configured(run.sampling, policy, run.policy.dtype, num_samples=1, temperature=0.0)
    written = generation.generate(params, prompts, jax.random.key(0), config=policy.config, sampling=how)
    np.testing.assert_array_equal(pool.columns["lengths"][6:, 0], np.asarray(written.lengths)[:2, 0])
    np.testing.assert_allclose(
        pool.columns["logprobs"][6:, 0], np.asarray(written.logprobs.sum(-1))[:2, 0], rtol=1e-4, atol=1e-4
    )
    for layer, feature_stack in ((1, 1), (2, None)):
        mean = features.response_features(
            params,
            prompts,
            written.tokens,
            written.lengths,
            config=policy.config,
            feature_stack=feature_stack,
            dtype="float32",
        )
        found = pool.columns[f"mean-{layer}"][6:, 0]
        np.testing.assert_allclose(found, np.asarray(mean)[:2, 0], rtol=5e-3, atol=5e-3)  # kept in half precision
    one = pool.columns["lengths"] == 1  # where the last token is the only one
    np.testing.assert_array_equal(pool.columns["last-2"][one], pool.columns["mean-2"][one])


def test_every_text_has_its_embedding(pool: Responses) -> None:
    embed = embed_texts("")
    for row, embeddings in zip(pool.texts, pool.columns["minilm"], strict=True):
        np.testing.assert_allclose(embeddings, embed(row), atol=1e-3)
    np.testing.assert_array_equal(pool.prompt_embeddings, embed(pool.prompts))
    np.testing.assert_array_equal(pool.reference_embeddings, embed(pool.references))


def test_more_prompts_than_there_are_end_it_with_their_numbers(laboratory: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--prompts=1000: there are \d+ to train on and \d+ held out"):
        responses.load_or_write(1000, 1)
