"""What a work directory remembers of its prompts, and what is refused or warned of when they have changed."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from configs import tiny_random
from sea_jax import config as configuration
from sea_jax.config import RunSettings
from sea_jax.data.fingerprint import Fingerprint, fingerprint
from sea_jax.data.prompts import DataSettings, load_prompts
from sea_jax.models import tokenizer
from sea_jax.models.checkpoints import builtin
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.workdir import as_begun, beginning, check_prompts, check_workdir, claim

LATER = datetime(1999, 12, 31, 23, 59, 59, 5, tzinfo=UTC)
TEMPLATE = """{% if strftime_now is defined %}{{ strftime_now("%d %b") }} {% set year = strftime_now( '%Y' ) %}{% endif %}
{{- year }} {{ messages[0]['content'] }}"""


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Tokenizer:
    return tokenizer.load(builtin.directory("tiny-random-llama"))


def taken(path: Path, words: Tokenizer, heldout: int = 6) -> Fingerprint:
    settings = DataSettings(source="jsonl", path=str(path), heldout_fraction=0.25)
    return fingerprint(*load_prompts(settings, words, heldout), words)


def test_prompts_that_have_changed_are_refused_where_training_goes_on_and_warned_of_elsewhere(
    tmp_path: Path, tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path, workdir = tmp_path / "prompts.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(40)))
    then = taken(path, tiny_tokenizer)
    check_prompts(workdir, then, training=True)  # nothing is known yet
    claim(workdir, configuration.resolve(tiny_random.get_config()), "0" * 16, then, LATER)
    assert beginning(workdir) == LATER
    check_prompts(workdir, taken(path, tiny_tokenizer), training=True)
    for heldout in (2, 99):
        check_prompts(workdir, taken(path, tiny_tokenizer, heldout), training=False)
    assert caplog.text == ""

    path.write_text(path.read_text() + "".join(json.dumps({"prompt": f"more {i}"}) + "\n" for i in range(40)))
    more = taken(path, tiny_tokenizer)
    changed = rf"the run in .*/run began with: to train on there were {then.num_training} and are \d\d, .*; [1-6] of 6"
    with pytest.raises(ValueError, match=changed):
        check_prompts(workdir, more, training=True)
    check_prompts(workdir, more, training=False)
    assert "of 6 held-out ones are others than when the run began" in caplog.text

    (workdir / "prompts_id").write_text("{")
    with pytest.raises(ValueError, match=r"prompts_id is damaged"):
        check_prompts(workdir, then, training=True)


def test_a_tokenizer_that_reads_the_same_prompts_otherwise_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path, workdir = tmp_path / "prompts.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(40)))
    then = taken(path, tiny_tokenizer)
    claim(workdir, configuration.resolve(tiny_random.get_config()), "0" * 16, then, LATER)
    for training, changed in (
        (True, dataclasses.replace(then, training_tokens="0")),
        (True, dataclasses.replace(then, heldout_tokens=["0", *then.heldout_tokens[1:]])),
        (False, dataclasses.replace(then, vocabulary="0")),
    ):
        with pytest.raises(ValueError, match=r"its tokenizer or chat template reads the same prompts as other tokens"):
            check_prompts(workdir, changed, training=training)
    other = dataclasses.replace(tiny_tokenizer, eos_id=7)
    assert taken(path, other).vocabulary != then.vocabulary


def test_a_chat_template_is_told_the_time_that_it_is_given(tiny_tokenizer: Tokenizer) -> None:
    tiny_tokenizer.backend.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    assert dataclasses.replace(tiny_tokenizer, now=LATER).chat(messages) == "31 Dec 1999 hi"
    assert "1999" not in tiny_tokenizer.chat(messages)


def test_a_run_goes_on_as_an_older_version_began_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = RunSettings()
    assert as_begun(now, tmp_path) is now
    saved = json.loads(configuration.to_json(now))
    del saved["data"]["special_tokens"]  # which was done in another way
    del saved["sampling"]["stop"]  # and not at all
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"config\.data\.special_tokens: 'tokens' in the work directory, 'text' now"):
        check_workdir(tmp_path, now)
    with caplog.at_level("INFO", logger="absl"):
        begun = as_begun(now, tmp_path)
    assert begun == dataclasses.replace(now, data=dataclasses.replace(now.data, special_tokens="tokens"))
    assert "config.data.special_tokens='tokens', as when this run was begun" in caplog.text
    check_workdir(tmp_path, begun)
    other = dataclasses.replace(now, seed=1, sampling=dataclasses.replace(now.sampling, stop=("!",)))
    with pytest.raises(ValueError, match=r"config\.sampling\.stop: \(\) in .*\nconfig\.seed: 0 in"):
        check_workdir(tmp_path, as_begun(other, tmp_path))
