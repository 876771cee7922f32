"""What is looked at before anything is loaded or spent: are models and data there, does the mesh divide them?"""

from collections.abc import Callable

from jax.sharding import Mesh

from sea_jax.config import RunSettings
from sea_jax.data.prompts import load_records
from sea_jax.data.sources import Record
from sea_jax.models import reward
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import Config, DebertaConfig, ModelConfig
from sea_jax.models.mesh import check_divides
from sea_jax.oracles import judge
from sea_jax.oracles.oracle import PreferenceSettings
from sea_jax.oracles.reward_model import read_conversations
from sea_jax.runtime import cache, processes
from sea_jax.settings import naming


def read_sources(config: RunSettings) -> tuple[list[Record], list[Record]]:
    """Reads the prompts and fetches the models of a run, or says of all that cannot be had at once.

    Args:
      config: a whole configuration.

    Returns:
      (training records, held-out records).

    Raises:
      ValueError: one line per model or data set that is not there or cannot be read.
    """
    sources = {"policy.source": config.policy.source, "erm.trunk": config.erm.trunk}
    tastes = {"oracle": config.oracle, "eval.judge": config.eval.judge}
    sources |= {
        f"{field}.reward_model": taste.reward_model
        for field, taste in tastes.items()
        if taste.kind in ("reward_model", "remote")
    }
    served = {f"{field}.reward_model" for field, taste in tastes.items() if taste.kind == "remote"}
    faults = []
    for field, source in sources.items():
        try:
            if field in served:
                hf.locate(source, weights=False)
            elif source and not source.startswith(cache.PREFIX):
                hf.read_config(source)
        except (OSError, ValueError) as error:
            remedy = (
                f"; a copy of your own is named with --config.{field}=DIRECTORY" if isinstance(error, OSError) else ""
            )
            faults.append(f"config.{field}={source}: {error}{remedy}")
    try:
        records = load_records(config.data)
    except OSError as error:
        faults.append(
            f"config.data.path={config.data.path}: {error}; a copy of your own is named with --config.data.path=PATH"
        )
    if faults:
        raise ValueError("\n".join(faults))
    for field, taste, some, which in (
        ("oracle", config.oracle, records[0], "training"),
        ("eval.judge", config.eval.judge, records[1], "held-out"),
    ):
        if taste.reads_references and not any(record["reference"].strip() for record in some):
            raise ValueError(
                f"config.{field}.against={taste.against}: none of {len(some)} {which} prompts has a reference; name their "
                "field in config.data.reference_field, or set it to prompt"
            )
    return records


def check_length(model: ModelConfig, prompt_tokens: int, response_tokens: int, field: str) -> None:
    """Refuses sequences that are longer than those that a policy was made for: it would write garbage.

    Args:
      model: the policy's configuration.
      prompt_tokens: of the longest prompt.
      response_tokens: of the longest response to it.
      field: that sets these.

    Raises:
      ValueError: together they are too long.
    """
    limit, together = model.longest_sequence, prompt_tokens + response_tokens
    if together <= limit:
        return
    why = f"the policy was made for up to {limit} tokens"
    if limit == model.window:
        why = f"the policy's sliding window of attention is {limit} tokens, and only full attention is supported"
    remedies = [
        f"{name} to {limit - others}"
        for name, others in ((field, prompt_tokens), ("data.max_prompt_tokens", response_tokens))
        if others < limit
    ]
    raise ValueError(
        f"config.{field}: a prompt of {prompt_tokens} tokens and a response of up to {response_tokens} are {together}, but "
        f"{why}: lower {', or '.join(remedies) or 'both'}; longer prompts are left out then"
    )


def check_reward_model(settings: PreferenceSettings, field: str) -> None:
    """Refuses a reward model, here or at servers, that cannot read conversations as the settings say; loads no weights.

    Raises:
      ValueError: what keeps it from that, by the name of the field.
    """
    if settings.kind in ("reward_model", "remote"):
        with naming(f"{field}.reward_model", settings.reward_model):
            here = settings.kind == "reward_model"
            directory = hf.locate(settings.reward_model, weights=here)
            read_conversations(directory, settings.max_tokens, weights=here)


def check_judge(settings: PreferenceSettings, field: str) -> None:
    """Refuses a chat model as a judge whose template or key is not there, in the process that will ask it.

    Raises:
      ValueError: which of them, by the name of the field.
    """
    if settings.kind == "judge":
        processes.by_first(lambda: judge.check(settings.judge, f"{field}.judge"), None, "the judge")


def check_mesh(
    config: RunSettings,
    mesh: Mesh,
    model: ModelConfig,
    describe: Callable[[str], Config] = hf.read_config,
    training: bool = True,
) -> None:
    """Refuses a mesh that does not divide the batches or the models.

    Args:
      config: a whole configuration.
      mesh: the one that is set.
      model: the policy's configuration.
      describe: source of another model -> its configuration.
      training: False: no policy step is taken.

    Raises:
      ValueError: one line per size that is not divided.
    """
    batch_sizes = {
        "data.batch_size": config.data.batch_size,
        "eval.batch_size": config.eval.batch_size,
        "sampling.batch_size": config.sampling.batch_size,
    }
    models: dict[str, ModelConfig | DebertaConfig] = {"policy.source": model}
    if training:
        batch_sizes["learner.microbatch_size"] = config.learner.microbatch_size
    if config.erm.trunk:
        batch_sizes["erm.trunk_batch_size"] = config.erm.trunk_batch_size
    for part, taste in (("oracle", config.oracle), ("eval.judge", config.eval.judge)):
        if taste.kind == "reward_model":
            batch_sizes[f"{part}.batch_size"] = taste.batch_size
            with naming(f"{part}.reward_model", taste.reward_model):
                models[f"{part}.reward_model"] = reward.check(describe(taste.reward_model))
    check_divides(mesh, batch_sizes, models)
