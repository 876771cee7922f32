"""The losses against TRL's trainers, whose loss functions are run on log-probs of our choice without a trainer."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax import losses
from sea_jax.types import PairLogps

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

pytestmark = pytest.mark.slow  # importing TRL takes some ten seconds

NUM_PAIRS = 6
MAX_TOKENS = 9


def token_logprobs(seed: int):
    """Log-probs [2 N, T] of chosen, then rejected responses, 0 on padding, and the mask [2 N, T]."""
    rng = np.random.default_rng(seed)
    lengths = np.random.default_rng(0).integers(1, MAX_TOKENS + 1, 2 * NUM_PAIRS)
    mask = np.arange(MAX_TOKENS) < lengths[:, None]
    return np.where(mask, rng.uniform(-4, 0, mask.shape), 0.0), mask


@pytest.fixture
def pairs():
    """The pairs that TRL sees, as PairLogps."""
    (policy, mask), (reference, _) = token_logprobs(1), token_logprobs(2)
    sums = [*np.split(policy.sum(1), 2), *np.split(reference.sum(1), 2)]
    return PairLogps(*(jnp.asarray(s, jnp.float32) for s in sums), *(jnp.asarray(x) for x in np.split(mask.sum(1), 2)))


def trl_dpo(loss_type: str, beta: float, label_smoothing: float = 0.0) -> np.ndarray:
    """The losses [N] of TRL's DPOTrainer: one pair at a time, since the trainer returns their mean."""
    from trl.trainer.dpo_trainer import DPOTrainer

    (policy, mask), (reference, _) = token_logprobs(1), token_logprobs(2)

    def one(row: int) -> float:
        both = [row, row + NUM_PAIRS]
        logprobs = torch.tensor(policy[both])
        # The first column is the prompt: TRL predicts each token from the one before it.
        completion_mask = torch.nn.functional.pad(torch.tensor(mask[both]).long(), (1, 0))
        zeros = torch.zeros_like(logprobs)
        outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

        def same(values):
            return values

        trainer: Any = SimpleNamespace(
            model=SimpleNamespace(training=False),
            accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
        )
        inputs = {
            "input_ids": torch.zeros_like(completion_mask),
            "completion_mask": completion_mask,
            "ref_chosen_logps": torch.tensor(reference[[row]].sum(1)),
            "ref_rejected_logps": torch.tensor(reference[[row + NUM_PAIRS]].sum(1)),
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()

    return np.array([one(row) for row in range(NUM_PAIRS)])


def trl_simpo(chosen: np.ndarray, rejected: np.ndarray, beta: float, gamma: float, label_smoothing: float = 0.0):
    """The losses [N] of TRL's CPOTrainer on length-averaged log-probs."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer: Any = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        simpo_gamma=gamma,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    values, _, _ = CPOTrainer.cpo_loss(trainer, torch.tensor(np.array(chosen)), torch.tensor(np.array(rejected)))
    return values.numpy()


def test_dpo(pairs):
    np.testing.assert_allclose(losses.dpo(pairs, beta=0.3), trl_dpo("sigmoid", 0.3), rtol=1e-5)


def test_soft_labels_are_label_smoothing(pairs):
    # TRL smooths labels in "aot", which sorts the margins of a batch; with one pair a batch it is conservative DPO.
    smoothed = losses.expected(lambda p: losses.dpo(p, beta=0.3), pairs, jnp.full(NUM_PAIRS, 0.8))
    np.testing.assert_allclose(smoothed, trl_dpo("aot", 0.3, label_smoothing=0.2), rtol=1e-5)


def test_ipo(pairs):
    # TRL averages the log-ratios over the tokens of each response; the paper's formula, our default, does not.
    np.testing.assert_allclose(losses.ipo(pairs, beta=0.3, length_averaged=True), trl_dpo("ipo", 0.3), rtol=1e-5)


def test_slic(pairs):
    np.testing.assert_allclose(losses.slic(pairs, beta=0.3), trl_dpo("hinge", 0.3), rtol=1e-5, atol=1e-6)


def test_simpo(pairs):
    chosen, rejected = pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length
    np.testing.assert_allclose(
        losses.simpo(pairs, beta=2.0, gamma_over_beta=0.4), trl_simpo(chosen, rejected, 2.0, 0.8), rtol=1e-5
    )
    # Under smoothing TRL's target margin stays with the response labelled as chosen, also in the term for the opposite
    # outcome; ours belongs to whichever response wins. Without a target margin both are the same.
    smoothed = losses.expected(
        lambda p: losses.simpo(p, beta=2.0, gamma_over_beta=0.0), pairs, jnp.full(NUM_PAIRS, 0.9)
    )
    np.testing.assert_allclose(smoothed, trl_simpo(chosen, rejected, 2.0, 0.0, label_smoothing=0.1), rtol=1e-5)
