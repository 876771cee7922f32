"""One online step of SEA, ours beside PyTorch's, part by part: `python -m benchmarks.step`.

A step: M responses to each of B prompts by the current policy, the reference's features of each, an oracle's labels of
one duel per prompt, the ERM's rewards and gradient steps, one DPO step on all weights. What the baseline does stands in
torch_step.py. Both sides start from the same weights, work on the same prompts and candidates with the same number of
threads, and write responses of exactly T tokens: the end-of-sequence token is disabled for both. What they compute is
asserted to be the same before anything is timed (agreement.py). Then rounds alternate: ours, PyTorch's, ours, ...
"""

import argparse
import json
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import agreement, machine, work
from benchmarks.inputs import Inputs, Settings, Step
from benchmarks.jax_step import JaxStep, ensemble_config, sampling_config
from benchmarks.torch_step import TorchStep, candidate_texts
from configs import quickstart
from sea_jax import ensemble
from sea_jax.actors import generation
from sea_jax.config import RunSettings, resolve
from sea_jax.data.prompts import Rendered, collate, load_prompts
from sea_jax.models import decoder, tokenizer
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import EncoderConfig
from sea_jax.policy import Policy, load_policy
from sea_jax.types import Prompts

PARTS = ("generate", "features", "oracle", "ERM", "learn")
FIRST, OTHERS = "first token", "other tokens"  # generate, once more with T = 1, and what is left


@dataclass(frozen=True)
class Seconds:
    """Seconds of every round, by part.

    Attributes:
      ours: part -> one number per round.
      torch: the same for the baseline.
    """

    ours: Mapping[str, list[float]]
    torch: Mapping[str, list[float]]


def configuration(arguments: argparse.Namespace) -> RunSettings:
    """Returns the quickstart's settings with the benchmark's sizes, and every weight trained.

    Args:
      arguments: what `parse` returned.
    """
    config = quickstart.get_config()
    config.policy.source = arguments.source
    config.policy.train_last_layers = 0
    config.policy.dtype = arguments.dtype
    config.data.max_prompt_tokens = config.data.bucket = arguments.prompt_tokens
    config.data.batch_size = config.learner.microbatch_size = arguments.prompts
    config.sampling.num_samples = arguments.samples
    config.sampling.max_new_tokens = arguments.new_tokens
    return resolve(config)


def settings(config: RunSettings) -> Settings:
    """Returns the sizes and hyper-parameters that both sides use.

    Args:
      config: a whole configuration.
    """
    return Settings(
        samples=config.sampling.num_samples,
        new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        dtype=config.policy.dtype,
        feature_layer=config.erm.feature_layer,
        num_heads=config.erm.num_heads,
        hidden_size=config.erm.hidden_size,
        erm_learning_rate=config.erm.learning_rate,
        erm_weight_decay=config.erm.weight_decay,
        anchor_strength=config.erm.anchor_strength,
        erm_steps=config.erm.steps,
        erm_batch_size=config.erm.batch_size,
        learning_rate=config.learner.learning_rate,
        b1=config.learner.b1,
        b2=config.learner.b2,
        clip_norm=config.learner.clip_norm,
        beta=config.loss.beta or 0.1,
        oracle_scale=config.oracle.scale,
    )


def make_inputs(sizes: Settings, policy: Policy, rendered: list[Rendered], prompt_tokens: int) -> Inputs:
    """Makes what both sides work on: our samples, their features, a random duel per prompt, random labels.

    Args:
      sizes: Settings.
      policy: Policy.
      rendered: B prompts.
      prompt_tokens: P is a multiple of it.

    Returns:
      Inputs, its replay of as many pairs as the ERM takes at a time: then every batch holds the same pairs.
    """
    batch = collate(rendered, policy.tokenizer.pad_id, prompt_tokens)
    candidates = generation.generate(
        decoder.join(policy.frozen, policy.reference),
        Prompts(jnp.asarray(batch["tokens"]), jnp.asarray(batch["valid"])),
        jax.random.key(0),
        config=policy.config,
        sampling=sampling_config(sizes, policy),
    )
    random = np.random.default_rng(0)
    features = np.array(candidates.features)
    num_prompts, samples, num_features = features.shape
    erm = ensemble.init(ensemble_config(sizes), num_features, jax.random.key(1))
    erm = ensemble.calibrate(erm, candidates.features)
    pairs = random.integers(0, num_prompts * samples, (sizes.erm_batch_size, 2))
    return Inputs(
        posts=batch["prompt"],
        tokens=batch["tokens"],
        valid=batch["valid"],
        pad_id=policy.tokenizer.pad_id,
        responses=np.array(candidates.tokens),
        lengths=np.array(candidates.lengths),
        duel=np.stack([random.permutation(samples)[:2] for _ in range(num_prompts)]),
        labels=random.integers(0, 2, (num_prompts,)).astype(np.float32),
        features=features,
        replay_features=features.reshape(-1, num_features)[pairs],
        replay_labels=random.integers(0, 2, (sizes.erm_batch_size,)).astype(np.float32),
        shift=np.array(erm.shift),
        scale=np.array(erm.scale),
        heads={name: np.array(value) for name, value in erm.heads.items()},
    )


def one_round(side: Step, sizes: Settings, posts: list[str], number: int) -> dict[str, float]:
    """Times every part of one side once.

    Args:
      side: Step.
      sizes: Settings.
      posts: B texts.
      number: of the round; seeds what is drawn.

    Returns:
      Seconds by part, and of the first token alone, the other tokens, and the step.
    """
    # A blank more makes a post new to a cache of embeddings, as the posts of a step are, and changes no token of it.
    new_posts = [post + " " * (number + 1) for post in posts]
    runs: dict[str, Callable[[], object]] = {
        FIRST: lambda: side.generate(number, 1),
        "generate": lambda: side.generate(number, sizes.new_tokens),
        "features": side.features,
        "oracle": lambda: side.oracle(new_posts, number),
        "ERM": lambda: side.erm(number),
        "learn": side.learn,
    }
    seconds = {}
    for part, run in runs.items():
        start = time.perf_counter()
        run()
        seconds[part] = time.perf_counter() - start
    seconds[OTHERS] = seconds["generate"] - seconds[FIRST]
    seconds["step"] = sum(seconds[part] for part in PARTS)
    return seconds


def measure(ours: Step, baseline: Step, sizes: Settings, posts: list[str], rounds: int) -> Seconds:
    """Times interleaved rounds; one round of each side before them does not count.

    Args:
      ours: Step.
      baseline: Step.
      sizes: Settings.
      posts: B texts.
      rounds: that count.

    Returns:
      Seconds.
    """
    each: dict[str, list[dict[str, float]]] = {"ours": [], "torch": []}
    for number in range(rounds + 1):
        for name, side in (("ours", ours), ("torch", baseline)):
            each[name].append(one_round(side, sizes, posts, number))
            print(f"round {number} {name}: {each[name][-1]['step']:.2f} s", file=sys.stderr)
    names = each["ours"][0].keys()
    ours_seconds, torch_seconds = (
        {name: [one[name] for one in each[side][1:]] for name in names} for side in ("ours", "torch")
    )
    return Seconds(ours=ours_seconds, torch=torch_seconds)


def table(seconds: Seconds, counted: Mapping[str, work.Work], flops: float, bandwidth: float) -> str:
    """Returns the measurements as one markdown table.

    Args:
      seconds: Seconds.
      counted: part -> Work.
      flops: operations per second of the machine's fastest matrix product.
      bandwidth: bytes per second of a copy.
    """
    lines = [
        "| part | ours, s | PyTorch, s | PyTorch / ours | counted GFLOP | ours, of matmul peak | of bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in ("generate", FIRST, OTHERS, *PARTS[1:], "step"):
        ours, baseline = np.median(seconds.ours[part]), np.median(seconds.torch[part])
        need = counted[part]
        read = f"{need.bytes_read / ours / bandwidth:.0%}" if need.bytes_read else ""
        name = f"{'... ' if part in (FIRST, OTHERS) else ''}{part}"
        lines.append(
            f"| {name} | {quartiles(seconds.ours[part])} | {quartiles(seconds.torch[part])} | {baseline / ours:.2f} | "
            f"{need.flops / 1e9:.1f} | {need.flops / ours / flops:.0%} | {read} |"
        )
    return "\n".join(lines)


def quartiles(values: list[float]) -> str:
    """Returns "median (first quartile-third quartile)".

    Args:
      values: seconds.
    """
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def peak_memory_bytes(sizes: Settings, inputs: Inputs, policy: Path, encoder: Path) -> dict[str, int]:
    """Returns the most memory that each side takes for one round, each in a process of its own.

    Args:
      sizes: Settings.
      inputs: Inputs.
      policy: directory of a Llama.
      encoder: directory of a BERT.

    Returns:
      {"ours", "torch"}, bytes.
    """
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "round.pickle"
        path.write_bytes(pickle.dumps((sizes, inputs, policy, encoder)))
        for side in ("ours", "torch"):
            command = [sys.executable, "-m", "benchmarks.memory", side, str(path)]
            found[side] = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's settings.

    Args:
      arguments: without the program's name; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="B")
    parser.add_argument("--samples", type=int, default=8, help="M, responses per prompt")
    parser.add_argument("--new_tokens", type=int, default=24, help="T, tokens per response")
    parser.add_argument("--prompt_tokens", type=int, default=96, help="P; longer prompts are left out")
    parser.add_argument("--rounds", type=int, default=5, help="of each side")
    parser.add_argument("--threads", type=int, default=2, help="processors, for XLA and PyTorch alike")
    parser.add_argument("--source", default="builtin:smollm2-135m-instruct", help="a Llama, as the library names it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")
    return parser.parse_args(arguments)


def main() -> None:
    """Checks, measures and prints."""
    arguments = parse()
    machine.confine(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compile_s: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compile_s.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)

    config = configuration(arguments)
    sizes = settings(config)
    policy = load_policy(config.policy.source, train_last_layers=0, feature_layer=sizes.feature_layer, dtype="float32")
    rendered = load_prompts(config.data, policy.tokenizer, 1)[0][: arguments.prompts]
    if len(rendered) < arguments.prompts:
        raise SystemExit(
            f"--prompts={arguments.prompts}: there are {len(rendered)} of {arguments.prompt_tokens} tokens"
        )
    encoder = hf.load(config.oracle.encoder)
    assert isinstance(encoder.config, EncoderConfig)
    inputs = make_inputs(sizes, policy, rendered, arguments.prompt_tokens)

    with tempfile.TemporaryDirectory() as directory:
        copied = Path(directory) / "policy"
        hf.save(copied, policy.config, decoder.join(policy.frozen, policy.reference), policy.directory)
        agreements = {
            dtype: agreement.check(replace(sizes, dtype=dtype), inputs, copied, encoder.directory)
            for dtype in dict.fromkeys(("float32", sizes.dtype))
        }
        print(f"agreement: {agreements}", file=sys.stderr)
        compile_s.clear()
        jax.clear_caches()
        ours, baseline = (side(sizes, inputs, copied, encoder.directory) for side in (JaxStep, TorchStep))
        seconds = measure(ours, baseline, sizes, inputs.posts, arguments.rounds)
        memory = peak_memory_bytes(sizes, inputs, copied, encoder.directory) if arguments.memory else {}

    duellists = [
        row[i]
        for row, duel in zip(candidate_texts(policy.tokenizer.backend, inputs), inputs.duel, strict=True)
        for i in duel
    ]
    words = tokenizer.load(encoder.directory)
    text_tokens = [len(words.encode(text)) for text in (*inputs.posts, *duellists)]
    counted = work.count(policy.config, encoder.config, sizes, inputs, text_tokens)
    peaks = {dtype: machine.matmul_flops(dtype) for dtype in dict.fromkeys(("float32", sizes.dtype))}
    bandwidth = machine.copy_bandwidth()

    flops = max(peaks[sizes.dtype].values())
    print(table(seconds, counted, flops, bandwidth))
    print()
    print(
        f"{arguments.prompts} prompts of up to {arguments.prompt_tokens} tokens ({inputs.valid.sum()} in all), "
        f"{sizes.samples} samples of {sizes.new_tokens} tokens, {sizes.dtype}, {arguments.threads} threads, "
        f"{arguments.rounds} interleaved rounds; medians, quartiles in brackets."
    )
    print(
        "Matmul peak: "
        + "; ".join(
            f"{dtype} {found['xla'] / 1e9:.0f} GFLOP/s in XLA, {found['torch'] / 1e9:.0f} in PyTorch"
            for dtype, found in peaks.items()
        )
        + f"; the shares are of the greater of {sizes.dtype}. Copy: {bandwidth / 1e9:.0f} GB/s."
    )
    print(f"XLA compiled {len(compile_s)} programs in {sum(compile_s):.1f} s, before the rounds that count.")
    if memory:
        print(f"Peak memory: ours {memory['ours'] / 2**30:.2f} GiB, PyTorch {memory['torch'] / 2**30:.2f} GiB.")
    if arguments.output:
        everything = {
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "settings": asdict(sizes),
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "agreement": agreements,
            "seconds": asdict(seconds),
            "counted": {part: asdict(need) for part, need in counted.items()},
            "matmul_flops": peaks,
            "copy_bytes_per_s": bandwidth,
            "compile_s": sum(compile_s),
            "peak_memory_bytes": memory,
        }
        arguments.output.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
