"""The policy: a decoder read from its files, divided into what is trained and what is not, placed on the mesh, exported."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from sea_jax.models import decoder, partition, tokenizer
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import Config, ModelConfig
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.runtime import cache, processes
from sea_jax.settings import DTYPE, GIVEN, NOT_NEGATIVE, naming, setting
from sea_jax.types import Params

FINGERPRINT_FILE = "policy_id"  # file in the work directory
NUMBERS_READ = 4096  # of each parameter, for its fingerprint


@dataclass(frozen=True)
class PolicySettings:
    """Which model learns, and how much of it."""

    source: str = setting("", "directory in Hugging Face format, hub name, builtin:NAME or cache:NAME", GIVEN)
    train_last_layers: int = setting(0, "train the last n layers and the last norm; 0: everything", NOT_NEGATIVE)
    dtype: str = setting("bfloat16", "compute dtype; parameters and Adam's moments stay float32", DTYPE)


@dataclass(frozen=True)
class Policy:
    """A loaded decoder, divided for training.

    Attributes:
      config: its configuration.
      tokenizer: its tokenizer.
      directory: where both were read.
      frozen: the part of the parameters that is not trained; matrices in the compute dtype.
      reference: the trained part as it was loaded, pi_ref; matrices in the compute dtype.
      initial: the same on the host in float32, where training starts.
      feature_stack: features stand behind this many stacks of layers; None: behind the last norm.
      features_are_frozen: no layer up to the features is trained.
      fingerprint: of the weights as they were loaded.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    directory: Path
    frozen: Params
    reference: Params
    initial: Params
    feature_stack: int | None
    features_are_frozen: bool
    fingerprint: str


def check_language_model(config: Config) -> ModelConfig:
    """Returns a language model's configuration; refuses any other.

    Raises:
      ValueError: it is an encoder's or a reward model's.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError("expected a decoder, found an encoder")
    if config.scalar_head:
        raise ValueError("expected a language model, found a reward model")
    return config


@dataclass(frozen=True)
class PolicyFiles:
    """What is known of a policy without its weights.

    Attributes:
      source: as it was given.
      directory: where it was found.
      config: its configuration.
      tokenizer: its tokenizer.
    """

    source: str
    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer


def read_files(source: str) -> PolicyFiles:
    """Reads what a policy is, without its weights.

    Args:
      source: anything that `hf.load` takes.

    Raises:
      ValueError: the source is no decoder, or its tokenizer does not fit it.
    """
    with naming("policy.source", source):
        name = source
        if source.startswith(cache.PREFIX):
            name = str(cache.resolve(source))
            if not Path(name).exists():
                raise ValueError(
                    f"there is no {name}; make it first with `python -m sea_jax.sft --config=...` of the config "
                    "whose output it is"
                )
        directory = hf.locate(name)
        config = check_language_model(hf.read_config(directory))
        own_tokenizer = tokenizer.fitted(tokenizer.load(directory), config.vocab_size)
    return PolicyFiles(source, directory, config, own_tokenizer)


def load_policy(source: str, train_last_layers: int, feature_layer: int = 0, *, dtype: str) -> Policy:
    """Loads a decoder, see `load_weights`; raises as `read_files` does too.

    Args:
      source: anything that `hf.load` takes.
      train_last_layers, feature_layer, dtype: as of `load_weights`.
    """
    return load_weights(read_files(source), train_last_layers, feature_layer, dtype=dtype)


def load_weights(found: PolicyFiles, train_last_layers: int, feature_layer: int = 0, *, dtype: str) -> Policy:
    """Loads a decoder, divides its layers where training begins and where features are read, and places them on the mesh.

    Args:
      found: PolicyFiles.
      train_last_layers: n; 0 trains everything.
      feature_layer: behind so many layers; 0: behind the last norm.
      dtype: compute dtype.

    Raises:
      ValueError: more layers are named than there are, or the weights are not the configuration's.
    """
    config = found.config
    for field, value in (("policy.train_last_layers", train_last_layers), ("erm.feature_layer", feature_layer)):
        if value > config.num_layers:
            raise ValueError(f"config.{field}={value}: the model has {config.num_layers} layers")
    with naming("policy.source", found.source):
        loaded = hf.load(found.directory)
    division = divide_layers(config, train_last_layers, feature_layer)
    params = decoder.recut(loaded.params, division.cuts)
    frozen, trained = decoder.divide(params, division.num_trained_stacks)

    def placed(part: Params) -> Params:
        return partition.put(part, decoder.specs(config, part), dtype)

    return Policy(
        config=config,
        tokenizer=found.tokenizer,
        directory=loaded.directory,
        frozen=placed(frozen),
        reference=placed(trained),
        initial=trained,
        feature_stack=division.feature_stack,
        features_are_frozen=division.features_are_frozen,
        fingerprint=weights_fingerprint(loaded.params),
    )


def weights_fingerprint(params: Params) -> str:
    """Returns 16 hexadecimal digits that tell one model's weights, arrays of the host, from another's.

    They come from some thousand numbers of each parameter.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf.reshape(-1)[:: max(1, leaf.size // NUMBERS_READ)]).tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(policy: Policy, workdir: Path) -> None:
    """Refuses another model than that which a work directory's run began with; one without a fingerprint tells nothing.

    Raises:
      ValueError: the weights differ.
    """
    path = workdir / FINGERPRINT_FILE
    if path.exists() and path.read_text().strip() != policy.fingerprint:
        raise ValueError(
            f"config.policy.source: the weights in {policy.directory} are not those that the run in {workdir} began with, its "
            "reference policy (made anew, or another version?); put them back, or start anew with another --workdir"
        )


@dataclass(frozen=True)
class Division:
    """Where a decoder's layers are cut.

    Attributes:
      cuts: layer numbers, see `decoder.abstract`.
      num_trained_stacks: the last so many stacks are trained; None: everything is.
      feature_stack: features stand behind so many stacks; None: behind the last norm.
      features_are_frozen: no layer up to the features is trained.
    """

    cuts: tuple[int, ...]
    num_trained_stacks: int | None
    feature_stack: int | None
    features_are_frozen: bool


def divide_layers(config: ModelConfig, train_last_layers: int, feature_layer: int) -> Division:
    """Cuts a decoder's layers where training begins and where features are read.

    Args:
      config: ModelConfig.
      train_last_layers: n; 0 trains everything.
      feature_layer: behind so many layers; 0: behind the last norm.
    """
    first_trained = config.num_layers - train_last_layers if train_last_layers else 0
    cuts = tuple(sorted({first_trained, feature_layer} - {0, config.num_layers}))
    bounds = (*cuts, config.num_layers)
    inner_feature = 0 < feature_layer < config.num_layers
    return Division(
        cuts=cuts,
        num_trained_stacks=sum(bound > first_trained for bound in bounds) if train_last_layers else None,
        feature_stack=bounds.index(feature_layer) + 1 if inner_feature else None,
        features_are_frozen=inner_feature and feature_layer <= first_trained,
    )


def export_policy(loaded: Policy, trained: Params, directory: Path, dtype: str = "") -> None:
    """Writes a trained policy as a Hugging Face directory.

    Args:
      loaded: Policy.
      trained: the trained part of the parameters.
      directory: where to; must not exist yet, or be empty.
      dtype: of the weights there; "": that of the policy's own files.
    """
    trained = processes.fetch(trained)
    if not processes.is_first():
        return
    frozen: Params = {"stacks": ()}
    if loaded.frozen["stacks"] or len(loaded.frozen) > 1:  # from its file: here it may be in a narrower dtype
        whole = hf.load(loaded.directory).params
        sizes = [len(stack["q"]["kernel"]) for stack in (*loaded.frozen["stacks"], *trained["stacks"])]
        cuts = np.cumsum(sizes)[:-1].tolist()
        frozen, _ = decoder.divide(decoder.recut(whole, cuts), len(trained["stacks"]))
    hf.save(
        directory,
        loaded.config,
        decoder.join(frozen, trained),
        loaded.directory,
        dtype or hf.stored_dtype(loaded.directory),
    )
