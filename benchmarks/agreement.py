"""Both sides compute the same: asserted before anything is measured."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
import torch
from safetensors.numpy import load_file

from benchmarks.inputs import Inputs, Settings
from benchmarks.jax_step import JaxStep
from benchmarks.torch_step import TorchStep, candidate_texts
from sea_jax.models import decoder
from sea_jax.models.checkpoints import hf


@dataclass(frozen=True)
class Tolerances:
    """The greatest differences allowed; absolute unless said otherwise.

    Attributes:
      logprob: of a response token.
      loss: DPO's, before and after one step.
      update: 1 minus the cosine of the two changes of all parameters in one step.
      feature: relative to the features' root mean square.
      reward: of a head.
      heads: 1 minus the cosine of the two changes of all heads in the ERM's gradient steps.
      similarity: of the oracle's embeddings.
    """

    logprob: float
    loss: float
    update: float
    feature: float
    reward: float
    heads: float
    similarity: float


TOLERANCES = {
    "float32": Tolerances(logprob=1e-3, loss=1e-4, update=1e-3, feature=1e-3, reward=1e-4, heads=1e-3, similarity=1e-4),
    # Eight bits of mantissa through tens of layers; Adam's first step keeps of a gradient hardly more than its sign.
    "bfloat16": Tolerances(logprob=0.5, loss=0.05, update=0.5, feature=0.1, reward=1e-4, heads=1e-3, similarity=1e-4),
}


def check(settings: Settings, inputs: Inputs, policy: Path, encoder: Path) -> dict[str, float]:
    """Runs every part of both sides on the same inputs and compares.

    Args:
      settings: Settings.
      inputs: Inputs.
      policy: directory of a Llama.
      encoder: directory of a BERT.

    Returns:
      The differences found, by name.

    Raises:
      AssertionError: one of them is beyond its tolerance, or greedy tokens differ (in float32).
    """
    lengths = np.random.default_rng(0).integers(1, settings.new_tokens + 1, inputs.lengths.shape).astype(np.int32)
    inputs = replace(inputs, lengths=lengths)  # of every length, so that padding must not matter
    ours, baseline = JaxStep(settings, inputs, policy, encoder), TorchStep(settings, inputs, policy, encoder)
    found: dict[str, float] = {}

    if settings.dtype == "float32":  # in bfloat16 the two most probable tokens often tie
        own, their = (side.generate(0, settings.new_tokens, greedy=True) for side in (ours, baseline))
        np.testing.assert_array_equal(own, their)
    for side in (ours, baseline):
        assert side.generate(0, settings.new_tokens).shape == inputs.responses.shape
    with torch.no_grad():
        theirs = baseline.logprobs(baseline.policy, inputs.responses, lengths).numpy()
    found["logprob"] = difference(ours.logprobs(inputs.responses, lengths), theirs)
    expected = baseline.features()
    found["feature"] = difference(ours.features(), expected) / float(np.sqrt((expected**2).mean()))

    texts = candidate_texts(baseline.words, inputs)
    assert texts == ours.texts(ours.candidates())
    first = [row[0] for row in texts]
    found["similarity"] = difference(ours.similarities(inputs.posts, first), baseline.similarities(inputs.posts, first))

    found["reward"] = difference(ours.erm(0), baseline.erm(0))
    heads = {name: np.asarray(value) for name, value in ours.ensemble.heads.items()}
    their_heads = {name: value.detach().numpy() for name, value in baseline.heads.items()}
    found["heads"] = 1 - cosine(inputs.heads, heads, their_heads)

    before = {name: value.numpy().copy() for name, value in baseline.policy.state_dict().items()}
    found["loss"] = abs(ours.learn() - baseline.learn())  # policy and reference are still the same: log 2
    after = {name: value.numpy() for name, value in baseline.policy.state_dict().items()}
    found["update"] = 1 - cosine(before, policy_tensors(ours), after)
    found["loss"] = max(found["loss"], abs(ours.learn() - baseline.learn()))

    for name, limit in asdict(TOLERANCES[settings.dtype]).items():
        assert found[name] <= limit, f"{settings.dtype}: {name} differs by {found[name]:.2e}, the limit is {limit:.0e}"
    return found


def difference(ours: np.ndarray | jax.Array, theirs: np.ndarray) -> float:
    """Returns the greatest absolute difference.

    Args:
      ours: any shape.
      theirs: the same shape.
    """
    assert ours.shape == theirs.shape, f"{ours.shape} and {theirs.shape}"
    return float(np.abs(np.asarray(ours) - theirs).max())


def policy_tensors(ours: JaxStep) -> Mapping[str, np.ndarray]:
    """Returns our policy's weights by the names of transformers.

    Args:
      ours: JaxStep.
    """
    with tempfile.TemporaryDirectory() as directory:
        params = decoder.join(ours.policy.frozen, ours.learner.trained)
        hf.save(directory, ours.policy.config, params)
        return load_file(Path(directory) / "model.safetensors")


def cosine(before: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Returns the cosine of the two changes of all parameters.

    Args:
      before: tensors by name; a name that ours lacks is a tied copy of another.
      ours: after our step.
      theirs: after theirs.
    """
    product = own_square = their_square = 0.0
    for name in ours:
        own, their = (after[name].astype(np.float64) - before[name] for after in (ours, theirs))
        product += float((own * their).sum())
        own_square += float((own**2).sum())
        their_square += float((their**2).sum())
    return product / (own_square * their_square) ** 0.5
