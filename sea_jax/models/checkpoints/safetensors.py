"""Tensors that lie in safetensors files, known by shape and read one at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `read` returns floats, or raises a ValueError that names a dtype that is not supported."""

    path: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


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
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: _read(file, path, name)

    return {name: Stored(path, shape, reader(name)) for name, shape in shapes.items()}


def _read(file: Any, path: Path, name: str) -> np.ndarray:
    """One tensor, which must hold plain floats: integers and 8-bit floats need scales that stand elsewhere."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"tensor {name!r} in {path} has dtype {dtype}; supported are F64, F32, F16 and BF16")
    return file.get_tensor(name)
