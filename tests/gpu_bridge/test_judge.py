"""SmolLM2 behind vLLM's OpenAI server as a judge: it says what the model says in JAX; skipped without `make bridge`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from sea_jax.models import decoder, tokenizer
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import ModelConfig
from sea_jax.oracles import judge
from sea_jax.oracles.judge import ChatJudgeSettings
from sea_jax.oracles.paid_answers import read_spent
from sea_jax.oracles.user_preference import NoAnswerError
from tests.support.engines import PYTHON, TOKEN, chatting

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="`make bridge` has not been run")]
PROMPT = "What is a fjord?"
TOP = 1000  # so small a model has the answers seldom among its 20 most probable tokens
TEXTS = ("A long, narrow inlet of the sea between high cliffs.", "No.", "Bananas are yellow and grow on trees.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with its weights as vLLM reads them."""
    directory = tmp_path_factory.mktemp("judge") / "smollm2"
    loaded = hf.load("builtin:smollm2-135m-instruct")
    hf.save(directory, loaded.config, loaded.params, loaded.directory)
    return directory


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """Where it is served."""
    with chatting(model, "--max-model-len", "512", "--max-logprobs", str(TOP)) as place:
        yield place


def in_jax(model: Path, question: str) -> tuple[float, int]:
    """P("0" rather than "1") as the first token of an answer, by the model's own logits; and the tokens of the question."""
    loaded, words = hf.load(model), tokenizer.load(model)
    config = loaded.config
    assert isinstance(config, ModelConfig)
    ids = words.encode(words.chat([{"role": "user", "content": question}]), add_special=False, goes_on=True)

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        streams = decoder.embed(params, config, tokens, jnp.ones(tokens.shape, bool), dtype="float32")
        for stack in params["stacks"]:
            streams, _ = decoder.run_stack(stack, config, streams)
        hidden = decoder.final(params, config, streams.prompt)[0, -1]
        return decoder.unembedding(params) @ hidden

    found = np.asarray(logits(jax.device_put(loaded.params), jnp.asarray([ids])), np.float64)
    top = np.argsort(-found)[:TOP]
    mass = special.softmax(found)
    told = {name: sum(mass[i] for i in top if words.decode([int(i)]).strip() == name) for name in ("0", "1")}
    return told["0"] / (told["0"] + told["1"]), len(ids)


def test_a_real_endpoint_judges_as_the_model_does(
    url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", TOKEN)
    how: dict[str, Any] = {"url": url, "model": "judge", "key_environment": "TEST_JUDGE_KEY"}
    patience: dict[str, Any] = {"retries": 0, "timeout_s": 120.0, "concurrency": 4}
    known = ChatJudgeSettings(**how, arguments=f'{{"top_logprobs": {TOP}}}')
    taste = judge.judge(known, "oracle.judge", tmp_path, **patience)
    said = dict(taste([PROMPT] * 2, TEXTS[:2], TEXTS[1:]))
    question = judge.fill(judge.read_template(ChatJudgeSettings(), ""), PROMPT, *TEXTS[:2])
    expected, tokens = in_jax(model, question)
    assert said[0] == pytest.approx(expected, abs=1e-3)
    assert 0 < said[1] < 1
    spent = read_spent(tmp_path)["oracle.judge"]
    assert (spent.calls, spent.failed_calls, spent.unusable_answers, spent.output_tokens) == (2, 0, 0, 2)
    assert abs(spent.input_tokens - 2 * tokens) < 20
    # One that is too long is refused by the server, and an abstention.
    assert dict(taste([PROMPT] * 2, [TEXTS[0], "long " * 600], TEXTS[1:])) == {0: pytest.approx(said[0]), 1: None}

    # Answers that can be nothing else are drawn with the probability that the log-probs give.
    only = ChatJudgeSettings(**how, samples=64, arguments='{"structured_outputs": {"choice": ["0", "1"]}}')
    ((_, share),) = judge.judge(only, "sampled", tmp_path, **patience)([PROMPT], TEXTS[:1], TEXTS[1:2])
    assert abs(share - said[0]) < 0.25  # four standard errors
    assert read_spent(tmp_path)["sampled"].unusable_answers == 0

    monkeypatch.setenv("TEST_JUDGE_KEY", "another")
    with pytest.raises(NoAnswerError, match="answers 401"):
        list(judge.judge(ChatJudgeSettings(**how), "oracle.judge", None, **patience)([PROMPT], TEXTS[:1], TEXTS[1:2]))
    monkeypatch.setenv("TEST_JUDGE_KEY", TOKEN)
    unknown = ChatJudgeSettings(**how | {"model": "gpt"})
    with pytest.raises(NoAnswerError, match=r"answers 404 .*gpt.* does not exist"):
        list(judge.judge(unknown, "oracle.judge", None, **patience)([PROMPT], TEXTS[:1], TEXTS[1:2]))
