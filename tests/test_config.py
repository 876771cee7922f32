import ast
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import ml_collections
import pytest

import configs
from configs import quickstart, tldr
from sea_jax import config as configuration
from sea_jax import settings, wiring
from sea_jax.config import RunSettings, SftSettings, flatten
from sea_jax.methods.table import METHODS
from sea_jax.settings import addresses, user_function

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    made = configuration.default()
    made.policy.source = "builtin:anything"
    return made


@pytest.fixture
def sft() -> ml_collections.ConfigDict:
    made = configuration.default_sft()
    made.policy.source, made.output = "builtin:anything", "cache:somewhere"
    return made


def set_field(config: ml_collections.ConfigDict, name: str, value: object) -> None:
    config.update_from_flattened_dict({name: value})


def test_the_defaults_are_valid_once_a_policy_is_named(config, sft):
    assert configuration.resolve(config).oracle.scale == 10.0  # that of a cosine
    configuration.resolve_sft(sft)


def test_a_policy_must_be_named():
    with pytest.raises(ValueError, match=r"^config\.policy\.source='': must be a non-empty text$"):
        configuration.resolve(configuration.default())


# What a field may not be, and what its error says would do.
REFUSED = [
    ("max_queries", 0, "1 or more"),
    ("mesh", (1, 8), "three numbers"),
    ("mesh", (-1, -1, 1), "one of them may be -1"),
    ("mesh", (1, 0, 1), "1 or more"),
    ("method", "", "a non-empty text"),
    ("data.num_prompts", -1, "0 or more"),
    ("sampling.batch_size", -1, "0 or more"),
    ("actor.kind", "vllm", "one of in_process, bridge"),
    ("actor.lag", 2, "one of 0, 1"),
    ("actor.max_logprob_gap", 0.0, "a finite number above 0"),
    ("erm.trunk_dtype", "int8", "float32 or bfloat16"),
    ("erm.trunk_batch_size", 0, "1 or more"),
    ("oracle.dtype", "float16", "float32 or bfloat16"),
    ("oracle.batch_size", 0, "1 or more"),
    ("oracle.max_tokens", 0, "1 or more"),
    ("policy.train_last_layers", -1, "0 or more"),
    ("policy.dtype", "float16", "float32 or bfloat16"),
    ("seed", -1, r"from 0 to 2\*\*32 - 1"),
    ("seed", 2**32, r"from 0 to 2\*\*32 - 1"),
    ("data.template", "Summarise:", "{prompt} in it exactly once"),
    ("data.template", "{prompt} {prompt}", "{prompt} in it exactly once"),
    ("data.source", "hub", "one of docstrings, jsonl, csv, parquet, huggingface, tfds"),
    ("data.split", "", "a non-empty text"),
    ("data.special_tokens", "keep", "one of text, tokens"),
    ("data.chat_arguments", "[1]", "a JSON object"),
    ("sampling.stop", ("!", ""), "non-empty texts in parentheses"),
    ("sampling.thoughts", ("<think>",), "two non-empty texts"),
    ("data.heldout_fraction", 0.0, "between 0 and 1"),
    ("data.heldout_fraction", 1.0, "between 0 and 1"),
    ("data.near_duplicate_share", 1.1, "from 0 to 1"),
    ("data.max_prompt_tokens", 0, "1 or more"),
    ("data.bucket", 0, "1 or more"),
    ("data.batch_size", 0, "1 or more"),
    ("sampling.num_samples", 1, "2 or more: a duel needs two"),
    ("sampling.max_new_tokens", 0, "1 or more"),
    ("sampling.temperature", 0.0, "above 0: greedy candidates are all the same"),
    ("sampling.temperature", float("nan"), "above 0"),
    ("sampling.top_k", -1, "0 or more"),
    ("sampling.top_p", 0.0, "above 0 and up to 1"),
    ("sampling.top_p", 1.5, "above 0 and up to 1"),
    ("actor.urls", "localhost:8000", "http:// or https:// URLs"),
    ("actor.urls", "http://localhost:8000,", "separated by commas"),
    ("actor.urls", "http://localhost:8000/v1", "without a path"),
    ("actor.urls", "http://localhost:many", "http:// or https:// URLs"),
    ("actor.urls", "http://user:secret@localhost:8000", "http:// or https:// URLs"),
    ("actor.sync_every", 0, "1 or more"),
    ("actor.transport", "nccl", "one of shm, http"),
    ("actor.weights_directory", "weights", "an absolute path"),
    ("actor.weights_host", "", "a non-empty text"),
    ("actor.weights_port", 65536, "a port number, or 0"),
    ("actor.weights_dtype", "float16", "float32 or bfloat16"),
    ("actor.timeout_s", 0.0, "above 0"),
    ("actor.retries", -1, "0 or more"),
    ("oracle.urls", "ftp://localhost:8000", "http:// or https:// URLs"),
    ("oracle.timeout_s", 0.0, "above 0"),
    ("oracle.retries", -1, "0 or more"),
    ("exploration.unfinished", "wins", "one of asked, left_out, lose"),
    ("metrics.writers", ("tensorflow",), "tensorboard, wandb or my_module:my_function"),
    ("oracle.concurrency", 0, "1 or more"),
    ("oracle.max_abstentions", -1, "0 or more"),
    ("exploration.rule", "thompson", "one of passive, ee_ts, bai_ts, uncertainty, .*or my_module:my_function"),
    ("exploration.rule", "a:b:c", "my_module:my_function"),
    ("exploration.width", 0.0, "above 0, or None"),
    ("exploration.gamma", 0.0, "above 0 and up to 1"),
    ("exploration.gamma", 1.01, "above 0 and up to 1"),
    ("exploration.burn_in_queries", -1, "0 or more"),
    ("exploration.asked_prompts", -1, "0 or more"),
    ("exploration.erm_share", "some", "one of drawn, fixed"),
    ("exploration.erm_pair", "best", "one of duel, max_margin"),
    ("exploration.erm_label", "soft", "one of head, mean"),
    ("exploration.planning_steps", -1, "0 or more"),
    ("exploration.planning_after_queries", -1, "0 or more"),
    ("erm.feature_layer", -1, "0 or more"),
    ("erm.num_heads", 0, "1 or more"),
    ("erm.hidden_size", 0, "1 or more"),
    ("erm.learning_rate", 0.0, "above 0"),
    ("erm.weight_decay", -1e-5, "0 or more"),
    ("erm.anchor_strength", -0.5, "0 or more"),
    ("erm.anchor", "norm", "one of prior, mean"),
    ("erm.anchor_fade", 0.0, "above 0 and up to 1"),
    ("erm.prior_scale", -0.5, "0 or more"),
    ("erm.centring", -0.5, "0 or more"),
    ("erm.nll", "max", "one of sum, mean"),
    ("erm.steps", 0, "1 or more"),
    ("erm.batch_size", 0, "1 or more"),
    ("erm.replay_capacity", 0, "1 or more"),
    ("loss.name", "kto", "one of dpo, ipo, slic, simpo, linear, xpo, selm, or my_module:my_function"),
    ("loss.beta", 0.0, "above 0, or None"),
    ("loss.beta", -0.1, "above 0, or None"),
    ("loss.nudge", -0.1, "0 or more, or None"),
    ("loss.alpha", -0.1, "0 or more, or None"),
    ("loss.label_smoothing", 0.5, "from 0 to below 0.5"),
    ("loss.gamma_over_beta", -0.1, "0 or more, or None"),
    ("group.kl", -0.1, "0 or more"),
    ("group.pessimism", -1.0, "0 or more"),
    ("group.clip", 0.0, "above 0"),
    ("group.epochs", 0, "1 or more"),
    ("learner.learning_rate", 0.0, "above 0"),
    ("learner.warmup_fraction", 1.5, "from 0 to 1"),
    ("learner.final_fraction", -0.1, "from 0 to 1"),
    ("learner.b1", 1.0, "below 1"),
    ("learner.b2", -0.1, "from 0"),
    ("learner.weight_decay", -0.1, "0 or more"),
    ("learner.clip_norm", 0.0, "above 0"),
    ("learner.anchor_decay", 1.0, "from 0 to below 1"),
    ("learner.microbatch_size", 0, "1 or more"),
    ("oracle.kind", "human", "one of embedding, reward_model, remote, judge, people, or my_module:my_function"),
    ("people.names", ("anna", "anna"), "different names"),
    ("people.redundancy", 0, "1 or more"),
    ("people.enough", 1.5, "from 0 to 1"),
    ("people.max_staleness", -1, "0 or more"),
    ("people.slightly", 0.4, "between 0.5 and 1"),
    ("people.lease_s", 0.0, "above 0"),
    ("people.undo_s", -1.0, "0 or more"),
    ("people.check_every", 0, "1 or more"),
    ("people.port", 65536, "a port"),
    ("oracle.judge.url", "api.openai.com/v1", "http:// or https:// URL"),
    ("oracle.judge.samples", -1, "0 or more"),
    ("oracle.judge.temperature", 2.5, "from 0 to 2"),
    ("oracle.judge.answer_tokens", 0, "1 or more"),
    ("oracle.judge.arguments", "[]", "a JSON object"),
    ("oracle.judge.max_cost", -1.0, "0 or more"),
    ("oracle.judge.input_price", -1.0, "0 or more"),
    ("oracle.judge.output_price", -1.0, "0 or more"),
    ("oracle.scale", -1.0, "0 or more"),
    ("oracle.label", "hard", "one of deterministic, bradley_terry, soft"),
    ("oracle.flip_probability", 1.1, "from 0 to 1"),
    ("oracle.against", "post", "one of prompt, reference, mixture"),
    ("oracle.reference_weight", 1.1, "from 0 to 1"),
    ("oracle.repetition_penalty", -0.1, "0 or more"),
    ("eval.likelihood_prompts", -1, "0 or more"),
    (
        "eval.judge.kind",
        "human",
        "empty, one of embedding, reward_model, remote, judge, or my_module:my_function",
    ),
    ("eval.every_queries", 0, "1 or more"),
    ("eval.num_prompts", 0, "1 or more"),
    ("eval.batch_size", 0, "1 or more"),
    ("eval.max_new_tokens", 0, "1 or more"),
    ("eval.best_of_n", -1, "0 or more"),
    ("eval.best_of_n_prompts", 0, "1 or more"),
    ("checkpoint.every_steps", 0, "1 or more"),
    ("checkpoint.keep", 0, "1 or more"),
]
# A judge can be all that an oracle can.
LABELS_ALONE = ("oracle.kind", "oracle.label", "oracle.flip_probability")
REFUSED += [
    (f"eval.judge.{name.removeprefix('oracle.')}", value, wanted)
    for name, value, wanted in REFUSED
    if name.startswith("oracle.") and name not in LABELS_ALONE
]


@pytest.mark.parametrize(("name", "value", "wanted"), REFUSED)
def test_a_value_that_cannot_work_is_refused(config, name, value, wanted):
    set_field(config, name, value)
    with pytest.raises(ValueError, match=rf"(?m)^config\.{name}={re.escape(repr(value))}: must be .*{wanted}") as error:
        configuration.resolve(config)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("output", ""), ("output_dtype", "int8"), ("steps", 0), ("max_response_tokens", 1)]
)
def test_a_value_that_cannot_work_is_refused_in_fine_tuning(sft, name, value):
    set_field(sft, name, value)
    with pytest.raises(ValueError, match=rf"^config\.{name}={value!r}: must be"):
        configuration.resolve_sft(sft)


def test_every_field_has_a_range_that_is_tested_or_may_be_anything():
    anything = {"name", "data.path", "data.heldout_path", "data.heldout_split", "data.reference_field"}
    anything |= {"data.subset", "data.directory", "data.id_field", "data.skip_bad_rows"}
    anything |= {"data.prompt_field", "data.rejected_field"}
    anything |= {"data.chat", "data.system", "erm.trunk", "loss.length_averaged", "learner.remat"}
    anything |= {"erm.standardise", "eval.best_of_n_always"}
    anything |= {"oracle.encoder", "oracle.reward_model", "eval.against_references", "bridge_token_file"}
    anything |= {"eval.oracle", "eval.judge.encoder", "eval.judge.reward_model"}
    anything |= {f"people.{name}" for name in ("guidelines", "checks", "host", "tls_certificate", "tls_key")}
    anything |= {
        f"{taste}.judge.{name}"
        for taste in ("oracle", "eval.judge")
        for name in ("model", "key_environment", "template", "both_orders", "cache")
    }
    everything = [*settings.walk(RunSettings()), *settings.walk(SftSettings())]
    ranged = {name for name, field, _ in everything if field.metadata["must"] is not settings.ANY}
    assert {name for name, _, _ in everything} - ranged == anything
    assert ranged == {name for name, _, _ in REFUSED} | {
        *("policy.source", "output", "output_dtype", "steps", "max_response_tokens")
    }


def test_every_field_says_what_it_is():
    for name, field, _ in [*settings.walk(RunSettings()), *settings.walk(SftSettings())]:
        assert len(field.metadata["says"]) > 3, name


def test_a_system_message_needs_a_chat_template(config):
    config.data.system = "Be brief."
    with pytest.raises(ValueError, match=r"^config\.data\.system='Be brief\.': only a chat template"):
        configuration.resolve(config)
    config.data.chat = True
    configuration.resolve(config)


def test_only_pairs_need_no_field_of_prompts(config):
    config.data.prompt_field = ""
    with pytest.raises(ValueError, match=r"^config\.data\.prompt_field='': must be a non-empty text where"):
        configuration.resolve(config)
    config.data.rejected_field = "rejected"
    with pytest.raises(ValueError, match=r"^config\.data\.rejected_field='rejected': data\.reference_field must name"):
        configuration.resolve(config)
    config.data.reference_field = "chosen"
    configuration.resolve(config)


@pytest.mark.parametrize("name", ["template", "system"])
def test_half_of_a_character_is_refused_where_prompts_are_made(config, name):
    config.data.chat, config.data[name] = True, "{prompt} \ud83d"
    with pytest.raises(ValueError, match=rf"^config\.data\.{name}='{{prompt}} \\ud83d': holds half of a character"):
        configuration.resolve(config)


def test_a_microbatch_must_divide_the_batch(config):
    config.data.batch_size, config.learner.microbatch_size = 12, 8
    with pytest.raises(
        ValueError, match=r"^config\.learner\.microbatch_size=8: must divide config\.data\.batch_size=12$"
    ):
        configuration.resolve(config)
    config.learner.microbatch_size = 6
    configuration.resolve(config)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("jsonl", "a file"),
        ("csv", "a file"),
        ("parquet", "a file"),
        ("huggingface", "a directory"),
        ("tfds", "the name"),
    ],
)
def test_prompts_from_elsewhere_need_to_know_where(config, source, wanted):
    config.data.source = source
    with pytest.raises(ValueError, match=rf"^config\.data\.path='': data\.source={source} needs {wanted}.*$"):
        configuration.resolve(config)
    config.data.path = "prompts"
    configuration.resolve(config)


@pytest.mark.parametrize(
    ("field", "readers"),
    [
        ("heldout_path", {"jsonl", "csv", "parquet"}),
        ("split", {"huggingface", "tfds"}),
        ("heldout_split", {"huggingface", "tfds"}),
        ("subset", {"huggingface"}),
        ("directory", {"tfds"}),
    ],
)
def test_a_field_that_the_source_does_not_read_is_refused(config, field, readers):
    config.data.path, config.data[field] = "prompts", "other"
    for source in ("docstrings", "jsonl", "csv", "parquet", "huggingface", "tfds"):
        config.data.source = source
        if source in readers:
            configuration.resolve(config)
            continue
        with pytest.raises(ValueError, match=rf"^config\.data\.{field}='other': data\.source={source} does not read"):
            configuration.resolve(config)


@pytest.mark.parametrize(("part", "kind"), [("actor", "bridge"), ("oracle", "remote")])
def test_servers_need_an_address(config, part, kind):
    config[part].kind, config.oracle.reward_model = kind, "a/reward-model"
    with pytest.raises(ValueError, match=rf"^config\.{part}\.urls='': {part}\.kind={kind} needs the URL of a server"):
        configuration.resolve(config)
    config[part].urls = "http://127.0.0.1:8000/, https://elsewhere"
    configuration.resolve(config)
    assert addresses(config[part].urls) == ("http://127.0.0.1:8000", "https://elsewhere")


@pytest.mark.parametrize("kind", ["reward_model", "remote"])
def test_a_reward_model_must_be_named(config, kind):
    config.oracle.kind, config.oracle.urls = kind, "http://127.0.0.1:8000"
    with pytest.raises(ValueError, match=rf"^config\.oracle\.reward_model='': oracle\.kind={kind} needs a directory"):
        configuration.resolve(config)


def test_all_faults_are_named_at_once(config):
    config.max_queries, config.loss.beta, config.learner.microbatch_size = 0, -1.0, 7
    with pytest.raises(ValueError, match=r"must be") as error:
        configuration.resolve(config)
    named = [line.split("=")[0] for line in str(error.value).splitlines()]
    assert named == ["config.max_queries", "config.loss.beta", "config.learner.microbatch_size"]


def test_fields_are_locked_and_typed(config, sft):
    for made in (config, sft):
        with pytest.raises(AttributeError):
            made.polcy = "typo"
        with pytest.raises(AttributeError):
            made.learner.learning_rat = 1e-6
        with pytest.raises(TypeError):
            made.data.batch_size = "many"
        with pytest.raises(TypeError):
            made.learner.learning_rate = "fast"


def test_hyper_parameters_that_are_none_take_a_value_of_their_kind(config):
    assert config.loss.beta is None
    config.loss.beta = 0.5
    configuration.resolve(config)
    with pytest.raises(TypeError):
        config.loss.beta = "strong"


@pytest.mark.parametrize("path", sorted(Path(configs.__file__).parent.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_the_configurations_that_come_along_are_valid(path):
    config = importlib.import_module(f"configs.{path.stem}").get_config()
    (configuration.resolve_sft if "output" in config else configuration.resolve)(config)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_argument_of_a_configuration_that_it_can_take(name):
    for config in (quickstart.get_config(name), tldr.get_config(f"1b,{name}")):
        settings = configuration.resolve(config)
        assert settings.method == name
        assert settings.name.endswith(f"-{name}")
        wiring.method(settings)
    assert set(METHODS) == set(wiring.METHODS)
    with pytest.raises(ValueError, match=r"^nothing: the methods are sea, dyna"):
        quickstart.get_config("nothing")


def test_flatten():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "taste_of_mine.py").write_text("LIMIT = 3\ndef rule(rewards, distinct, key):\n    return LIMIT\n")
    (tmp_path / "broken_of_mine.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("taste_of_mine", "broken_of_mine"):
        sys.modules.pop(name, None)


def test_a_function_of_the_user(user_module, config):
    config.exploration.rule = "taste_of_mine:rule"
    configuration.resolve(config)
    assert user_function("taste_of_mine:rule", "exploration.rule")(None, None, None) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:rule", "No module named 'no_such_module'"),
        ("taste_of_mine:ruel", "has no attribute 'ruel'"),
        ("taste_of_mine:LIMIT", "expected a function, found int"),
        ("broken_of_mine:rule", "a_module_that_is_not_there"),
    ],
)
def test_a_function_of_the_user_that_is_not_there(user_module, name, message):
    with pytest.raises(ValueError, match=rf"^config\.exploration\.rule={name}: .*{message}"):
        user_function(name, "exploration.rule")


def test_differences(config):
    then = configuration.resolve(config)
    assert configuration.differences(then, then) == []
    config.learner.learning_rate, config.loss.beta = 1e-5, 0.5
    assert configuration.differences(configuration.resolve(config), then) == [
        "config.learner.learning_rate: 5e-07 in the work directory, 1e-05 now",
        "config.loss.beta: None in the work directory, 0.5 now",
    ]
    config.actor.urls, config.oracle.retries = "http://127.0.0.1:8000", 3  # servers may move while a run stands still
    assert len(configuration.differences(configuration.resolve(config), then)) == 2


def test_a_budget_may_grow_and_what_is_allowed_may_change(config):
    then = configuration.resolve(config)
    config.max_queries, config.loss.beta, config.mesh = 60_000, 0.5, (2, 1, 1)
    now = configuration.resolve(config)
    assert configuration.differences(now, then) == ["config.loss.beta: None in the work directory, 0.5 now"]
    assert configuration.differences(now, then, ["loss.beta"]) == []
    assert configuration.changes(now, then) == {"max_queries": (50_000, 60_000), "loss.beta": (None, 0.5)}
    assert configuration.differences(then, now, ["loss.beta"]) == [
        "config.max_queries: 60000 in the work directory, 50000 now"
    ]
    with pytest.raises(ValueError, match=r"^--allow_changed=loss.bta: no such setting"):
        configuration.differences(now, then, ["loss.beta", "loss.bta"])


def test_relative_paths_mean_the_same_from_another_directory(config, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config.policy.source, config.erm.trunk, config.oracle.reward_model = "model", "llm-blender/PairRM", "builtin:x"
    config.data.source, config.data.path, config.bridge_token_file = "parquet", "shards/*.parquet", "~/token"
    found = configuration.located(configuration.resolve(config))
    assert found.policy.source == str(tmp_path / "model")
    assert (found.erm.trunk, found.oracle.reward_model) == ("llm-blender/PairRM", "builtin:x")
    assert (found.data.path, found.data.heldout_path) == (str(tmp_path / "shards" / "*.parquet"), "")
    assert found.bridge_token_file == str(Path("~/token").expanduser())
    config.data.source = "huggingface"
    assert configuration.located(configuration.resolve(config)).data.path == "shards/*.parquet"
    assert configuration.located(found) == found


def test_settings_survive_a_file(config):
    config.mesh, config.loss.beta = (1, -1, 1), 0.5
    written = configuration.resolve(config)
    assert configuration.from_json(json.loads(configuration.to_json(written)), "config.json") == written


def test_a_file_of_an_older_version_means_what_it_meant_then(config, caplog):
    saved = json.loads(configuration.to_json(configuration.resolve(config)))
    del saved["method"], saved["checkpoint"]["keep"]
    with caplog.at_level("INFO", logger="absl"):
        found = configuration.from_json(saved, "run/config.json")
    assert (found.method, found.checkpoint.keep) == ("sea", 2)
    assert "run/config.json is older than method, checkpoint.keep" in caplog.text


def test_a_newer_field_takes_the_value_that_there_was_before_it(config, monkeypatch):
    @dataclass(frozen=True)
    class Later(RunSettings):
        patience: int = settings.setting(3, "asked again so often", before=1)

    saved = json.loads(configuration.to_json(configuration.resolve(config)))
    monkeypatch.setattr(configuration, "RunSettings", Later)
    assert Later().patience == 3
    assert vars(configuration.from_json(saved, "config.json"))["patience"] == 1
    assert vars(configuration.from_json(saved | {"patience": 2}, "config.json"))["patience"] == 2


def test_a_field_that_is_gone_and_a_value_of_another_kind_are_named(config):
    saved = json.loads(configuration.to_json(configuration.resolve(config)))
    with pytest.raises(
        ValueError, match=r"(?s)^run/config\.json was written by another.*\nconfig\.erm\.gone: not a field"
    ):
        configuration.from_json(saved | {"erm": saved["erm"] | {"gone": 1}}, "run/config.json")
    with pytest.raises(ValueError, match=r"^run/config\.json: config\.seed='many'"):
        configuration.from_json(saved | {"seed": "many"}, "run/config.json")


def test_the_table_of_settings_says_all_and_stands_in_the_docs(config):
    config.loss.beta = 0.5
    table = configuration.table(configuration.resolve(config))
    assert (
        "| `loss.beta` | float or None | `None`, here `0.5` | None: the loss's own default | a finite number above 0"
        in table
    )
    assert "| `data.batch_size` | int | `128` | b, prompts per step | 1 or more |  | paper, App. F |" in table
    assert r"(1 / N) \|\|phi_k - phi_k^0\|\|^2 of every head" in table  # whole, and no column of its own
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {8}
    printed = subprocess.run(
        [sys.executable, "-m", "sea_jax.config"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (ROOT / "docs" / "settings.md").read_text() == printed.stdout


@pytest.mark.parametrize(
    ("program", "file"), [("train", "quickstart"), ("sft", "quickstart_sft"), ("memory", "quickstart")]
)
def test_every_program_prints_the_settings_and_loads_no_model(program, file):
    command = [sys.executable, "-m", f"sea_jax.{program}", f"--config=configs/{file}.py", "--help_config"]
    overrides = ["--config.policy.source=/no/such/model", "--config.data.batch_size=0"]
    printed = subprocess.run([*command, *overrides], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    names = re.findall(r"(?m)^\| `([^`]+)`", printed)
    assert names == [name for name, _, _ in settings.walk(SftSettings() if program == "sft" else RunSettings())]
    assert "| `policy.source` | str | `''`, here `'/no/such/model'` |" in printed
    assert "| `data.batch_size` | int | `128`, here `0` | b, prompts per step | 1 or more |" in printed


def test_no_function_has_a_default_of_its_own_for_a_setting():
    """What means "without" aside; losses and rules have their papers' own, models know no settings."""
    names = {name.split(".")[-1] for name, _, _ in [*settings.walk(RunSettings()), *settings.walk(SftSettings())]}
    found = []
    for path in sorted((ROOT / "sea_jax").rglob("*.py")):
        if path.name in ("losses.py", "sampling.py", "settings.py") or "models" in path.parts:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            positional, keyword = function.args.posonlyargs + function.args.args, function.args.kwonlyargs
            defaults = [None] * (len(positional) - len(function.args.defaults)) + function.args.defaults
            given = zip(positional + keyword, defaults + function.args.kw_defaults, strict=True)
            found += [
                f"{path.stem}.{function.name}({argument.arg}={ast.unparse(default)})"
                for argument, default in given
                if argument.arg in names and default and ast.unparse(default) not in ("0", "''", "None", "False")
            ]
    assert found == []


def test_a_configuration_file_needs_no_tokenizers_and_no_readers_of_data():
    code = "import sys; from configs import quickstart; quickstart.get_config(); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = {"transformers", "torch", "datasets", "pyarrow", "tensorflow_datasets", "matplotlib", "gpu_bridge"}
    assert heavy & set(loaded.split()) == set()


def test_people_may_be_asked_otherwise_when_a_run_goes_on_but_for_how_long_pairs_stay_open():
    then = configuration.resolve(quickstart.get_config())
    people = replace(then.people, names=("anna",), enough=0.5, redundancy=1)
    assert configuration.differences(replace(then, people=people), then) == []
    longer = replace(then, people=replace(then.people, max_staleness=9))
    (found,) = configuration.differences(longer, then)
    assert found.startswith("config.people.max_staleness: ")
