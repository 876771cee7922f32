"""One pair of real servers for the whole test run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sea_jax.models.checkpoints import tiny_random
from tests.support.engines import HEADS_OF_32, POLICIES, Server, running


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories by name."""
    root = tmp_path_factory.mktemp("models")
    for name in (*POLICIES, "tiny-random-llama-reward"):
        tiny_random.write(root / name, name, changes=HEADS_OF_32)
    return {name: root / name for name in (*POLICIES, "tiny-random-llama-reward")}


@pytest.fixture(scope="session", params=POLICIES)
def policy(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Iterator[tuple[Server, Path]]:
    """A policy server and its model's directory."""
    with running("policy", directories[request.param]) as server:
        yield server, directories[request.param]


@pytest.fixture(scope="session", params=["vllm", "mosec"])
def oracle(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Iterator[tuple[Server, Path]]:
    """An oracle server and its model's directory."""
    model = directories["tiny-random-llama-reward"]
    with running("oracle", model, f"--backend={request.param}") as server:
        yield server, model
