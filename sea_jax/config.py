"""Every field of a run's configuration: its default, unit and source, and what it may be."""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from sea_jax.losses import LOSSES
from sea_jax.oracles.preferences import LABELS
from sea_jax.sampling import RULES
from sea_jax.settings import (
    AT_LEAST_1,
    DTYPE,
    FRACTION,
    GIVEN,
    NOT_NEGATIVE,
    POSITIVE,
    URLS,
    Check,
    one_of,
    one_of_numbers,
    one_of_or_user,
)

RunSettings = ml_collections.ConfigDict


def default() -> ml_collections.ConfigDict:
    """Returns the configuration that every config starts from: the paper's values where it gives one.

    Returns:
      A locked ConfigDict; a field that is not in it cannot be set.
    """
    config = ml_collections.ConfigDict()
    config.name = "sea"  # labels the run in tables and plots
    config.seed = 0  # every random choice flows from it
    config.mesh = (1, 1, 1)  # devices along "data", "fsdp", "tensor"; one may be -1: all that are left
    config.bridge_token_file = ""  # holds the servers' token; "": the environment variable SEA_JAX_BRIDGE_TOKEN does
    config.method = "sea"  # how pairs are chosen, labelled and learnt from: "sea", "online", or my_module:my_method
    config.max_queries = 50_000  # budget: pairs labelled by the oracle, exact (paper, App. F)

    config.policy = policy = ml_collections.ConfigDict()
    policy.source = ""  # directory in Hugging Face format, hub name, builtin:NAME or cache:NAME
    policy.train_last_layers = 0  # train the last n layers and the last norm; 0 trains everything
    policy.dtype = "bfloat16"  # compute dtype; parameters and Adam's moments stay float32

    config.data = data = ml_collections.ConfigDict()
    data.source = "docstrings"  # prompts: "docstrings" (built in), "jsonl", "parquet", "huggingface" or "tfds"
    data.path = ""  # file; parquet: or directory of shards, or pattern; huggingface: directory or hub name; tfds: name
    data.heldout_path = ""  # jsonl, parquet: evaluation prompts, as data.path; "": heldout_fraction of data.path
    data.split = "train"  # huggingface, tfds: split of the training prompts
    data.heldout_split = ""  # huggingface, tfds: split of the evaluation prompts; "": heldout_fraction of data.split
    data.subset = ""  # huggingface: name of the data set's configuration; "": the default one
    data.directory = ""  # tfds: its data_dir; "": ~/tensorflow_datasets
    data.heldout_fraction = 0.1  # share of the prompts held out, by a hash of the prompt
    data.prompt_field = "prompt"  # name of the field that holds the prompt
    data.reference_field = ""  # name of the field that holds a reference response; "": there are none
    data.template = "{prompt}"  # what the policy reads, {prompt} once
    data.chat = False  # wrap the filled template into the tokenizer's chat template
    data.system = ""  # system message of the chat template; "": none
    data.num_prompts = 0  # training prompts used, a fixed random sample where they are split by hash; 0: all
    data.max_prompt_tokens = 1024  # longer prompts are filtered and counted (paper, App. F)
    data.bucket = 128  # tokens; prompts of a batch are padded to a multiple of it
    data.batch_size = 128  # b, prompts per step (paper, App. F)

    config.sampling = sampling = ml_collections.ConfigDict()
    sampling.num_samples = 20  # M, candidates per prompt (paper, App. F)
    sampling.max_new_tokens = 53  # T while training (paper, App. F)
    sampling.batch_size = 0  # prompts answered at a time, which bounds the memory of keys and values; 0: all of a batch
    sampling.temperature = 0.7  # (paper, App. F)
    sampling.top_k = 0  # 0 keeps all tokens
    sampling.top_p = 1.0  # 1 keeps all tokens

    config.actor = actor = ml_collections.ConfigDict()
    actor.kind = "in_process"  # who writes the responses: "in_process" (JAX), or "bridge": servers (gpu_bridge)
    actor.urls = ""  # bridge: the policy servers, separated by commas; they share the prompts
    actor.sync_every = 1  # bridge: policy steps after which the servers are given the weights again, for training
    actor.transport = "shm"  # bridge: weights pass through a file in memory, or, between hosts, "http"
    actor.weights_directory = "/dev/shm"  # bridge: where that file lies
    actor.weights_host = "127.0.0.1"  # bridge: http: this host's address, at which the servers fetch the weights
    actor.weights_port = 0  # bridge: http: its port; 0: any that is free
    actor.weights_dtype = "bfloat16"  # bridge: of the weights on their way
    actor.timeout_s = 600.0  # bridge: seconds that a server may take to answer
    actor.retries = 8  # bridge: how often is tried again when no server answers; the waits double, up to a minute each
    actor.lag = 0  # bridge: 1 has the next batch written while the learner works on this one, by a policy a step old
    actor.max_logprob_gap = 0.1  # bridge: nats per token between engine and learner above which the run stops

    config.exploration = exploration = ml_collections.ConfigDict()
    exploration.rule = "bai_ts"  # duel rule by name, those named _oat as in the authors' code; or my_module:my_rule
    exploration.gamma = 0.7  # probability that the oracle labels a duel (authors' code; mixture ratio of Eq. 9)
    exploration.burn_in_queries = 1000  # gamma is 1 until so many queries are paid for
    exploration.erm_share = "drawn"  # prompts for the ERM: by chance (paper), or "fixed": a set number (authors' code)
    exploration.erm_pair = "duel"  # what the ERM labels: "duel" (paper) or "max_margin" (authors' code)
    exploration.erm_label = (
        "head"  # by a random head's choice (paper), or "mean": soft, mean over heads of P(first wins)
    )
    exploration.planning_steps = 0  # policy steps on fresh ERM-labelled pairs per oracle step
    exploration.planning_after_queries = 128  # no planning before so many queries

    config.erm = erm = ml_collections.ConfigDict()
    erm.trunk = ""  # "": hidden states of the reference policy; else an encoder that reads prompt and response
    erm.trunk_dtype = "float32"  # compute dtype of the trunk
    erm.trunk_batch_size = 16  # texts that the trunk reads at a time
    erm.feature_layer = 0  # behind this many layers of the reference policy; 0: behind the last norm
    erm.standardise = True  # features by their spread among the first responses; neither the paper nor its code does
    erm.num_heads = 20  # K (paper, App. F)
    erm.hidden_size = 128  # width of the two hidden layers (paper, App. F)
    erm.learning_rate = 1e-3  # Adam's (paper, App. F)
    erm.weight_decay = 5e-5  # L2 in Adam (authors' code)
    erm.anchor_strength = 0.5  # lambda of Eq. 8 (paper, App. F)
    erm.anchor = "prior"  # it weighs squared distances: summed (Eq. 8), or "mean": averaged (authors' code)
    erm.nll = "sum"  # over heads (Eq. 8), or "mean" (authors' code)
    erm.steps = 5  # m, gradient steps per round (paper, App. A)
    erm.batch_size = 128  # pairs per gradient step (authors' code)
    erm.replay_capacity = 50_000  # pairs kept, first in, first out (authors' code)

    config.loss = loss = ml_collections.ConfigDict()
    loss.name = "dpo"  # direct optimizer by name, or my_module:my_loss
    loss.beta = config_dict.placeholder(float)  # None: the loss's own default
    loss.gamma_over_beta = config_dict.placeholder(float)  # SimPO's target margin in units of beta; None: its default
    loss.length_averaged = config_dict.placeholder(bool)  # IPO on length-averaged log-ratios (authors' code)

    config.learner = learner = ml_collections.ConfigDict()
    learner.learning_rate = 5e-7  # peak (paper, App. F)
    learner.warmup_fraction = 0.03  # share of the policy steps (paper, App. F)
    learner.final_fraction = 0.1  # the cosine ends at this share of the peak (authors' code)
    learner.b1 = 0.9  # Adam
    learner.b2 = 0.95  # Adam
    learner.weight_decay = 0.0  # decoupled
    learner.clip_norm = 1.0  # global gradient norm
    learner.microbatch_size = 8  # pairs whose activations are held at a time; divides data.batch_size
    learner.remat = True  # recompute activations in the backward pass

    config.oracle = oracle = ml_collections.ConfigDict()
    oracle.kind = "embedding"  # or "reward_model" in this process, "remote" (servers), or my_module:my_preference
    oracle.encoder = "builtin:all-minilm-l6-v2"  # of the embedding oracle
    oracle.reward_model = ""  # sequence classifier with one label, given as policy.source is
    oracle.urls = ""  # remote: servers of oracle.reward_model, separated by commas; they share the texts
    oracle.timeout_s = 600.0  # remote: seconds that a server may take to answer
    oracle.retries = 8  # remote: as actor.retries
    oracle.dtype = "bfloat16"  # compute dtype of the reward model
    oracle.batch_size = 32  # texts that the reward model reads at a time; remote: that one request holds
    oracle.max_tokens = 2048  # of prompt and response to the reward model; the beginning of longer prompts is cut
    oracle.scale = 10.0  # of the similarity, inside Bradley-Terry's sigmoid
    oracle.label = "deterministic"  # or "bradley_terry" (drawn), or "soft" (the probability itself)
    oracle.flip_probability = 0.0  # labels exchanged at random (paper, App. G.4)

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.every_queries = 1000  # queries between evaluations
    evaluation.num_prompts = 1000  # held-out prompts (paper, App. F)
    evaluation.batch_size = 128  # prompts generated for at a time
    evaluation.max_new_tokens = 53  # response tokens
    evaluation.against_references = False  # also against the data set's own responses
    evaluation.best_of_n = 0  # at the end: best of n under the ERM; 0: not
    evaluation.best_of_n_prompts = 64  # held-out prompts for it

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 10  # steps between checkpoints; with actor.sync_every, the next push after them
    checkpoint.keep = 2  # newest checkpoints kept

    return config.lock()


def default_sft() -> ml_collections.ConfigDict:
    """Returns the configuration that every supervised fine-tuning config starts from.

    Returns:
      A locked ConfigDict.
    """
    full = default()
    config = ml_collections.ConfigDict()
    config.name = "sft"  # labels the run
    config.seed = 0  # every random choice flows from it
    config.output = ""  # directory for the fine-tuned model, or cache:NAME
    config.steps = 48  # gradient steps
    config.max_response_tokens = 53  # longer references are left out and counted; the end-of-sequence token included
    config.policy, config.data, config.learner = full.policy, full.data, full.learner
    config.eval = ml_collections.ConfigDict()
    config.eval.num_prompts = 128  # held-out pairs for the loss before and after
    return config.lock()


RANGES: Mapping[str, Check] = {
    "mesh": (
        lambda v: len(v) == 3 and all(n == -1 or n >= 1 for n in v) and v.count(-1) <= 1,
        'three numbers of 1 or more, devices along "data", "fsdp" and "tensor"; one of them may be -1',
    ),
    "max_queries": AT_LEAST_1,
    "output": GIVEN,
    "steps": AT_LEAST_1,
    "max_response_tokens": (lambda v: v >= 2, "2 or more (one token and the end of the sequence)"),
    "policy.source": GIVEN,
    "policy.train_last_layers": NOT_NEGATIVE,
    "policy.dtype": DTYPE,
    "seed": (lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1"),
    "data.source": one_of("docstrings", "jsonl", "parquet", "huggingface", "tfds"),
    "data.split": GIVEN,
    "data.prompt_field": GIVEN,
    "data.template": (lambda v: v.count("{prompt}") == 1, "a text with {prompt} in it exactly once"),
    "data.heldout_fraction": (lambda v: 0 < v < 1, "a number between 0 and 1"),
    "data.num_prompts": NOT_NEGATIVE,
    "data.max_prompt_tokens": AT_LEAST_1,
    "data.bucket": AT_LEAST_1,
    "data.batch_size": AT_LEAST_1,
    "sampling.num_samples": (lambda v: v >= 2, "2 or more: a duel needs two candidates"),
    "sampling.max_new_tokens": AT_LEAST_1,
    "sampling.batch_size": NOT_NEGATIVE,
    "sampling.temperature": (lambda v: v > 0, "above 0: greedy candidates are all the same"),
    "sampling.top_k": NOT_NEGATIVE,
    "sampling.top_p": (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
    "actor.kind": one_of("in_process", "bridge"),
    "actor.lag": one_of_numbers(0, 1),
    "actor.urls": URLS,
    "actor.sync_every": AT_LEAST_1,
    "actor.transport": one_of("shm", "http"),
    "actor.weights_directory": (lambda v: v.startswith("/"), "an absolute path"),
    "actor.weights_host": GIVEN,
    "actor.weights_port": (lambda v: 0 <= v < 2**16, "a port number, or 0 for any that is free"),
    "actor.weights_dtype": DTYPE,
    "actor.timeout_s": POSITIVE,
    "actor.retries": NOT_NEGATIVE,
    "actor.max_logprob_gap": POSITIVE,
    "exploration.rule": one_of_or_user(RULES),
    "exploration.gamma": (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
    "exploration.burn_in_queries": NOT_NEGATIVE,
    "exploration.erm_share": one_of("drawn", "fixed"),
    "exploration.erm_pair": one_of("duel", "max_margin"),
    "exploration.erm_label": one_of("head", "mean"),
    "exploration.planning_steps": NOT_NEGATIVE,
    "exploration.planning_after_queries": NOT_NEGATIVE,
    "erm.trunk_dtype": DTYPE,
    "erm.trunk_batch_size": AT_LEAST_1,
    "erm.feature_layer": NOT_NEGATIVE,
    "erm.num_heads": AT_LEAST_1,
    "erm.hidden_size": AT_LEAST_1,
    "erm.learning_rate": POSITIVE,
    "erm.weight_decay": NOT_NEGATIVE,
    "erm.anchor_strength": NOT_NEGATIVE,
    "erm.anchor": one_of("prior", "mean"),
    "erm.nll": one_of("sum", "mean"),
    "erm.steps": AT_LEAST_1,
    "erm.batch_size": AT_LEAST_1,
    "erm.replay_capacity": AT_LEAST_1,
    "loss.name": one_of_or_user(LOSSES),
    "loss.beta": (
        lambda v: v is None or 0 < v < math.inf,
        "a finite number above 0, or None for the loss's own default",
    ),
    "loss.gamma_over_beta": (lambda v: v is None or v >= 0, "0 or more, or None for the loss's own default"),
    "learner.learning_rate": POSITIVE,
    "learner.warmup_fraction": FRACTION,
    "learner.final_fraction": FRACTION,
    "learner.b1": (lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    "learner.b2": (lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    "learner.weight_decay": NOT_NEGATIVE,
    "learner.clip_norm": POSITIVE,
    "learner.microbatch_size": AT_LEAST_1,
    "oracle.kind": one_of_or_user(("embedding", "reward_model", "remote")),
    "oracle.urls": URLS,
    "oracle.timeout_s": POSITIVE,
    "oracle.retries": NOT_NEGATIVE,
    "oracle.dtype": DTYPE,
    "oracle.batch_size": AT_LEAST_1,
    "oracle.max_tokens": AT_LEAST_1,
    "oracle.scale": POSITIVE,
    "oracle.label": one_of(*LABELS),
    "oracle.flip_probability": FRACTION,
    "eval.every_queries": AT_LEAST_1,
    "eval.num_prompts": AT_LEAST_1,
    "eval.batch_size": AT_LEAST_1,
    "eval.max_new_tokens": AT_LEAST_1,
    "eval.best_of_n": NOT_NEGATIVE,
    "eval.best_of_n_prompts": AT_LEAST_1,
    "checkpoint.every_steps": AT_LEAST_1,
    "checkpoint.keep": AT_LEAST_1,
}


# What data.path names for the sources that need one.
PATHS: Mapping[str, str] = {
    "jsonl": "a file of training prompts",
    "parquet": "a file of training prompts, a directory of such files or a pattern",
    "huggingface": "a directory, or the name of a data set on the hub",
    "tfds": "the name of a data set",
}

# The sources that read a field, for fields that not all read: the others refuse it rather than pass over it.
READ_BY: Mapping[str, tuple[str, ...]] = {
    "data.heldout_path": ("jsonl", "parquet"),
    "data.split": ("huggingface", "tfds"),
    "data.heldout_split": ("huggingface", "tfds"),
    "data.subset": ("huggingface",),
    "data.directory": ("tfds",),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses values that cannot work, all of them at once, before anything is loaded.

    Args:
      config: what `default` or `default_sft` returned, with fields set.

    Raises:
      ValueError: one line per offending field: its name, what was found, what would do.
    """
    flat = flatten(config.to_dict())
    faults = [
        f"config.{name}={flat[name]!r}: must be {wanted}"
        for name, (holds, wanted) in RANGES.items()
        if name in flat and not holds(flat[name])
    ]
    batch, microbatch = flat["data.batch_size"], flat["learner.microbatch_size"]
    if microbatch >= 1 and batch % microbatch:
        faults.append(f"config.learner.microbatch_size={microbatch}: must divide config.data.batch_size={batch}")
    if flat.get("sampling.batch_size") and batch % flat["sampling.batch_size"]:
        found = flat["sampling.batch_size"]
        faults.append(f"config.sampling.batch_size={found}: must divide config.data.batch_size={batch}, or be 0")
    source, defaults = flat["data.source"], flatten(default().to_dict())
    if source in PATHS and not flat["data.path"]:
        faults.append(f"config.data.path='': data.source={source} needs {PATHS[source]}")
    faults += [
        f"config.{name}={flat[name]!r}: data.source={source} does not read it; only {' and '.join(readers)} do"
        for name, readers in READ_BY.items()
        if source not in readers and flat[name] not in ("", defaults[name])
    ]
    if flat["data.system"] and not flat["data.chat"]:
        found = flat["data.system"]
        faults.append(
            f"config.data.system={found!r}: only a chat template has a place for it; set config.data.chat=True"
        )
    if flat.get("eval.against_references") and source != "docstrings" and not flat["data.reference_field"]:
        faults.append(
            "config.eval.against_references=True: data.reference_field must name the field that holds the references"
        )
    if flat.get("erm.trunk") and flat["erm.feature_layer"]:
        layer = flat["erm.feature_layer"]
        faults.append(
            f"config.erm.feature_layer={layer}: features come from erm.trunk={flat['erm.trunk']}; set one of them"
        )
    if flat.get("actor.lag") == 1:
        if flat["actor.kind"] != "bridge":
            faults.append(f"config.actor.lag=1: only config.actor.kind=bridge writes ahead, not {flat['actor.kind']}")
        if flat["exploration.planning_steps"]:
            faults.append("config.actor.lag=1: exploration.planning_steps must be 0, planning asks the newest policy")
    if flat.get("actor.kind") == "bridge" and not 0.01 <= flat["sampling.temperature"] <= 2:
        found = flat["sampling.temperature"]
        faults.append(
            f"config.sampling.temperature={found}: engines draw at 0.01 to 2; actor.kind=bridge needs such a one"
        )
    if flat.get("actor.sync_every", 1) > 1 and flat["exploration.planning_steps"]:
        found = flat["actor.sync_every"]
        faults.append(
            f"config.actor.sync_every={found}: exploration.planning_steps must be 0, a step is then a policy step"
        )
    if flat.get("oracle.kind") in ("reward_model", "remote") and not flat["oracle.reward_model"]:
        kind = flat["oracle.kind"]
        faults.append(f"config.oracle.reward_model='': oracle.kind={kind} needs a directory or hub name")
    faults += [
        f"config.{part}.urls='': {part}.kind={kind} needs the URL of a server, or several separated by commas"
        for part, kind in (("actor", "bridge"), ("oracle", "remote"))
        if flat.get(f"{part}.kind") == kind and not flat[f"{part}.urls"]
    ]
    if faults:
        raise ValueError("\n".join(faults))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping with dotted names.

    Args:
      tree: nested mapping.
      prefix: put before every name.

    Returns:
      One flat dictionary.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


# Where the servers are and how long they are waited for: a run may go on with others.
MAY_DIFFER = {"bridge_token_file", "actor.urls", "actor.timeout_s", "actor.retries", "actor.transport"} | {
    *("actor.weights_directory", "actor.weights_host", "actor.weights_port"),
    *("oracle.urls", "oracle.timeout_s", "oracle.retries"),
}


def differences(config: ml_collections.ConfigDict, saved_json: str) -> list[str]:
    """Compares a configuration with the one that a work directory was made with, the places of servers aside.

    Args:
      config: this run's.
      saved_json: text of the work directory's config.json.

    Returns:
      One line per field that differs; empty if none does.
    """
    now, then = flatten(json.loads(config.to_json())), flatten(json.loads(saved_json))
    return [
        f"config.{name}: {then.get(name, 'not there')!r} in the work directory, {now.get(name, 'not there')!r} now"
        for name in sorted((now.keys() | then.keys()) - MAY_DIFFER)
        if now.get(name) != then.get(name)
    ]
