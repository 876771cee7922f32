"""From the fields of a configuration to servers that write and score."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from configs import tiny_random as tiny_random_config
from gpu_bridge import protocol
from sea_jax import wiring
from sea_jax.config import resolve
from sea_jax.heldout import heldout_evaluation
from sea_jax.models.checkpoints import hf, tiny_random
from sea_jax.models.mesh import make_mesh
from sea_jax.oracles.ledger import Ledger
from sea_jax.types import Prompts
from tests.support import fake
from tests.support.fake import Fake


@pytest.fixture
def policy() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


@pytest.fixture
def oracle() -> Iterator[Fake]:
    server = Fake(protocol.ORACLE, "published")
    yield server
    server.close()


def test_a_run_through_the_bridge(policy: Fake, oracle: Fake, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(fake.TOKEN)
    tiny_random.write(tmp_path / "reward", "tiny-random-llama-reward", changes={"max_position_embeddings": 2048})
    (tmp_path / "reward" / "model.safetensors").unlink()  # not needed where others run the model
    fields = tiny_random_config.get_config()
    fields.bridge_token_file = str(token)
    fields.actor.kind, fields.actor.urls, fields.actor.weights_dtype = "bridge", policy.url, "float32"
    fields.actor.weights_directory, fields.actor.retries = str(tmp_path), 0
    fields.oracle.kind, fields.oracle.urls, fields.oracle.reward_model = "remote", oracle.url, str(tmp_path / "reward")
    config = resolve(fields)
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        parts = wiring.parts(config, mesh)
        # The greedy responses of an evaluation.
        evaluation = heldout_evaluation(config, parts, 0, [Ledger(tmp_path / "evaluations.jsonl")])
        assert {message["temperature"] for message in policy.sent(protocol.GENERATE)} == {0}
        assert len(evaluation.initial.texts) == min(len(parts.heldout_prompts), config.eval.num_prompts)
        saved = hf.to_tensors(parts.policy.config, hf.load(parts.policy.directory).params)
        assert policy.tensors.keys() == saved.keys()
        for name, tensor in saved.items():
            np.testing.assert_array_equal(policy.tensors[name], tensor)
        # The candidates of a step, by weights a step on: what has changed was pushed, and features are read here.
        tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
        trained = jax.tree.map(lambda x: x + 1, parts.policy.reference)
        asked = Prompts(jnp.asarray(tokens), jnp.ones((2, 32), bool))
        candidates = parts.generate(parts.sampling)(trained, asked, jax.random.key(0), 1)
        assert candidates.tokens.shape == (2, 4, 8)
        np.testing.assert_array_equal(policy.tensors["model.norm.weight"], saved["model.norm.weight"] + 1)
        np.testing.assert_array_equal(
            policy.tensors["model.layers.0.mlp.up_proj.weight"], saved["model.layers.0.mlp.up_proj.weight"]
        )
        features = parts.features(vars(asked), candidates, [])
        assert features.shape == (2, 4, parts.num_features)
        assert np.ptp(features) > 0
    assert not list(tmp_path.glob("sea_jax-*"))
    # The taste of the oracle.
    assert parts.preference is not None
    probability = parts.preference(["x"], ["short"], ["a little longer"])
    (first, second) = (ids for message in oracle.sent(protocol.SCORE) for ids in message["inputs"])
    assert probability == expit(fake.score(first) - fake.score(second))  # the scores are logits
