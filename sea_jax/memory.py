"""Does it fit? Compiles a run's steps for devices that need not be there and prints what each of them would hold.

python -m sea_jax.memory --config=configs/tldr.py:6.9b --devices=8                          (seconds to minutes, on any machine)
python -m sea_jax.memory --config=configs/tldr.py:6.9b --target=v5p:2x2x2                   (needs pip install "jax[tpu]")
python -m sea_jax.memory --config=configs/tldr.py:6.9b --devices=8 --target=h100            (needs pip install "jax[cuda13]")

Nothing is allocated and no weights are read: the steps are compiled for shapes. Each figure is the compiler's estimate;
a real run was seen to need a quarter more for its temporaries, so that much is added before anything is said to fit.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sea_jax import config as configuration
from sea_jax import ensemble, features, group_learner, learner, losses, policy_logprobs, preflight, wiring
from sea_jax.actors import generation
from sea_jax.actors.in_process import REMEMBERED_BYTES, bytes_of_prompts
from sea_jax.actors.responder import COMPARED
from sea_jax.config import RunSettings
from sea_jax.data import batching
from sea_jax.features import FeatureSettings
from sea_jax.initial_state import replay_capacity
from sea_jax.learner import LearnerConfig
from sea_jax.methods.reinforce import LOSSES as ON_GROUPS
from sea_jax.models import deberta, decoder, encoder, partition, reward
from sea_jax.models.checkpoints import hf, published
from sea_jax.models.checkpoints.config_json import from_hf
from sea_jax.models.config import Config, DebertaConfig, EncoderConfig, ModelConfig
from sea_jax.models.mesh import make_mesh
from sea_jax.models.parameters import Params
from sea_jax.policy import Division, check_language_model, divide_layers
from sea_jax.replay import empty_replay
from sea_jax.runtime import console
from sea_jax.settings import naming
from sea_jax.types import FrozenStates, PreferenceBatch, Prompts

flags.declare_key_flag(console.CONFIG.name)  # the rest of its flags is for those who compute
DEVICES = flags.DEFINE_integer("devices", 8, "How many devices; of a TPU, its topology says.", lower_bound=1)
TARGET = flags.DEFINE_string(
    "target", "cpu", "Compile for cpu, h100, or a TPU by its topology, such as v5p:2x2x2 or v6e:2x4."
)

# What XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX take of a GPU; left to itself it takes three quarters. The H100's memory
# is the device_memory_size of _H100, which is less than its name says; the A100s' is that of their names.
_MEMORIES = {"A100-40G": 40 * 2**30, "A100-80G": 80 * 2**30, "H100": 84_929_347_584}
GPU_BYTES = {name: int(0.95 * size) for name, size in _MEMORIES.items()}
TPU_BYTES = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30, "tpu7x": 96 * 2**30}  # a device
MARGIN = 1.25  # a small real run's temporaries against the compiler's estimate

# What XLA has to know of the device: https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-h100
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Step:
    """What a compiled step needs on each device besides what is there all the time.

    Attributes:
      name: of the step.
      temporary_bytes: activations, gradients and caches; what it returns and does not put in its arguments' place.
      cache_bytes: of these, keys and values of prompts and responses.
      compile_s: seconds that the compiler took.
    """

    name: str
    temporary_bytes: int
    cache_bytes: int
    compile_s: float


def devices(target: str, count: int) -> Sequence[jax.Device]:
    """Returns devices to compile for.

    Args:
      target: cpu, h100, or a TPU's topology.
      count: how many; of a TPU, its topology says.

    Raises:
      ValueError: there is no such target, or the package that compiles for it is missing.
    """
    jax.config.update("jax_platforms", "cpu")
    if target == "cpu":
        jax.config.update("jax_num_cpu_devices", count)
        return jax.devices()
    family = target.partition(":")[0]
    if target != "h100" and (family not in TPU_BYTES or ":" not in target):
        known = ", ".join(f"{name}:2x2..." for name in TPU_BYTES)
        raise ValueError(f"--target={target}: it can be cpu, h100 or the topology of a TPU ({known})")
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    try:
        if target == "h100":
            return topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=_H100
            ).devices
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    except Exception as error:  # plugins raise many kinds
        package = "cuda13" if target == "h100" else "tpu"
        raise ValueError(
            f"--target={target}: JAX cannot compile for it here ({str(error).splitlines()[0]:.200}); is it spelt right, and is "
            f'the compiler installed: pip install "jax[{package}]=={jax.__version__}"?'
        ) from error


def describe(source: str) -> Config:
    """Returns a model's configuration; that of a published model needs no hub.

    Args:
      source: anything that `hf.load` takes.
    """
    if source in published.CONFIGS:
        return from_hf(published.CONFIGS[source])
    return hf.read_config(source)


def bytes_per_device(tree: Any) -> int:
    """Returns what a tree takes on each device.

    Args:
      tree: jax.ShapeDtypeStruct with shardings.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole(tree: Any, mesh: Mesh) -> Any:
    """Returns shapes that are whole on every device.

    Args:
      tree: arrays or shapes.
      mesh: the mesh.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def learner_of(trained: Params, how: LearnerConfig, mesh: Mesh) -> learner.Learner:
    """Returns the shapes of a learner, Adam's moments divided as the parameters are.

    Args:
      trained: shapes of the trained part.
      how: LearnerConfig.
      mesh: the mesh.
    """
    structure: Any = jax.tree.structure(trained)

    def is_moment(x: Any) -> bool:
        return jax.tree.structure(x) == structure

    state = jax.eval_shape(learner.optimizer(how).init, trained)
    state = jax.tree.map(lambda x: trained if is_moment(x) else whole(x, mesh), state, is_leaf=is_moment)
    return learner.Learner(trained, state, whole(jax.ShapeDtypeStruct((), jnp.int32), mesh))


def compiled(name: str, step: Callable[[], Any], platform: str, cache_bytes: int = 0) -> Step:
    """Compiles a step and asks the compiler what it needs.

    Args:
      name: of the step.
      step: lowers it.
      platform: of the devices.
      cache_bytes: keys and values on each device.

    Returns:
      Step.

    Raises:
      ValueError: the compiler says itself that it does not fit.
    """
    start = time.perf_counter()
    try:
        memory = step().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        reason = next(
            (line for line in str(error).splitlines() if "memory" in line.lower()), str(error).splitlines()[0]
        )
        raise ValueError(f"the {name} step does not compile for this target: {reason:.300}") from error
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if platform == "tpu":  # there the peak is exact, and what lies in the arguments' place is not counted twice
        temporary = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return Step(name, temporary, cache_bytes, time.perf_counter() - start)


@dataclass(frozen=True)
class ShapedRun:
    """A run of which nothing is allocated.

    Attributes:
      config: its settings.
      mesh: the one that is set.
      model: the policy's configuration.
      cut: where the policy's layers are divided.
      frozen: shapes of the frozen part, as the reference's in the compute dtype.
      reference: of the reference's trained part.
      learner: of the policy's trained part and the optimiser.
      learner_config: LearnerConfig.
    """

    config: RunSettings
    mesh: Mesh
    model: ModelConfig
    cut: Division
    frozen: Params
    reference: Params
    learner: learner.Learner
    learner_config: LearnerConfig

    @property
    def platform(self) -> str:
        """Of the mesh's devices."""
        return self.mesh.devices.flat[0].platform

    @property
    def prompt_tokens(self) -> int:
        """P of the longest bucket."""
        return batching.rounded(self.config.data.max_prompt_tokens, self.config.data.bucket)

    @property
    def rows(self) -> int:
        """Prompts that are answered at a time."""
        return self.config.sampling.batch_size or self.config.data.batch_size

    def shape(self, dtype: Any, *sizes: int) -> Any:
        """A shape that is whole on every device."""
        return whole(jax.ShapeDtypeStruct(sizes, dtype), self.mesh)

    def prompts(self, rows: int) -> Prompts:
        """B of them."""
        sizes = rows, self.prompt_tokens
        return Prompts(self.shape(jnp.int32, *sizes), self.shape(jnp.bool_, *sizes))

    def responses(self, rows: int, samples: int, tokens: int) -> tuple[Any, Any]:
        """Tokens and lengths."""
        return self.shape(jnp.int32, rows, samples, tokens), self.shape(jnp.int32, rows, samples)

    @property
    def sampling(self) -> generation.GenerationConfig:
        """How candidates are drawn."""
        drawn = self.config.sampling
        return generation.GenerationConfig(
            num_samples=drawn.num_samples,
            max_new_tokens=drawn.max_new_tokens,
            eos_ids=(0,),
            pad_id=0,
            temperature=drawn.temperature,
            top_k=drawn.top_k,
            top_p=drawn.top_p,
            feature_stack=self.cut.feature_stack,
            frozen_stacks=len(self.frozen["stacks"]),
            dtype=self.config.policy.dtype,
        )

    @property
    def keeps_frozen_states(self) -> bool:
        """Whether the sampler, in this process, hands on what it meets behind frozen layers."""
        return bool(self.frozen["stacks"]) and self.mesh.size == 1 and self.config.actor.kind == "in_process"

    @property
    def best_of_n(self) -> generation.GenerationConfig:
        """How an evaluation draws the responses that the ERM chooses from."""
        evaluated = self.config.eval
        return dataclasses.replace(
            self.sampling, num_samples=evaluated.best_of_n, max_new_tokens=evaluated.max_new_tokens
        )


def shaped(config: RunSettings, mesh: Mesh) -> ShapedRun:
    """Returns a run as shapes.

    Raises:
      ValueError: a model is not what its field wants, or the mesh does not divide something.
    """
    with naming("policy.source", config.policy.source):
        model = check_language_model(describe(config.policy.source))
    preflight.check_mesh(config, mesh, model, describe)
    cut = divide_layers(model, config.policy.train_last_layers, config.erm.feature_layer)
    frozen, trained = decoder.divide(decoder.abstract(model, cut.cuts), cut.num_trained_stacks)
    learner_config = learner.configured(config.learner, total_steps=1000, dtype=config.policy.dtype)
    return ShapedRun(
        config=config,
        mesh=mesh,
        model=model,
        cut=cut,
        frozen=partition.abstract(frozen, config.policy.dtype),
        reference=partition.abstract(trained, config.policy.dtype),
        learner=learner_of(partition.abstract(trained), learner_config, mesh),
        learner_config=learner_config,
    )


def measure(config: RunSettings, mesh: Mesh) -> tuple[dict[str, int], list[Step]]:
    """Returns what a run holds on each device, and what its steps need besides.

    Args:
      config: a whole configuration.
      mesh: the one that is set.

    Returns:
      Bytes by what they are for, and the compiled steps.

    Raises:
      ValueError: a model is not what its field wants, or the mesh does not divide something.
    """
    run = shaped(config, mesh)
    held = {
        "policy parameters": bytes_per_device(run.learner.trained) + bytes_per_device(run.frozen),
        "optimiser": bytes_per_device(run.learner.opt_state),
        "reference": bytes_per_device(run.reference),
    }
    if run.keeps_frozen_states:
        prompts = run.config.eval.num_prompts * run.prompt_tokens
        heldout = bytes_of_prompts(run.frozen, run.model, prompts, config.policy.dtype)
        held["held-out prompts, read"] = min(heldout, REMEMBERED_BYTES)
    steps = [training_step(run)]
    if config.actor.kind == "in_process":
        steps += writing_steps(run)
    else:  # servers write
        if config.actor.lag or config.actor.sync_every > 1:
            held["policy copy for the engine"] = bytes_per_device(run.learner.trained)
        steps.append(comparing_step(run))
    for part in (reward_heads, scoring):
        more_held, more_steps = part(run)
        held |= more_held
        steps += more_steps
    return held, steps


def training_step(run: ShapedRun) -> Step:
    """Compiles the policy step: on pairs, or on all responses where the method learns from their rewards."""
    config, rows = run.config, run.config.data.batch_size
    on_groups = config.method in ON_GROUPS
    samples = config.sampling.num_samples if on_groups else 2
    tokens, lengths = run.responses(rows, samples, config.sampling.max_new_tokens)
    frozen = None
    if run.keeps_frozen_states:
        d, dtype = run.model.d_model, config.policy.dtype
        frozen = FrozenStates(run.shape(dtype, rows, run.prompt_tokens, d), run.shape(dtype, *tokens.shape, d))
    common = {"prompts": run.prompts(rows), "tokens": tokens, "lengths": lengths, "frozen": frozen}
    weights = run.shape(jnp.float32, rows)
    given = (run.learner, run.frozen, run.reference)
    static = {"config": run.model, "learner_config": run.learner_config}
    if on_groups:
        groups = group_learner.GroupBatch(
            **common,
            logprobs=run.shape(jnp.float32, *tokens.shape),
            rewards=run.shape(jnp.float32, rows, samples),
            weights=weights,
        )
        lower = functools.partial(
            group_learner.update.lower,
            *given,
            groups,
            loss=ON_GROUPS[config.method](config.group),
            kl=config.group.kl,
            **static,
        )
    else:
        pairs = PreferenceBatch(**common, labels=run.shape(jnp.float32, rows), weights=weights)
        lower = functools.partial(learner.update.lower, *given, pairs, loss=losses.build(config.loss), **static)
    return compiled("train", lower, run.platform)


def writing_steps(run: ShapedRun) -> list[Step]:
    """Compiles what writes responses in this process."""

    def write(name: str, rows: int, sampling: generation.GenerationConfig) -> Step:
        params = decoder.join(run.frozen, run.learner.trained)
        lower = functools.partial(
            generation.generate.lower, params, run.prompts(rows), _key(run), config=run.model, sampling=sampling
        )
        return compiled(name, lower, run.platform, cache_bytes(run.model, sampling, rows, run.prompt_tokens, run.mesh))

    greedy = dataclasses.replace(run.best_of_n, num_samples=1, temperature=0.0)
    steps = [write("sample", run.rows, run.sampling), write("evaluate", run.config.eval.batch_size, greedy)]
    return [*steps, write("best of N", run.rows, run.best_of_n)] if run.best_of_n.num_samples else steps


def comparing_step(run: ShapedRun) -> Step:
    """Compiles what holds a server's log-probs against the learner's."""
    rows, sampling = run.config.data.batch_size, run.sampling
    lower = functools.partial(
        policy_logprobs.token_logprobs.lower,
        run.frozen,
        (run.learner.trained,),
        run.prompts(rows),
        *run.responses(rows, min(COMPARED, sampling.num_samples), sampling.max_new_tokens),
        config=run.model,
        dtype=sampling.dtype,
    )
    return compiled("log-prob check", lower, run.platform)


def reward_heads(run: ShapedRun) -> tuple[dict[str, int], list[Step]]:
    """Returns what the ERM holds; compiles what reads its features, unless the sampler does, and what it learns by."""
    erm, held, steps, width = run.config.erm, {}, [], run.model.d_model
    if erm.trunk:
        with naming("erm.trunk", erm.trunk):
            held["ERM trunk"], step, width = trunk_step(describe(erm.trunk), erm, run.shape)
        steps.append(compiled("features", step, run.platform))
    elif not (run.cut.features_are_frozen and wiring.sampler_reads_features(run.config)):
        steps.append(_reading_step("features", run, run.sampling))
        if run.best_of_n.num_samples:
            steps.append(_reading_step("best-of-N features", run, run.best_of_n))
    replay = jax.eval_shape(functools.partial(empty_replay, replay_capacity(run.config), width))
    replay = partition.abstract_batches(replay)
    heads = whole(jax.eval_shape(lambda: ensemble.init(erm, width, jax.random.key(0))), run.mesh)
    held["ERM heads and replay"] = bytes_per_device(heads) + bytes_per_device(replay)
    learn = jax.jit(functools.partial(ensemble.update, config=erm))
    steps.append(compiled("ERM", functools.partial(learn.lower, heads, replay, _key(run)), run.platform))
    return held, steps


def _reading_step(name: str, run: ShapedRun, sampling: generation.GenerationConfig) -> Step:
    lower = functools.partial(
        features.response_features.lower,
        decoder.join(run.frozen, run.reference),
        run.prompts(run.rows),
        *run.responses(run.rows, sampling.num_samples, sampling.max_new_tokens),
        config=run.model,
        feature_stack=sampling.feature_stack,
        dtype=sampling.dtype,
    )
    return compiled(name, lower, run.platform)


def scoring(run: ShapedRun) -> tuple[dict[str, int], list[Step]]:
    """Returns what reward models that answer in this process hold, oracle's and judge's, and compiles their forward passes."""
    held: dict[str, int] = {}
    steps = []
    for field, taste, whose in (("oracle", run.config.oracle, ""), ("eval.judge", run.config.eval.judge, "judge's ")):
        if taste.kind != "reward_model":
            continue
        with naming(f"{field}.reward_model", taste.reward_model):
            model = reward.check(describe(taste.reward_model))
        params = partition.abstract(hf.abstract(model), taste.dtype)
        header = (0,) if isinstance(model, ModelConfig) and model.gating else ()  # any tokens: they are of no size
        score = jax.jit(functools.partial(reward.apply, config=model, dtype=taste.dtype, header=header))
        size = (taste.batch_size, taste.max_tokens)
        tokens, valid = run.shape(jnp.int32, *size), run.shape(jnp.bool_, *size)
        lower = functools.partial(score.lower, params, tokens=tokens, valid=valid)
        held[f"{whose}reward model"] = bytes_per_device(params)
        steps.append(compiled(f"{whose}score", lower, run.platform))
    return held, steps


def _key(run: ShapedRun) -> Any:
    return whole(jax.eval_shape(lambda: jax.random.key(0)), run.mesh)


def cache_bytes(model: ModelConfig, how: generation.GenerationConfig, prompts: int, length: int, mesh: Mesh) -> int:
    """Returns the bytes of keys and values on each device while responses are written.

    Args:
      model: the policy's configuration.
      how: GenerationConfig.
      prompts: B.
      length: P, tokens of a prompt.
      mesh: the mesh.
    """
    tokens = prompts * (length + how.num_samples * how.max_new_tokens)
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(how.dtype).itemsize
    return tokens * per_token // mesh.size


def trunk_step(trunk: Config, config: FeatureSettings, shape: Callable[..., Any]) -> tuple[int, Callable[[], Any], int]:
    """Returns an ERM trunk's bytes on each device, what lowers its forward pass, and the width of its features.

    Args:
      trunk: the trunk's configuration.
      config: FeatureSettings.
      shape: dtype and sizes -> a shape that is whole on every device.
    """
    width = features.width_as_trunk(trunk)
    params = partition.abstract(features.trunk_specs(trunk), config.trunk_dtype)
    apply: Any  # each takes configurations of its own kind
    if isinstance(trunk, DebertaConfig):
        apply, longest = deberta.apply, features.MAX_TOKENS
    elif isinstance(trunk, EncoderConfig):
        apply, longest = encoder.apply, trunk.max_positions
    else:
        apply, longest = decoder.hidden_states, features.longest_conversation(trunk)
    size = (config.trunk_batch_size, longest)
    step = jax.jit(lambda params, *inputs: apply(params, trunk, *partition.batches(inputs), dtype=config.trunk_dtype))
    return bytes_per_device(params), lambda: step.lower(params, shape(jnp.int32, *size), shape(jnp.bool_, *size)), width


def table(held: Mapping[str, int], steps: Sequence[Step], memories: Mapping[str, int]) -> str:
    """Returns the answer, in GB (1e9 bytes) on each device.

    Args:
      held: bytes by what they are for.
      steps: Step.
      memories: bytes of a device by its name.
    """
    resident, worst = sum(held.values()), max(steps, key=lambda step: step.temporary_bytes)
    lines = ["| on each device | GB |", "| --- | ---: |"]
    lines += [f"| {name} | {_gb(size)} |" for name, size in held.items()]
    lines.append(f"| held all the time | {_gb(resident)} |")
    for step in steps:
        parts = f" (of which keys and values {_gb(step.cache_bytes)})" if step.cache_bytes else ""
        lines.append(f"| {step.name} step, besides{parts} | {_gb(step.temporary_bytes)} |")
    needed = resident + int(MARGIN * worst.temporary_bytes)
    lines.append(f"| peak, in the {worst.name} step | {_gb(resident + worst.temporary_bytes)} |")
    lines.append(f"| the same with {MARGIN - 1:.0%} more for temporaries | {_gb(needed)} |")
    lines += ["", "| device | GB | fits |", "| --- | ---: | --- |"]
    lines += [
        f"| {name} | {_gb(size)} | {'yes' if needed <= size else f'no, {_gb(needed - size)} GB short'} |"
        for name, size in memories.items()
    ]
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def main() -> None:
    """Reads the flags, compiles and prints."""
    if console.HELP_CONFIG.value:
        print(configuration.table(configuration.unchecked(console.CONFIG.value)))
        return
    config = configuration.resolve(console.CONFIG.value)
    target = TARGET.value
    found = devices(target, DEVICES.value)
    mesh = make_mesh(config.mesh, found)
    with jax.set_mesh(mesh):
        held, steps = measure(config, mesh)
    family = target.partition(":")[0]
    memories = GPU_BYTES | ({family: TPU_BYTES[family]} if family in TPU_BYTES else {})
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(
        f"{config.name} on {mesh.size} devices ({shape}), compiled for {target} in {sum(s.compile_s for s in steps):.0f} s\n"
    )
    print(table(held, steps, memories))


if __name__ == "__main__":
    console.run(main)
