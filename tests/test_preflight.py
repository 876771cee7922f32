"""What cannot work is told by the name of its field before any weights are read: none are there."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import pytest

from configs import tiny_random as tiny_config
from sea_jax import config as configuration
from sea_jax import sft, wiring
from sea_jax.models.checkpoints import tiny_random
from sea_jax.models.mesh import make_mesh

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., str]:
    """Writes a tiny model without its weights."""

    def write(name: str, template: str | None = None, **changes: Any) -> str:
        directory = tmp_path / name
        tiny_random.write(directory, name, changes=changes)
        (directory / "model.safetensors").unlink()
        if template is not None:
            path = directory / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        return str(directory)

    return write


def begin(config: ml_collections.ConfigDict) -> None:
    """Goes as far as a training or a fine-tuning does before its first step."""
    if "output" in config:
        sft.fine_tune(configuration.resolve_sft(config), Path(config.output))
    else:
        mesh = make_mesh((1, 1, 1))
        with jax.set_mesh(mesh):
            wiring.parts(configuration.resolve(config), mesh)


def refused(config: ml_collections.ConfigDict, **fields: Any) -> str:
    """What is said of the configuration."""
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    with pytest.raises(ValueError, match=r"^config\.") as error:
        begin(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sequences_beyond_what_a_policy_was_made_for(described: Callable[..., str], tmp_path: Path) -> None:
    short = described("tiny-random-llama", max_position_embeddings=40)
    assert refused(tiny_config.get_config(), policy__source=short, sampling__max_new_tokens=20) == (
        "config.sampling.max_new_tokens: a prompt of 30 tokens and a response of up to 20 are 50, but the policy was made "
        "for up to 40 tokens: lower sampling.max_new_tokens to 10, or data.max_prompt_tokens to 20; longer prompts "
        "are left out then"
    )
    assert "config.eval.max_new_tokens: a prompt of" in refused(
        tiny_config.get_config(), policy__source=short, eval__max_new_tokens=20
    )
    tuned, tiny = configuration.default_sft(), tiny_config.get_config()
    tuned.data, tuned.learner, tuned.output = tiny.data, tiny.learner, str(tmp_path / "output")
    said = refused(tuned, policy__source=short)
    assert said.startswith("config.max_response_tokens: a prompt of 30 tokens and a response of up to 41 are 71, but")
    assert "the policy was made for up to 40 tokens: lower max_response_tokens to 10; longer" in said


def test_sequences_beyond_a_window(described: Callable[..., str]) -> None:
    name, changes = "tiny-random-llama", {"model_type": "mistral", "sliding_window": 34}
    said = refused(tiny_config.get_config(), policy__source=described(name, **changes), sampling__max_new_tokens=9)
    assert "are 39, but the policy's sliding window of attention is 34 tokens, and only full attention is" in said


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        (NO_SYSTEM, {"data__system": "Be brief."}, r"\(TemplateError: System role not supported\): .*data\.system=''"),
        ("{% for %}", {"data__system": "Be brief."}, r"\(TemplateSyntaxError: .*\): mend it, in tokenizer_config"),
        ("{{ raise_exception('no') }}", {}, r"turns user \(TemplateError: no\): mend it, in tokenizer_config\.json"),
    ],
)
def test_a_chat_template_that_raises(
    described: Callable[..., str], template: str, fields: dict[str, Any], message: str
) -> None:
    source = described("tiny-random-llama", template)
    said = refused(tiny_config.get_config(), policy__source=source, data__chat=True, **fields)
    assert f"config.data.chat=True: the chat template in {source} does not take the turns " in said
    assert re.search(message, said)


@pytest.mark.parametrize("kind", ["reward_model", "remote"])
def test_a_reward_model_that_cannot_read_the_conversations(described: Callable[..., str], kind: str) -> None:
    tiny, source = tiny_config.get_config(), described("tiny-random-llama-reward", "{{ raise_exception('never') }}")
    named = {"oracle__kind": kind, "oracle__reward_model": source, "oracle__urls": "http://localhost:1"}
    named |= {"policy__source": described("tiny-random-llama")}
    assert refused(tiny, **named) == (
        f"config.oracle.reward_model={source}: it was made for sequences of up to 1024 tokens, but oracle.max_tokens=2048: "
        "set it to no more than that"
    )
    assert f"config.oracle.reward_model={source}: the chat template in {source} does not take the turns user, assi" in (
        refused(tiny, **named, oracle__max_tokens=1024)
    )
