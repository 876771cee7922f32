"""What several test files need."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# For this process and for those that tests start: every program is compiled once, whoever needs it.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Devices of one host that wait for each other wait as long as a busy machine takes.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of torch that wait give their core away

import gguf
import hypothesis
import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers
from xdist.scheduler import LoadFileScheduling

from tests.support import shapes  # before anything of sea_jax, so that its annotations are checked

shapes.admit_host_arrays()

from sea_jax.models import tokenizer  # noqa: E402
from sea_jax.models.checkpoints import builtin  # noqa: E402
from sea_jax.runtime import cache  # noqa: E402

cache.keep_compiled_programs()
# As many as the meshes of tests/models/test_mesh.py need; what sets no mesh uses the first alone.
jax.config.update("jax_num_cpu_devices", 8)

# The first example of a property compiles and would miss any deadline.
hypothesis.settings.register_profile("compiled", deadline=None, max_examples=50)
hypothesis.settings.load_profile("compiled")

# Files whose tests use the same real engines, which one process starts for all of them.
ENGINES = ("tests/gpu_bridge/server/test_engine.py", "tests/gpu_bridge/test_run.py")
# The first to be run, as they take longest.
LONGEST = ("engines", "tests/test_kill.py", "tests/models/test_mesh.py", "tests/test_tldr.py", "tests/test_memory.py")


def _file(nodeid: str) -> str:
    return nodeid.split("::")[0]


def _group(nodeid: str) -> str:
    """What is run by one process: a file, or the files of ENGINES."""
    return "engines" if _file(nodeid) in ENGINES else _file(nodeid)


class GroupScheduling(LoadFileScheduling):
    """Gives whole groups to processes."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """Whatever --dist says."""
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest groups, so that no process is left alone with one at the end."""
    ranks = {group: rank for rank, group in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(_group(item.nodeid), len(ranks)))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets the programs of a file behind its last test: together they would take gigabytes."""
    if nextitem is not None and _file(item.nodeid) != _file(nextitem.nodeid):
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # else glibc keeps what was freed
            ctypes.CDLL(None).malloc_trim(0)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _write_gguf(path: Path, pre: str = "smollm") -> None:
    """Writes a GGUF file of a Llama with one tensor, and a tokenizer of 3 control tokens, 256 bytes and 3 merges."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = ["h i", "Ġ hi", "1 2"]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(128)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    writer.add_feed_forward_length(16)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """Writes a tiny GGUF file to a path."""
    return _write_gguf


@pytest.fixture(scope="session")
def gguf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny GGUF file and the config.json and tokenizer files written from it."""
    directory = tmp_path_factory.mktemp("gguf")
    _write_gguf(directory / "tiny.gguf")
    builtin.describe_gguf(directory / "tiny.gguf")
    return directory


@pytest.fixture(scope="session")
def byte_tokenizer(gguf_directory: Path) -> tokenizer.Tokenizer:
    """A tokenizer of 3 control tokens (2: end and padding), the bytes, "hi", " hi" and "12"; with a chat template."""
    return tokenizer.load(gguf_directory)
