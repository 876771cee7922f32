"""What is refused on the way from a configuration to the parts of a run names its field."""

from typing import Any

import pytest

from sea_jax import features
from sea_jax.features import FeatureSettings
from sea_jax.models.checkpoints import tiny_random
from sea_jax.oracles.oracle import OracleSettings, preference
from sea_jax.policy import load_policy

LLAMA = "builtin:tiny-random-llama"


@pytest.mark.parametrize(
    ("kind", "field", "message"),
    [
        ("embedding", "encoder", "expected a BERT encoder, found a llama"),
        ("reward_model", "reward_model", "expected a reward model.*found a decoder with an unembedding"),
    ],
)
def test_an_oracle_of_the_wrong_kind(kind, field, message):
    named: dict[str, Any] = {"kind": kind, field: LLAMA}
    settings = OracleSettings(**named)
    with pytest.raises(ValueError, match=rf"config\.oracle\.{field}={LLAMA}: {message}"):
        preference(settings)


def test_a_decoder_as_a_trunk():
    with pytest.raises(ValueError, match=rf"config\.erm\.trunk={LLAMA}: expected a BERT or DeBERTa"):
        features.width(FeatureSettings(trunk=LLAMA), load_policy(LLAMA, train_last_layers=0, dtype="float32"))


def test_policies_of_the_wrong_kind(tmp_path):
    for kind, message in (
        ("tiny-random-deberta", "found an encoder"),
        ("tiny-random-llama-reward", "found a reward model"),
    ):
        tiny_random.write(tmp_path / kind, kind)
        with pytest.raises(ValueError, match=rf"config\.policy\.source={tmp_path / kind}: .*{message}"):
            load_policy(str(tmp_path / kind), train_last_layers=0, dtype="float32")
    with pytest.raises(ValueError, match=r"config\.policy\.source=cache:nobody-made-it: there is no .*sea_jax\.sft"):
        load_policy("cache:nobody-made-it", train_last_layers=0, dtype="float32")
