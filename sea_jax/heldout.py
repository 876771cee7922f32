"""How a run's policy is evaluated on held-out prompts: who writes, who compares, what is measured besides."""

import functools
from collections.abc import Callable, Sequence

import jax

from sea_jax import evaluation
from sea_jax.actors import generation
from sea_jax.config import RunSettings
from sea_jax.data.prompts import evaluation_batches
from sea_jax.ensemble import Ensemble
from sea_jax.evaluation import JUDGE, ORACLE, Evaluation, Responses
from sea_jax.oracles import preferences
from sea_jax.oracles.asked_once import asked_once
from sea_jax.oracles.ledger import Ledger
from sea_jax.policy_logprobs import likelihood_at
from sea_jax.types import Generate, Params
from sea_jax.wiring import Parts


def heldout_evaluation(
    config: RunSettings,
    loaded: Parts,
    best_of_n: int,
    ledgers: Sequence[Ledger],
    watched: Callable[[Generate], Generate] = lambda generate: generate,
) -> Evaluation:
    """Returns how a policy is evaluated; the initial policy's responses are written on the way.

    Args:
      config: RunSettings.
      loaded: Parts.
      best_of_n: responses to choose from where the ERM chooses; 0: it never will.
      ledgers: of what evaluations ask; new questions go to the first.
      watched: put around whoever writes the responses, to see how far he is.
    """
    padding, decode, finished = loaded.padding(config.data.bucket), loaded.texts, loaded.finished
    how = functools.partial(
        generation.configured,
        config.sampling,
        loaded.policy,
        config.policy.dtype,
        max_new_tokens=config.eval.max_new_tokens,
    )
    heldout = list(evaluation_batches(loaded.heldout_prompts, batch_size=config.eval.batch_size, **padding))
    few = loaded.heldout_prompts[: config.eval.best_of_n_prompts]
    many = how(num_samples=max(best_of_n, 1))
    write_one = watched(loaded.generate(how(num_samples=1, temperature=0.0), again=True))
    write_many = watched(loaded.generate(many, config.sampling.batch_size))

    def greedy(trained: Params, version: int) -> Responses:
        return evaluation.greedy(write_one, decode, finished, trained, version, heldout)

    def chosen(trained: Params, reward_model: Ensemble, version: int) -> Responses:
        batches = list(evaluation_batches(few, batch_size=config.data.batch_size, **padding))
        key = jax.random.key(config.seed)
        return evaluation.best_of_n(
            write_many, decode, finished, loaded.features, trained, version, reward_model, batches, key
        )

    tastes = {ORACLE: loaded.preference if config.eval.oracle else None, JUDGE: loaded.judge}
    read = loaded.heldout_prompts[: config.eval.likelihood_prompts]
    likelihood = functools.partial(
        likelihood_at,
        batch_size=config.sampling.batch_size or config.data.batch_size,
        bucket=config.data.bucket,
        max_new_tokens=config.eval.max_new_tokens,
        settings=config.data,
    )
    return Evaluation(
        records=[one.record for one in loaded.heldout_prompts],
        preferences={who: asked_once(taste, who, ledgers[0], ledgers[1:]) for who, taste in tastes.items() if taste},
        greedy=greedy,
        best_of_n=chosen,
        likelihood=likelihood(loaded.policy, read, config.policy.dtype) if read else None,
        initial=greedy(loaded.policy.reference, version=0),
        swapped=preferences.drawn_order(jax.random.split(jax.random.key(config.seed), len(loaded.heldout_prompts))),
    )
