"""The engine behind gpu_bridge beside the sampler in this process: `python -m benchmarks.bridge --policy=DIR`.

Needs `make bridge`. Starts one policy server and one oracle server on this machine (the oracle is the policy's trunk with a
random score: for its speed alone), asserts that both sides write the same and score the same, then alternates rounds:
tokens per second of in-process sampler and engine on the same prompts, seconds and bytes per second of a push of all weights
and of the last layers through memory and over HTTP, pairs per second of oracle and reward model in this process. With --steps=N
it also trains N steps of the quickstart through the bridge with lag 0 and 1 and says what a step takes.
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from absl import flags

from configs import quickstart
from gpu_bridge import client, launch, protocol, weights
from sea_jax import train
from sea_jax.actors.bridge import bridge
from sea_jax.actors.generation import GenerationConfig
from sea_jax.actors.in_process import in_process
from sea_jax.models import decoder
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import ModelConfig
from sea_jax.oracles.reward_model import remote_reward, reward_model_scores
from sea_jax.policy import load_policy
from sea_jax.types import Candidates, Generate, Prompts, Reward

TOLERANCE = 1e-3  # nats and scores; engine and learner compute in float32


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="directory in Hugging Face format, safetensors")
    parser.add_argument("--bridge_python", type=Path, default=Path(".venv-bridge/bin/python"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=24)
    parser.add_argument("--train_last_layers", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of engine and sampler")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="oracle steps of the quickstart with each lag; 0: none")
    return parser.parse_args(arguments)


def write_reward_model(directory: Path, policy: Path) -> None:
    """Writes a reward model with the policy's trunk and a random score."""
    loaded = hf.load(policy)
    assert isinstance(loaded.config, ModelConfig)
    config = replace(loaded.config, scalar_head=True, tie_embeddings=False)
    params = {name: value for name, value in loaded.params.items() if name != "unembed"}
    score = np.random.default_rng(0).normal(0, 0.02, config.d_model).astype(np.float32)
    hf.save(directory, config, decoder.recut({**params, "score": score}, ()), loaded.directory)


@contextmanager
def serving(options: argparse.Namespace, directory: Path) -> Iterator[Mapping[str, str]]:
    """Runs a server of each kind until it is left; gives their URLs by kind."""
    models = {protocol.POLICY: options.policy.absolute(), protocol.ORACLE: directory / "reward"}
    extra = [f"--dtype={options.dtype}", f"--max_model_len={options.prompt_tokens + options.new_tokens + 192}"]
    places = launch.plan("all", 0, launch.SHARES["all"], oracle=True).servers
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                launch.server(
                    launch.server_command(place, options.bridge_python, models, directory, extra),
                    launch.environment(None, os.environ[protocol.TOKEN_VARIABLE]),
                    directory / f"{place.name}.log",
                )
            )
            for place in places
        ]
        urls = launch.wait_for_urls(places, servers, directory)
        yield {kind: found[0] for kind, found in urls.items()}


def timed(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Alternates the sides; returns, for each, its amount per second in every round. A first call of each is not counted."""
    for side in sides.values():
        side()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            amount = side()
            rates[name].append(amount / (time.perf_counter() - start))
    return rates


def line(what: str, rates: Mapping[str, Sequence[float]], unit: str) -> str:
    """One row of the table for each side: median, and all rounds."""
    return "\n".join(
        f"| {what}, {name} | {statistics.median(values):.4g} {unit} | {', '.join(f'{value:.4g}' for value in values)} |"
        for name, values in rates.items()
    )


def compared(own: Candidates, other: Candidates) -> float:
    """Asserts that greedy responses are the same; returns the largest difference of their log-probs."""
    np.testing.assert_array_equal(own.lengths, other.lengths)
    valid = np.arange(own.tokens.shape[-1]) < np.asarray(own.lengths)[..., None]
    np.testing.assert_array_equal(np.asarray(own.tokens)[valid], np.asarray(other.tokens)[valid])
    return float(np.abs(np.asarray(own.logprobs) - np.asarray(other.logprobs))[valid].max())


def measure(options: argparse.Namespace, directory: Path, urls: Mapping[str, str]) -> Iterator[str]:
    """Yields the rows of the table."""
    token = os.environ[protocol.TOKEN_VARIABLE]
    policy = load_policy(str(options.policy), options.train_last_layers, dtype=options.dtype)
    servers = client.PolicyClient([urls[protocol.POLICY]], token)
    random = np.random.default_rng(0)
    tokens = random.integers(10, policy.config.vocab_size, (options.prompts, options.prompt_tokens), np.int32)
    prompts = Prompts(jax.numpy.asarray(tokens), jax.numpy.ones(tokens.shape, bool))

    def sides(temperature: float, eos_ids: tuple[int, ...]) -> dict[str, Generate]:
        how = GenerationConfig(
            num_samples=options.samples if temperature else 1,
            max_new_tokens=options.new_tokens,
            eos_ids=eos_ids,
            pad_id=policy.tokenizer.pad_id,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            feature_stack=None,
            frozen_stacks=0,
            dtype=options.dtype,
        )
        engine = bridge(servers, policy.frozen, policy.config, how, weights_dtype=options.dtype)
        return {"in process": in_process(policy.frozen, policy.config, how), "engine": engine}

    # ------------------------------------------------------------------------------------------------- The same, then speed
    greedy = {name: side(policy.reference, prompts, jax.random.key(0), 0) for name, side in sides(0.0, ()).items()}
    if options.dtype == "float32":
        gap = compared(greedy["in process"], greedy["engine"])
        assert gap < TOLERANCE, f"log-probs differ by {gap}"
        yield f"| greedy responses | the same | largest difference of log-probs {gap:.1e} nats |"
    drawn = sides(0.7, ())  # nothing ends a response: both write exactly as many tokens

    def writes(side: Generate) -> Callable[[], float]:
        def write() -> float:
            return float(np.asarray(side(policy.reference, prompts, jax.random.key(1), 0).lengths).sum())

        return write

    rates = timed(options.rounds, **{name: writes(side) for name, side in drawn.items()})
    yield line("responses", rates, "tokens/s")

    # ------------------------------------------------------------------------------------------------------------- Pushes
    whole = decoder.join(policy.frozen, policy.reference)
    for what, params, last in (("all weights", whole, False), ("last layers", policy.reference, True)):
        tensors = hf.to_tensors(policy.config, jax.device_get(params), "bfloat16", last_part=last)
        size = float(sum(tensor.nbytes for tensor in tensors.values()))

        def push(
            route: weights.Route, tensors: dict[str, np.ndarray] = tensors, last: bool = last
        ) -> Callable[[], float]:
            to = client.PolicyClient([urls[protocol.POLICY]], token, route=route)

            def give() -> float:
                base = to.versions()[urls[protocol.POLICY]] if last else None
                to.push(tensors, secrets.token_hex(4), [urls[protocol.POLICY]], base)
                return sum(tensor.nbytes for tensor in tensors.values())

            return give

        rates = timed(options.rounds, shm=push(weights.Route()), http=push(weights.Route(transport=weights.HTTP)))
        yield line(f"push of {what}, {size / 1e6:.0f} MB", rates, "bytes/s")
        seconds = ", ".join(f"{name} {size / statistics.median(values):.2f} s" for name, values in rates.items())
        yield f"| push of {what} | {seconds} | |"

    # ------------------------------------------------------------------------------------------------------------- Oracle
    texts = [f"prompt {number} of some words that are there for its length" for number in range(options.pairs)]
    remote = remote_reward(
        client.OracleClient([urls[protocol.ORACLE]], token).score, str(directory / "reward"), max_tokens=128
    )
    own = reward_model_scores(str(directory / "reward"), dtype=options.dtype, batch_size=16, max_tokens=128)
    if options.dtype == "float32":
        gap = float(np.abs(remote(texts, texts) - own(texts, texts)).max())
        assert gap < TOLERANCE, f"scores differ by {gap}"
        yield f"| scores | the same | largest difference {gap:.1e} |"

    def judges(reward: Reward) -> Callable[[], float]:
        def judge() -> float:
            reward([*texts, *texts], [*texts, *reversed(texts)])
            return len(texts)

        return judge

    yield line("oracle", timed(options.rounds, **{"in process": judges(own), "engine": judges(remote)}), "pairs/s")


def train_with(lag: int, options: argparse.Namespace, directory: Path, urls: Mapping[str, str]) -> str:
    """Trains a few steps of the quickstart through the bridge; returns a row of the table."""
    config = quickstart.get_config()
    config.policy.source = str(options.policy)
    config.exploration.planning_steps = 0
    config.max_queries = options.steps * config.data.batch_size
    config.eval.num_prompts, config.eval.best_of_n, config.eval.every_queries = 16, 0, config.max_queries
    config.checkpoint.every_steps = options.steps
    config.actor.kind, config.actor.urls, config.actor.lag = "bridge", urls[protocol.POLICY], lag
    config.actor.weights_dtype = options.dtype
    config.actor.max_logprob_gap = 0.5
    workdir = directory / f"lag-{lag}"
    train.train(config, workdir)
    rows = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["misc/step_time"] for row in rows if "misc/step_time" in row][1:]  # the first one compiles
    return f"| step with lag {lag} | {statistics.median(steps):.2f} s | {', '.join(f'{step:.2f}' for step in steps)} |"


def main() -> None:
    """Starts the servers, measures and prints."""
    options = parse(sys.argv[1:])
    flags.FLAGS(sys.argv[:1])
    os.environ.setdefault(protocol.TOKEN_VARIABLE, secrets.token_urlsafe(32))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_reward_model(directory / "reward", options.policy)
        with serving(options, directory) as urls:
            rows = list(measure(options, directory, urls))
            rows += [train_with(lag, options, directory, urls) for lag in (0, 1) if options.steps]
    print(
        f"{options.prompts} prompts of {options.prompt_tokens} tokens, {options.samples} x {options.new_tokens} tokens,"
    )
    print(
        f"{options.dtype}, {os.cpu_count()} cores: XLA uses them all, each server one; {options.rounds} alternating rounds\n"
    )
    print("| what | median | rounds |\n| --- | ---: | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
