"""Servers write the responses, with the weights that they are given."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sea_jax.actors.generation import GenerationConfig
from sea_jax.models import decoder, partition
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import ModelConfig
from sea_jax.runtime import processes
from sea_jax.settings import (
    AT_LEAST_1,
    DTYPE,
    GIVEN,
    NOT_NEGATIVE,
    POSITIVE,
    URLS,
    addresses,
    one_of,
    one_of_numbers,
    setting,
)
from sea_jax.types import Candidates, Generate, OtherVersion, Params, PolicyServers, Prompts, Response


@dataclass(frozen=True)
class ActorSettings:
    """Who writes the responses, and how servers are given the weights."""

    kind: str = setting(
        "in_process",
        'who writes the responses: "in_process" (JAX), or "bridge": servers (gpu_bridge)',
        one_of("in_process", "bridge"),
    )
    urls: str = setting("", "bridge: the policy servers, separated by commas; they share the prompts", URLS)
    sync_every: int = setting(
        1,
        "bridge: policy steps after which the servers are given the weights again, for training",
        AT_LEAST_1,
        unit="policy steps",
    )
    transport: str = setting(
        "shm", 'bridge: weights pass through a file in memory, or, between hosts, "http"', one_of("shm", "http")
    )
    weights_directory: str = setting(
        "/dev/shm", "bridge: where that file lies", (lambda v: v.startswith("/"), "an absolute path")
    )
    weights_host: str = setting(
        "127.0.0.1", "bridge: http: this host's address, at which the servers fetch the weights", GIVEN
    )
    weights_port: int = setting(
        0,
        "bridge: http: its port; 0: any that is free",
        (lambda v: 0 <= v < 2**16, "a port number, or 0 for any that is free"),
    )
    weights_dtype: str = setting("bfloat16", "bridge: of the weights on their way", DTYPE)
    timeout_s: float = setting(600.0, "bridge: how long a server may take to answer", POSITIVE, unit="seconds")
    retries: int = setting(
        8,
        "bridge: how often is tried again when no server answers; the waits double, up to a minute each",
        NOT_NEGATIVE,
    )
    lag: int = setting(
        0,
        "bridge: 1 has the next batch written while the learner works on this one, by a policy a step old",
        one_of_numbers(0, 1),
    )
    max_logprob_gap: float = setting(
        0.1, "bridge: gap between engine and learner above which the run stops", POSITIVE, unit="nats per token"
    )

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        if self.kind == "bridge" and not self.urls:
            yield "config.actor.urls='': actor.kind=bridge needs the URL of a server, or several separated by commas"
        if self.lag == 1 and self.kind != "bridge":
            yield f"config.actor.lag=1: only config.actor.kind=bridge writes ahead, not {self.kind}"


def connect(settings: ActorSettings, token_file: str) -> PolicyServers:
    """Returns the servers that write the responses.

    Args:
      settings: ActorSettings.
      token_file: holds their token; "": the environment does.

    Raises:
      ValueError: there is no token.
    """
    from gpu_bridge import client, weights  # the library works without

    directory = Path(settings.weights_directory)
    route = weights.Route(settings.transport, directory, settings.weights_host, settings.weights_port)
    patience = client.Patience(settings.timeout_s, settings.retries)
    return client.PolicyClient(addresses(settings.urls), client.read_token(token_file), patience, route)


PUSHES = 3  # times that servers without the right weights are given them, before a run stops


def bridge(
    servers: PolicyServers,
    frozen: Params,
    config: ModelConfig,
    sampling: GenerationConfig,
    *,
    weights_dtype: str,
) -> Generate:
    """Servers write, with weights that they are given when theirs are others.

    Each prompt has a seed of its own, drawn from the key, so that it does not matter which server answers it.

    Args:
      servers: with several processes, those that the first asks.
      frozen: the frozen part of the policy's parameters; servers that have a version of this run's have it.
      config: ModelConfig.
      sampling: the weights are rounded to its dtype, as those of the policy in this process are.
      weights_dtype: of the weights on their way.

    Returns:
      Generate; its candidates have no features: d is 0. It raises ValueError where the servers have another version
      though they were given the right one, and OSError where none is up after all the waiting.
    """

    def generate(trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int) -> Candidates:
        tokens, valid = processes.fetch(prompts.tokens), processes.fetch(prompts.valid)
        rows = [ids[counts].tolist() for ids, counts in zip(tokens, valid, strict=True)]
        seeds = np.asarray(jax.random.bits(key, (len(rows),), "uint32")).tolist()
        reason = ""

        def write(name: str) -> Sequence[Sequence[Response]] | None:
            nonlocal reason
            try:
                return servers.generate(
                    rows,
                    seeds,
                    name,
                    num_samples=sampling.num_samples,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_ids=sampling.eos_ids,
                    absent_ids=sampling.absent_ids,
                    vocab_size=config.vocab_size,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                )
            except OtherVersion as error:
                reason = str(error)
                return None

        with servers.turn:
            for _ in range(PUSHES):
                name, fault = _push(servers, frozen, trained, config, version, sampling.dtype, weights_dtype)
                reason = fault or reason
                responses = processes.by_first(functools.partial(write, name), None, "the policy servers")
                if processes.of_first(responses is not None):
                    return _candidates(responses, len(rows), sampling)
        raise ValueError(
            f"the policy servers were given version {name} {PUSHES} times and do not write with it: {reason}. Does another "
            "run use the same servers? Give each run its own in config.actor.urls"
        )

    return generate


def _push(
    servers: PolicyServers,
    frozen: Params,
    trained: Params,
    config: ModelConfig,
    version: int,
    dtype: str,
    weights_dtype: str,
) -> tuple[str, str]:
    """Lets all servers that are up have a version: its name, and why a push failed."""
    nobody: Mapping[str, str] = {}
    found = processes.by_first(servers.versions, nobody, "the policy servers")
    name, fault = f"{servers.run}.{version}", ""
    bases: dict[str | None, list[str]] = {}
    for url, served in found.items():
        if served != name:
            ours = served.startswith(f"{servers.run}.") and len(jax.tree.leaves(frozen)) > 0
            bases.setdefault(served if ours else None, []).append(url)

    def tensors(params: Params, last_part: bool) -> dict[str, np.ndarray]:
        # Rounded as the actor in this process rounds them: the initial policy, kept in this dtype, has the same weights.
        rounded = partition.cast(processes.fetch(params), dtype)
        return hf.to_tensors(config, rounded, weights_dtype, last_part=last_part) if processes.is_first() else {}

    def push(pushed: Mapping[str, np.ndarray], some: Mapping[str | None, Sequence[str]]) -> str:
        faults = []
        for base, urls in some.items():
            try:
                servers.push(pushed, name, urls, base)
            except OtherVersion as error:
                faults.append(str(error))
        return "; ".join(faults)

    for everything in (True, False):
        some = {base: urls for base, urls in bases.items() if (base is None) is everything}
        if processes.of_first(bool(some)):  # to fetch takes all processes
            pushed = tensors(decoder.join(frozen, trained) if everything else trained, not everything)
            fault += processes.by_first(functools.partial(push, pushed, some), "", "the policy servers")
    return name, fault


def _candidates(
    responses: Sequence[Sequence[Response]] | None, num_prompts: int, sampling: GenerationConfig
) -> Candidates:
    """Responses as arrays, in every process; the first one's are given."""
    shape = (num_prompts, sampling.num_samples, sampling.max_new_tokens)
    tokens, logprobs = np.full(shape, sampling.pad_id, np.int32), np.zeros(shape, np.float32)
    lengths = np.zeros(shape[:2], np.int32)
    for row, of_prompt in enumerate(responses or ()):
        for column, response in enumerate(of_prompt):
            length = lengths[row, column] = len(response.tokens)
            tokens[row, column, :length], logprobs[row, column, :length] = response.tokens, response.logprobs
    tokens, lengths, logprobs = processes.tree_of_first((tokens, lengths, logprobs))
    return Candidates(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        logprobs=jnp.asarray(logprobs),
        features=jnp.zeros((*shape[:2], 0), jnp.float32),
    )
