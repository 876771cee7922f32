"""Servers that write for the policy: what they are given and when, and what becomes of their answers."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.actors.bridge import bridge
from sea_jax.actors.in_process import in_process
from sea_jax.models import decoder
from sea_jax.models.checkpoints import hf
from sea_jax.types import OtherVersion
from tests.support import tiny

HOW = tiny.generation_config(
    num_samples=2, max_new_tokens=4, eos_ids=(3,), pad_id=9, temperature=0.7, top_k=5, top_p=0.9, absent_ids=(31, 36)
)
FROZEN, TRAINED = decoder.divide(tiny.params(cuts=(2,)), 1)


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]


@dataclass
class Fake:
    """Servers in memory; `lost` names those that forget their weights before they write."""

    served: dict[str, str] = field(default_factory=lambda: {"a": "initial", "b": "initial"})
    run: str = "run"
    turn: Any = field(default_factory=contextlib.nullcontext)
    pushes: list[tuple[str, list[str], str | None, int]] = field(default_factory=list)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    lost: list[list[str]] = field(default_factory=list)

    def versions(self) -> Mapping[str, str]:
        return dict(self.served)

    def push(
        self, tensors: Mapping[str, np.ndarray], version: str, urls: Sequence[str], base: str | None = None
    ) -> None:
        self.pushes.append((version, list(urls), base, len(tensors)))
        self.tensors = tensors
        for url in urls:
            if base not in (None, self.served[url]):
                raise OtherVersion(f"{url} has version {self.served[url]}")
            self.served[url] = version

    def generate(self, prompts: Any, seeds: Any, version: str, **how: Any) -> list[list[Answer]]:
        for url in self.lost.pop(0) if self.lost else []:
            self.served[url] = "initial"
        if version not in self.served.values():
            raise OtherVersion(f"they have {self.served}, asked for is {version}")
        self.asked.append((prompts, list(seeds), version, how))
        return [[Answer([len(ids), 3], [-0.5, -1.0]), Answer([7, 8, 5, 6], [-2.0] * 4)] for ids in prompts]


EVERYTHING = len(hf.to_tensors(tiny.CONFIG, decoder.join(FROZEN, TRAINED)))
CHANGED = len(hf.to_tensors(tiny.CONFIG, TRAINED, last_part=True))


def write(servers: Fake, *versions: int, **options: Any) -> Any:
    generate = bridge(servers, FROZEN, tiny.CONFIG, HOW, **{"weights_dtype": "bfloat16"} | options)
    for version in versions:
        candidates = generate(TRAINED, tiny.prompts(3, 8), jax.random.key(1), version)
    return candidates


def test_candidates_are_padded_as_those_of_this_process_are():
    servers = Fake()
    candidates = write(servers, 0)
    own = in_process(FROZEN, tiny.CONFIG, HOW)(TRAINED, tiny.prompts(3, 8), jax.random.key(1), 0)
    np.testing.assert_array_equal(candidates.tokens, [[[3, 3, 9, 9], [7, 8, 5, 6]], [[8, 3, 9, 9], [7, 8, 5, 6]]])
    np.testing.assert_array_equal(candidates.lengths, [[2, 4], [2, 4]])
    np.testing.assert_array_equal(candidates.logprobs[:, 0], [[-0.5, -1, 0, 0]] * 2)
    assert candidates.features.shape == (2, 2, 0)
    for name in ("tokens", "lengths", "logprobs", "features"):
        found, wanted = getattr(candidates, name), getattr(own, name)
        assert isinstance(found, jax.Array)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape or name == "features"


def test_what_is_asked_for_depends_on_the_prompts_and_the_key_alone():
    servers = Fake()
    generate = bridge(servers, FROZEN, tiny.CONFIG, HOW, weights_dtype="bfloat16")
    batch = tiny.prompts(3, 8)
    for key, version in ((1, 0), (1, 5), (2, 5)):
        generate(TRAINED, batch, jax.random.key(key), version)
    (prompts, seeds, _, how), (_, same, _, _), (_, other, _, _) = servers.asked
    assert prompts == [tiny.prompt_ids(batch, 0), tiny.prompt_ids(batch, 1)]
    assert seeds == same
    assert len({*seeds, *other}) == 4
    assert all(type(seed) is int and seed >= 0 for seed in seeds)
    assert how == {
        "num_samples": 2,
        "max_new_tokens": 4,
        "eos_ids": (3,),
        "absent_ids": (31, 36),
        "vocab_size": 37,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
    }


def test_weights_are_pushed_when_they_have_changed_and_only_what_has_changed():
    servers = Fake()
    write(servers, 0, 0, 1, 4)
    assert servers.pushes == [
        ("run.0", ["a", "b"], None, EVERYTHING),
        ("run.1", ["a", "b"], "run.0", CHANGED),
        ("run.4", ["a", "b"], "run.1", CHANGED),
    ]
    assert [version for _, _, version, _ in servers.asked] == ["run.0", "run.0", "run.1", "run.4"]


def test_where_everything_is_trained_everything_is_pushed():
    servers = Fake()
    generate = bridge(servers, *decoder.divide(tiny.params(), None)[:1], tiny.CONFIG, HOW, weights_dtype="bfloat16")
    for version in (0, 1):
        generate(tiny.params(), tiny.prompts(3), jax.random.key(0), version)
    assert [push[2:] for push in servers.pushes] == [(None, EVERYTHING)] * 2


def test_weights_of_another_run_are_not_ours():
    servers = Fake(served={"a": "other.3"})
    write(servers, 3)
    assert servers.pushes == [("run.3", ["a"], None, EVERYTHING)]


def test_weights_are_rounded_as_this_process_rounds_them():
    servers = Fake()
    fine = jax.tree.map(lambda x: x * jnp.float32(1 + 2**-9), TRAINED)
    generate = bridge(servers, FROZEN, tiny.CONFIG, replace(HOW, dtype="bfloat16"), weights_dtype="float32")
    generate(fine, tiny.prompts(3), jax.random.key(0), 0)
    assert {tensor.dtype for tensor in servers.tensors.values()} == {np.dtype("float32")}
    name = "model.layers.2.mlp.up_proj.weight"
    wanted = fine["stacks"][0]["up"]["kernel"][0].T.astype("bfloat16").astype("float32")
    np.testing.assert_array_equal(servers.tensors[name], wanted)
    assert (servers.tensors[name] != fine["stacks"][0]["up"]["kernel"][0].T).any()


def test_a_server_that_has_restarted_is_given_everything_again():
    servers = Fake()
    write(servers, 0)
    servers.served["b"] = "initial"
    write(servers, 0)
    assert servers.pushes[1:] == [("run.0", ["b"], None, EVERYTHING)]
    servers.lost = [["a", "b"]]
    write(servers, 0)
    assert servers.pushes[2:] == [("run.0", ["a", "b"], None, EVERYTHING)]


def test_servers_that_never_keep_the_weights_stop_the_run():
    servers = Fake(lost=[["a", "b"]] * 9)
    with pytest.raises(ValueError, match=r"given version run\.2 3 times and do not write with it: they have .*initial"):
        write(servers, 2)
    assert len(servers.pushes) == 3
