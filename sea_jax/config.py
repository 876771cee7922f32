"""Every field of a run's configuration: its default, unit and source, and what it may be."""

import importlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from sea_jax.losses import LOSSES
from sea_jax.oracles import LABELS
from sea_jax.sampling import RULES


def default() -> ml_collections.ConfigDict:
    """Returns the configuration that every config starts from: the paper's values where it gives one.

    Returns:
      A locked ConfigDict; a field that is not in it cannot be set.
    """
    config = ml_collections.ConfigDict()
    config.name = "sea"  # labels the run in tables and plots
    config.seed = 0  # every random choice flows from it
    config.max_queries = 50_000  # budget: pairs labelled by the oracle, exact (paper, App. F)

    config.policy = policy = ml_collections.ConfigDict()
    policy.source = ""  # directory in Hugging Face format, hub name, builtin:NAME or cache:NAME
    policy.train_last_layers = 0  # train the last n layers and the last norm; 0 trains everything
    policy.dtype = "bfloat16"  # compute dtype; parameters and Adam's moments stay float32

    config.data = data = ml_collections.ConfigDict()
    data.source = "docstrings"  # prompts: "docstrings" (built in) or "jsonl"
    data.path = ""  # jsonl: file of training prompts, one JSON object a line
    data.heldout_path = ""  # jsonl: file of evaluation prompts; "": heldout_fraction of data.path
    data.heldout_fraction = 0.1  # share of the prompts held out, by a hash of the prompt
    data.prompt_field = "prompt"  # name of the field that holds the prompt
    data.reference_field = ""  # name of the field that holds a reference response; "": there are none
    data.template = "{prompt}"  # what the policy reads, {prompt} once
    data.chat = False  # wrap the filled template into the tokenizer's chat template
    data.system = ""  # system message of the chat template; "": none
    data.max_prompt_tokens = 1024  # longer prompts are filtered and counted (paper, App. F)
    data.bucket = 128  # tokens; prompts of a batch are padded to a multiple of it
    data.batch_size = 128  # b, prompts per step (paper, App. F)

    config.sampling = sampling = ml_collections.ConfigDict()
    sampling.num_samples = 20  # M, candidates per prompt (paper, App. F)
    sampling.max_new_tokens = 53  # T while training (paper, App. F)
    sampling.temperature = 0.7  # (paper, App. F)
    sampling.top_k = 0  # 0 keeps all tokens
    sampling.top_p = 1.0  # 1 keeps all tokens

    config.exploration = exploration = ml_collections.ConfigDict()
    exploration.rule = "bai_ts"  # duel rule by name, or my_module:my_rule
    exploration.gamma = 0.7  # probability that the oracle labels a duel (authors' code; mixture ratio of Eq. 9)
    exploration.burn_in_queries = 1000  # gamma is 1 until so many queries are paid for
    exploration.erm_pair = "duel"  # what the ERM labels: "duel" (paper) or "max_margin" (authors' code)
    exploration.erm_label = (
        "head"  # by a random head's choice (paper), or "mean": soft, mean over heads of P(first wins)
    )
    exploration.planning_steps = 0  # policy steps on fresh ERM-labelled pairs per oracle step
    exploration.planning_after_queries = 128  # no planning before so many queries

    config.erm = erm = ml_collections.ConfigDict()
    erm.trunk = ""  # "": hidden states of the reference policy; else an encoder that reads prompt and response
    erm.feature_layer = 0  # behind this many layers of the reference policy; 0: behind the last norm
    erm.num_heads = 20  # K (paper, App. F)
    erm.hidden_size = 128  # width of the two hidden layers (paper, App. F)
    erm.learning_rate = 1e-3  # Adam's (paper, App. F)
    erm.weight_decay = 5e-5  # L2 in Adam (authors' code)
    erm.anchor_strength = 0.5  # lambda of Eq. 8 (paper, App. F)
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
    oracle.kind = "embedding"  # "embedding" (similarity to the prompt), or my_module:my_preference
    oracle.encoder = "builtin:all-minilm-l6-v2"  # of the embedding oracle
    oracle.scale = 10.0  # of the similarity, inside Bradley-Terry's sigmoid
    oracle.label = "deterministic"  # or "bradley_terry" (drawn), or "soft" (the probability itself)
    oracle.flip_probability = 0.0  # labels exchanged at random (paper, App. G.4)

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.every_queries = 1000  # queries between evaluations
    evaluation.num_prompts = 1000  # held-out prompts (paper, App. F)
    evaluation.batch_size = 128  # prompts generated for at a time
    evaluation.max_new_tokens = 53  # response tokens
    evaluation.best_of_n = 0  # at the end: best of n under the ERM; 0: not
    evaluation.best_of_n_prompts = 64  # held-out prompts for it

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 10  # steps between checkpoints
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


Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda v: 0 < v < math.inf, "a finite number above 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "0 or more")
AT_LEAST_1: Check = (lambda v: v >= 1, "1 or more")
FRACTION: Check = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
GIVEN: Check = (lambda v: bool(v), "a non-empty text")
DTYPE: Check = (lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16")


def one_of(*names: str) -> Check:
    """Returns a check for one of some names."""
    return lambda v: v in names, f"one of {', '.join(names)}"


def one_of_or_user(names: Mapping[str, Any] | tuple[str, ...]) -> Check:
    """Returns a check for one of some names, or my_module:my_function."""
    return lambda v: v in names or v.count(":") == 1, f"one of {', '.join(names)}, or my_module:my_function"


RANGES: Mapping[str, Check] = {
    "max_queries": AT_LEAST_1,
    "output": GIVEN,
    "steps": AT_LEAST_1,
    "max_response_tokens": (lambda v: v >= 2, "2 or more (one token and the end of the sequence)"),
    "policy.source": GIVEN,
    "policy.train_last_layers": NOT_NEGATIVE,
    "policy.dtype": DTYPE,
    "data.source": one_of("docstrings", "jsonl"),
    "data.heldout_fraction": (lambda v: 0 < v < 1, "a number between 0 and 1"),
    "data.max_prompt_tokens": AT_LEAST_1,
    "data.bucket": AT_LEAST_1,
    "data.batch_size": AT_LEAST_1,
    "sampling.num_samples": (lambda v: v >= 2, "2 or more: a duel needs two candidates"),
    "sampling.max_new_tokens": AT_LEAST_1,
    "sampling.temperature": (lambda v: v > 0, "above 0: greedy candidates are all the same"),
    "sampling.top_k": NOT_NEGATIVE,
    "sampling.top_p": (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
    "exploration.rule": one_of_or_user(RULES),
    "exploration.gamma": (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
    "exploration.burn_in_queries": NOT_NEGATIVE,
    "exploration.erm_pair": one_of("duel", "max_margin"),
    "exploration.erm_label": one_of("head", "mean"),
    "exploration.planning_steps": NOT_NEGATIVE,
    "exploration.planning_after_queries": NOT_NEGATIVE,
    "erm.feature_layer": NOT_NEGATIVE,
    "erm.num_heads": AT_LEAST_1,
    "erm.hidden_size": AT_LEAST_1,
    "erm.learning_rate": POSITIVE,
    "erm.weight_decay": NOT_NEGATIVE,
    "erm.anchor_strength": NOT_NEGATIVE,
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
    "oracle.kind": one_of_or_user(("embedding",)),
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
    if flat["data.source"] == "jsonl" and not flat["data.path"]:
        faults.append("config.data.path='': data.source=jsonl needs a file of training prompts")
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


def user_function(name: str, field: str) -> Callable[..., Any]:
    """Returns the user's own function.

    Args:
      name: my_module:my_function, importable from where the program was started.
      field: the config field it stands in, for the error.

    Returns:
      The function.

    Raises:
      ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"config.{field}={name}: {error}; give the name of an importable function") from error
    if not callable(found):
        raise ValueError(f"config.{field}={name}: expected a function, found {type(found).__name__}")
    return found


def differences(config: ml_collections.ConfigDict, saved_json: str) -> list[str]:
    """Compares a configuration with the one that a work directory was made with.

    Args:
      config: this run's.
      saved_json: text of the work directory's config.json.

    Returns:
      One line per field that differs; empty if none does.
    """
    now, then = flatten(json.loads(config.to_json())), flatten(json.loads(saved_json))
    return [
        f"config.{name}: {then.get(name, 'not there')!r} in the work directory, {now.get(name, 'not there')!r} now"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]
