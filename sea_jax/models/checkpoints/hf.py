"""Models in the format of Hugging Face: a config.json with safetensors or GGUF weights, to and from pytrees."""

import functools
import hashlib
import json
import math
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sea_jax.models import deberta, decoder, encoder
from sea_jax.models.checkpoints import config_json as configs
from sea_jax.models.checkpoints import gguf, layouts, safetensors
from sea_jax.models.checkpoints.safetensors import Stored
from sea_jax.models.config import Config, DebertaConfig, EncoderConfig, ModelConfig
from sea_jax.types import Params

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spm.model",
    "*.jinja",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # felt in long sequences alone

Place = tuple[int | None, str]
"""Where a parameter stands: its layer, or None outside the layers, and its path there."""


@dataclass(frozen=True)
class Loaded:
    """A model as loaded.

    Attributes:
      config: its configuration.
      params: float32 numpy arrays, see `abstract`.
      directory: where its files lie, those of its tokenizer too.
    """

    config: Config
    params: Params
    directory: Path


def abstract(config: Config, cuts: Sequence[int] = ()) -> Params:
    """The parameter tree of any model with a ParamSpec for every leaf, as the `abstract` of its kind's module has it.

    Args:
      config: the model's.
      cuts: where a decoder's layers are divided into stacks, see `decoder.abstract`.
    """
    match config:
        case ModelConfig():
            return decoder.abstract(config, cuts)
        case EncoderConfig():
            return encoder.abstract(config)
        case DebertaConfig():
            return deberta.abstract(config)


def load(source: str | Path, *, cuts: Sequence[int] = ()) -> Loaded:
    """Loads a model in float32, strictly: every tensor must have a place, and every parameter a tensor of its shape.

    Args:
      source: a directory with config.json and *.safetensors (shards with their index too) or one *.gguf; or the name
        of a repository on the Hugging Face hub, or NAME@REVISION; or builtin:NAME, see `builtin.directory`.
      cuts: where a decoder's layers are divided into stacks, see `decoder.abstract`.

    Raises:
      FileNotFoundError: a directory, config.json, weights or a shard that is not there, or a hub that does not have
        the repository or cannot be asked.
      ValueError: weights in pickle form only, a truncated or corrupt file, an unsupported configuration, a tensor
        without a place, a parameter without a tensor, a tensor of another shape; the message names it.
    """
    directory = locate(source)
    config = read_config(directory)
    if cuts and not isinstance(config, ModelConfig):
        raise ValueError(f"cuts {tuple(cuts)} divide the layers of a decoder, but {directory} holds an encoder")
    params = jax.tree.map(lambda spec: np.empty(spec.shape, np.float32), abstract(config, cuts))
    _fill(params, config, _tensors(directory, config), directory)
    return Loaded(config, params, directory)


def read_config(source: str | Path, *, weights: bool = True) -> Config:
    """Reads the configuration of a model, without its weights, from a source as for `load`.

    Args:
      source: as for `load`.
      weights: they will be read here; False: what they are is somebody else's business.

    Raises:
      FileNotFoundError: a directory or config.json that is not there, or a hub that cannot give it.
      ValueError: an unsupported configuration; the message names the field. Or weights that cannot be read: an adapter's,
        or quantised ones.
    """
    directory = locate(source, weights=weights)
    _check_whole(directory, weights)
    fields = _json(directory / "config.json")
    if weights and (quantised := fields.get("quantization_config")):
        method = quantised.get("quant_method", quantised) if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{directory / 'config.json'} field 'quantization_config' says {method}: quantised weights are not read, and "
            "cannot be trained; name the checkpoint that they were made from, or what dequantize() and save_pretrained() of "
            "transformers make of it"
        )
    return configs.from_hf(fields)


def _check_whole(directory: Path, weights: bool) -> None:
    """Refuses an adapter, which is some matrices beside those of another model."""
    path = directory / "adapter_config.json"
    whole = any((*directory.glob("model*.safetensors"), *directory.glob("*.gguf"))) if weights else True
    if path.is_file() and not (whole and (directory / "config.json").is_file()):
        fields = _json(path)
        base = fields.get("base_model_name_or_path") or "another model"
        raise ValueError(
            f"{directory} holds an adapter ({fields.get('peft_type', 'adapter_config.json')}) of {base}, not a whole model: "
            "name what merge_and_unload() of peft and then save_pretrained() make of both"
        )


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """Returns the directory that a source stands for, fetching from the hub what is not here yet.

    Args:
      source: as for `load`.
      weights: fetch these too; without them there are config.json and the tokenizer's files.

    Raises:
      FileNotFoundError: there is no such directory, and the hub does not give it.
    """
    name = str(source)
    if name.startswith("builtin:"):
        from sea_jax.models.checkpoints import builtin

        return builtin.directory(name.removeprefix("builtin:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    # Names on the hub have the form name or owner/name.
    if isinstance(source, Path) or path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{path} is not a directory; pass one that holds config.json and the weights")
    try:
        return _fetched(name, weights)
    except Exception as error:  # The hub's client lets errors of its HTTP library through.
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise FileNotFoundError(
            f"{name!r} is no directory here, and the Hugging Face hub did not give it ({reason}); "
            "pass a directory that holds config.json and the weights"
        ) from error


@functools.cache  # so that a run sees one version of a model, however often its parts ask for it
def _fetched(name: str, weights: bool) -> Path:
    """Returns the directory of a model from the hub, as it is when it is first asked for, or at name@revision."""
    repository, _, revision = name.partition("@")

    def fetch(*patterns: str, revision: str | None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )

    directory = fetch("*.json", *_TOKENIZER_FILES, revision=revision or None)
    if not weights:
        return directory
    # Of the same commit, which names the directory; some repositories hold the weights a second time in another form.
    commit = directory.name if directory.parent.name == "snapshots" else revision or None
    named = safetensors.named(directory)
    directory = fetch(*(named or ("model.safetensors",)), revision=commit)
    return directory if named or (directory / "model.safetensors").exists() else fetch("*.safetensors", revision=commit)


BLOCKS, BLOCK_BYTES = 64, 4096  # of each file, for a fingerprint


def fingerprint(source: str | Path, *, weights: bool = True) -> str:
    """Returns 16 hexadecimal digits that tell the files of one model from another's, wherever they lie.

    They come from evenly spaced blocks of each file.

    Args:
      source, weights: as for `locate`.
    """
    digest = hashlib.sha256()
    kinds = ("config.json", *_TOKENIZER_FILES, *(("*.safetensors", "*.gguf") if weights else ()))
    directory = locate(source, weights=weights)
    for path in sorted({path for kind in kinds for path in directory.glob(kind)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(BLOCKS):
                file.seek(max(0, (size - BLOCK_BYTES) * number // (BLOCKS - 1)))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def save(
    directory: str | Path,
    config: Config,
    params: Params,
    tokenizer_files_from: str | Path | None = None,
    dtype: str = "float32",
) -> None:
    """Writes config.json and safetensors as transformers reads them, all or nothing.

    Args:
      directory: where to; must not exist yet, or be empty.
      config: the model's.
      params: the model's, their layers divided in any way.
      tokenizer_files_from: a model's directory whose tokenizer files, generation_config.json and ids of the
        beginning, end and padding tokens are taken over, or None.
      dtype: of the weights in the files.

    Raises:
      FileExistsError: the directory holds something already.
      ValueError: a parameter that the configuration does not have, or lacks, or has in another shape.
      OSError: a file cannot be written or copied; once the weights are on disk, they stay, and it says where.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; pass a directory that does not exist yet")
    tensors = to_tensors(config, params, dtype)
    fields = configs.to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    # Without these fields transformers would assume its own defaults, which are some other tokenizer's ids.
    fields |= dict.fromkeys(_TOKEN_IDS)
    temporary = directory.parent / f".{directory.name}-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    weights_are_there = False
    try:
        safetensors.write(temporary, tensors)
        weights_are_there = True
        if tokenizer_files_from is not None:
            origin = Path(tokenizer_files_from)
            if (origin / "config.json").is_file():
                known = _json(origin / "config.json")
                fields |= {name: known.get(name) for name in _TOKEN_IDS}
                fields |= {name: known[name] for name in _WINDOW if name in known}
            for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
                for path in origin.glob(pattern):
                    if path.is_file():
                        shutil.copyfile(path, temporary / path.name)
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        temporary.replace(directory)
    except BaseException as error:
        if weights_are_there and isinstance(error, OSError):
            raise OSError(f"{error}; {directory} is not complete, but its weights are, in {temporary}") from error
        shutil.rmtree(temporary, ignore_errors=True)
        raise


EXPORTED = ("float32", "bfloat16", "float16")
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtype(source: str | Path) -> str:
    """Returns the dtype of most of a model's numbers as they are stored; float32 where they are quantised or wider.

    Raises:
      FileNotFoundError, ValueError: as of `load`.
    """
    directory = locate(source)
    numbers: Counter[str] = Counter()
    for tensor in _tensors(directory, read_config(directory)).values():
        numbers[_DTYPES.get(tensor.dtype, "float32")] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else "float32"


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model's directory holds config.json and the weights")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value


def _tensors(directory: Path, config: Config) -> dict[str, Stored]:
    """The tensors of a directory by the names of Hugging Face checkpoints."""
    if found := safetensors.safetensors(directory):
        return found
    quantised = sorted(directory.glob("*.gguf"))
    if len(quantised) > 1:
        raise ValueError(f"{directory} holds {', '.join(path.name for path in quantised)}; keep one GGUF file")
    if quantised and (not isinstance(config, ModelConfig) or config.family != "llama"):
        raise ValueError(f"{quantised[0]} is GGUF, which is supported for llama, but config.json says {config.family}")
    if quantised and isinstance(config, ModelConfig):
        return gguf.tensors(quantised[0], config)
    if pickled := sorted((*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth"))):
        raise ValueError(
            f"{pickled[0]} is a pickle, which can run any code when it is read; convert it to safetensors "
            "(save_pretrained of transformers does)"
        )
    raise FileNotFoundError(f"{directory} holds no *.safetensors and no *.gguf; pass a directory with the weights")


def _num_layers(params: Params) -> int:
    """The number of layers that parameters have."""
    return sum(len(jax.tree.leaves(stack)[0]) for stack in params["stacks"])


def _places(params: Params, first: int = 0) -> dict[Place, np.ndarray]:
    """Every parameter of every layer, numbered from the first, as a view of the leaf it is a part of."""
    outer = {name: value for name, value in params.items() if name != "stacks"}
    places: dict[Place, np.ndarray] = {(None, path): leaf for path, leaf in flatten_dict(outer, sep="/").items()}
    if "score" in params:
        # In a checkpoint it is a matrix with one row, that of the one label.
        places[None, "score"] = params["score"][None]
    for stack in params["stacks"]:
        leaves = flatten_dict(stack, sep="/")
        count = len(next(iter(leaves.values())))
        places |= {(first + i, path): leaf[i] for path, leaf in leaves.items() for i in range(count)}
        first += count
    return places


def _named(config: Config, places: Mapping[Place, Any]) -> dict[str, tuple[Place, ...]]:
    """The tensors that hold the parameters, each with the places of what it holds."""
    gating = config.gating if isinstance(config, ModelConfig) else None
    whole = layouts.layout(config.family, config.num_layers, gating.num_hidden + 1 if gating else 0)
    return {name: holds for name, holds in whole.items() if all(place in places for place in holds)}


def _stored_shape(holds: Sequence[Place], places: Mapping[Place, np.ndarray]) -> tuple[int, ...]:
    """The shape of a tensor in a checkpoint, where matrices stand as [out, in]."""
    shape = places[holds[0]].shape
    shape = shape[::-1] if holds[0][1].endswith("kernel") else shape
    return (len(holds) * shape[0], *shape[1:])


def _fill(params: Params, config: Config, tensors: Mapping[str, Stored], directory: Path) -> None:
    """Reads every tensor into its place, having checked that tensors and parameters match one to one."""
    places = _places(params)
    expected = _named(config, places)
    given = _canonical(config.family, tensors)
    model = f"a {config.family} of {config.num_layers} layers as config.json describes it"
    for name in sorted(set(given) - set(expected)):
        if layouts.FAMILIES[config.family].ignored.fullmatch(name):
            continue
        tied = isinstance(config, ModelConfig) and config.tie_embeddings
        if tied and layouts.FAMILIES[config.family].outer.get(name) == ("unembed",):
            _check_tied(name, given, expected)
            continue
        raise ValueError(f"tensor {name!r} in {given[name].path} has no place in {model}; is the config.json its own?")
    if missing := sorted(set(expected) - set(given)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"tensor {missing[0]!r}{more} of {model} not found in {directory}; are all files there?")
    for name, holds in expected.items():
        shape = _stored_shape(holds, places)
        if given[name].shape != shape:
            raise ValueError(f"tensor {name!r} in {given[name].path} has shape {given[name].shape}, expected {shape}")
    for name, holds in expected.items():
        rows = given[name].read()
        if len(holds) > 1:
            rows = rows.reshape(config.num_heads, len(holds), -1, *rows.shape[1:])
        for i, place in enumerate(holds):
            part = rows[:, i].reshape(-1, *rows.shape[3:]) if len(holds) > 1 else rows
            places[place][...] = part.T if place[1].endswith("kernel") else part


def _canonical(family: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors by their canonical names; one under two spellings must be the same in both, if it is read at all."""
    spelt: dict[str, str] = {}
    for name, tensor in sorted(tensors.items()):
        canonical = layouts.canonical(family, name)
        other = spelt.setdefault(canonical, name)
        if other == name or layouts.FAMILIES[family].ignored.fullmatch(canonical):
            continue
        if not np.array_equal(tensor.read(), tensors[other].read()):
            raise ValueError(
                f"tensors {other!r} in {tensors[other].path} and {name!r} in {tensor.path} are two spellings of one "
                f"tensor of a {family} but differ; remove the one that is not the model's"
            )
    return {canonical: tensors[name] for canonical, name in spelt.items()}


def _check_tied(name: str, given: Mapping[str, Stored], expected: Mapping[str, tuple[Place, ...]]) -> None:
    """An unembedding beside tied embeddings may stand in the file only as a copy of them."""
    table = next(tensor for tensor, holds in expected.items() if holds == ((None, "embed"),))
    if table in given and not np.array_equal(given[name].read(), given[table].read()):
        raise ValueError(
            f"tensor {name!r} in {given[name].path} differs from {table!r} though config.json field "
            "'tie_word_embeddings' says they are one; set it to false"
        )


def to_tensors(
    config: Config, params: Params, dtype: Any = np.float32, *, last_part: bool = False
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their Hugging Face names; those that hold what the parameters lack are left out.

    Args:
      config: the model's.
      params: arrays of the host, their layers divided in any way.
      dtype: of the tensors.
      last_part: the parameters may lack others: their layers are the model's last.

    Raises:
      ValueError: a parameter that the configuration does not have, or lacks, or has in another shape.
    """
    specs = _places(jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape), abstract(config)))
    first = config.num_layers - _num_layers(params) if last_part else 0
    places = _places(jax.tree.map(np.asarray, params), first)
    for place in sorted(set(places) - set(specs) if last_part else set(specs) ^ set(places), key=str):
        found, wanted = ("it is", "not in") if place in places else ("it is not", "in")
        raise ValueError(f"parameter {place[1]!r} of layer {place[0]}: {found} given, but {wanted} the configuration")
    for place, part in places.items():
        if part.shape != specs[place].shape:
            raise ValueError(
                f"parameter {place[1]!r} of layer {place[0]} has shape {part.shape}, expected {specs[place].shape}"
            )

    def rows(place: Place) -> np.ndarray:
        part = places[place].astype(dtype)
        # save_file writes the memory as it lies, so a transposed view must become an array of its own.
        return np.ascontiguousarray(part.T if place[1].endswith("kernel") else part)

    def tensor(holds: Sequence[Place]) -> np.ndarray:
        parts = [rows(place) for place in holds]
        if len(parts) == 1:
            return parts[0]
        return np.stack([part.reshape(config.num_heads, -1, *part.shape[1:]) for part in parts], axis=1).reshape(
            -1, *parts[0].shape[1:]
        )

    tensors = {name: tensor(holds) for name, holds in _named(config, places).items()}
    if isinstance(config, DebertaConfig) and config.scalar_head:  # with a head on top, an encoder's names say so
        return {
            name if name.startswith(("pooler.", "classifier.")) else f"deberta.{name}": x for name, x in tensors.items()
        }
    return tensors
