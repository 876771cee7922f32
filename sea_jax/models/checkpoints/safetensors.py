"""Tensors that lie in safetensors files, known by shape and read one at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      path: the file.
      shape: in elements.
      read: returns floats, or raises a ValueError that names a dtype that is not supported.
      dtype: as safetensors calls it; where numbers are stored in another way, of what is read.
    """

    path: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "F32"


def safetensors(directory: Path) -> dict[str, Stored]:
    """Lists the tensors of a directory: of model.safetensors, of the files its index names, or of all *.safetensors.

    The single file comes before the index, as for transformers; where both are there, a warning names them.

    Args:
      directory: holds one or more *.safetensors and, where they are shards, model.safetensors.index.json; or neither.

    Raises:
      FileNotFoundError: the index names a file that is not there.
      ValueError: a file that is truncated or corrupt, or a tensor that stands twice or not where the index says.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    placed: Mapping[str, str] = {}
    if single.is_file():
        paths = [single]
        if index.is_file():
            logging.warning("%s is read; %s beside it and its shards are ignored: delete what is stale", single, index)
    elif index.is_file() and (placed := _weight_map(index)):
        paths = [directory / name for name in sorted(set(placed.values()))]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    found: dict[str, Stored] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing though {index.name} names it; fetch all the shards")
        for name, tensor in _tensors(path).items():
            if name in found:
                raise ValueError(f"tensor {name!r} is in both {found[name].path} and {path}; keep one of them")
            found[name] = tensor
    for name, file in placed.items():
        if name not in found:
            raise ValueError(f"tensor {name!r} is not in {directory / file} but {index.name} says so; fetch it again")
    return found


def named(directory: Path) -> tuple[str, ...]:
    """Returns the files that a directory's index names; none where there is no index."""
    index = directory / "model.safetensors.index.json"
    return tuple(sorted(set(_weight_map(index).values()))) if index.is_file() else ()


SHARD_BYTES = 5 * 10**9  # as many a hub's limit wants it


def write(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors, or shards of at most SHARD_BYTES, tensors that are larger aside, with their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for name, shard in zip(names if count > 1 else ["model.safetensors"], shards, strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(directory.stat().st_mode & 0o666)  # save_file lets nobody else read it
    if count > 1:
        placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error!r}); fetch it again") from error


def _tensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file."""
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: _read(file, path, name)

    return {name: Stored(path, shape, reader(name), dtype) for name, (shape, dtype) in described.items()}


def _read(file: Any, path: Path, name: str) -> np.ndarray:
    """One tensor, which must hold plain floats: integers and 8-bit floats need scales that stand elsewhere."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"tensor {name!r} in {path} has dtype {dtype}; supported are F64, F32, F16 and BF16")
    return file.get_tensor(name)
