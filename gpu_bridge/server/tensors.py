"""What is in a safetensors file, from its header, and whether those tensors can replace a model's."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 2**27
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}

# Tables that some files hold beside the parameters.
TABLES = re.compile(r".*rotary_emb\.inv_freq|.*\.attention\.(bias|masked_bias)")
UNEMBEDDING = "lm_head.weight"
# vLLM keeps these matrices in one: it must be given all of them or none.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Tensor:
    """One entry of a header.

    Attributes:
      dtype: as safetensors calls it.
      shape: in elements.
    """

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Tensor]:
    """Reads which tensors a safetensors file has (https://huggingface.co/docs/safetensors/index#format).

    Raises:
      ValueError: it is no whole safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header would be {length} bytes long")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{path} has {size} bytes, and its header speaks of {8 + length + max(ends, default=0)}")
    return tensors


def read_model(directory: Path) -> dict[str, Tensor]:
    """Reads which tensors a Hugging Face model has, without tables and without an unembedding that is the embedding.

    Raises:
      ValueError: the directory has no safetensors files.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"expected *.safetensors files in {directory}, found none")
    tied = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", False)
    found = {name: tensor for file in files for name, tensor in read_header(file).items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if not TABLES.fullmatch(name) and not (tied and name == UNEMBEDDING)
    }


def max_file_bytes(model: Mapping[str, Tensor]) -> int:
    """Returns how long a file with a model's tensors in float32 can be, its header included."""
    return sum(4 * math.prod(tensor.shape) + len(name) + 256 for name, tensor in model.items()) + 4096


def check(given: Mapping[str, Tensor], model: Mapping[str, Tensor], whole: bool) -> None:
    """Refuses tensors that cannot replace a model's.

    Args:
      given: the file's.
      model: those of the model that is served.
      whole: whether all of the model's must be there.

    Raises:
      ValueError: a tensor is unknown or missing, or has another shape or an unexpected dtype.
    """
    for name, tensor in given.items():
        if name not in model:
            raise ValueError(f"{name} is no tensor of the model")
        if tensor.shape != model[name].shape:
            raise ValueError(f"{name}: expected the shape {model[name].shape}, found {tensor.shape}")
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"{name}: expected one of the dtypes {', '.join(ITEM_BYTES)}, found {tensor.dtype}")
    if not given:
        raise ValueError("the file has no tensors")
    needed = set(model) if whole else {other for name in given for other in _of_same_module(name, model)}
    missing = sorted(needed - set(given))
    if missing:
        why = "no base is given, so all are needed" if whole else "tensors of one module go together"
        raise ValueError(f"the file lacks {len(missing)} tensors, {missing[0]} among them; {why}")


def _of_same_module(name: str, model: Mapping[str, Tensor]) -> list[str]:
    """The tensors that the engine keeps in the same module as one."""
    module = name.rpartition(".")[0]
    above, _, last = module.rpartition(".")
    modules = {f"{above}.{sibling}" for group in FUSED if last in group for sibling in group} or {module}
    return [other for other in model if other.rpartition(".")[0] in modules]
