"""The frozen pytrees that flow through one step, and the shapes of the functions a user may bring.

Letters of all annotations: B prompts, M candidates, K heads, P prompt tokens, T response tokens, S tokens of any sequence,
d features, V vocabulary, L layers, N texts, pairs or rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32

Array = jax.Array
AnyArray = jax.Array | np.ndarray  # of the devices or of the host
Params = dict[str, Any]  # a nested dict (with tuples of stacks) of arrays, or of the ParamSpec that describe them


@struct.dataclass
class Prompts:
    """Tokenised prompts, padded on the left so that the last prompt token is the last column; valid: False on padding."""

    tokens: Int32[AnyArray, "B P"]
    valid: Bool[AnyArray, "B P"]


@struct.dataclass
class FrozenStates:
    """Hidden states of prompts and responses behind the layers that are not trained, which nothing changes any more."""

    prompt: Float[Array, "B P d"]
    responses: Float[Array, "B M T d"]


@struct.dataclass
class Candidates:
    """M sampled responses to each prompt.

    Attributes:
      tokens: the end-of-sequence token included, padded behind it.
      lengths: response tokens, the end-of-sequence token included.
      logprobs: of the sampled tokens at temperature 1; 0 on padding.
      features: mean over the response tokens of the hidden state read for the ERM; d = 0 where none is read.
      frozen: what the sampler met behind the frozen layers, for the learner; None: it runs them itself.
    """

    tokens: Int32[Array, "B M T"]
    lengths: Int32[Array, "B M"]
    logprobs: Float32[Array, "B M T"]
    features: Float32[Array, "B M d"]
    frozen: FrozenStates | None = None


@struct.dataclass
class Duel:
    """The two of each prompt's M candidates that are compared, by their indices."""

    first: Int32[Array, " B"]
    second: Int32[Array, " B"]


@struct.dataclass
class PairLogps:
    """What a direct optimizer knows of a preference pair: log-probs summed over the response tokens.

    Attributes:
      chosen: log pi(y+ | x).
      rejected: log pi(y- | x).
      reference_chosen: log pi_ref(y+ | x).
      reference_rejected: log pi_ref(y- | x).
      chosen_length: response tokens of y+.
      rejected_length: response tokens of y-.
    """

    chosen: Float32[Array, " B"]
    rejected: Float32[Array, " B"]
    reference_chosen: Float32[Array, " B"]
    reference_rejected: Float32[Array, " B"]
    chosen_length: Int32[Array, " B"]
    rejected_length: Int32[Array, " B"]


@struct.dataclass
class PreferenceBatch:
    """Pairs for one policy step.

    Attributes:
      tokens: first and second response, padded on the right.
      lengths: response tokens.
      labels: in [0, 1], the probability that the first response wins.
      weights: 0 leaves a pair out.
      frozen: of prompts and both responses; None: the learner runs the frozen layers.
    """

    prompts: Prompts
    tokens: Int32[Array, "B 2 T"]
    lengths: Int32[Array, "B 2"]
    labels: Float32[Array, " B"]
    weights: Float32[Array, " B"]
    frozen: FrozenStates | None = None


class Judgement(NamedTuple):
    """Answers to some of the N duels that an oracle was asked about.

    Attributes:
      rows: which of the N are answered.
      probability: that the first response wins, before any noise.
      label: in [0, 1], the label that is paid for and learnt from; NaN: nobody will ever give one.
      people: who answered each of them, by name; (): nobody in particular.
    """

    rows: Int[np.ndarray, " n"]
    probability: Float64[np.ndarray, " n"]
    label: Float64[np.ndarray, " n"]
    people: Sequence[Sequence[str]] = ()


Loss = Callable[..., Array]
"""A direct optimizer: `loss(pairs: PairLogps, **hyper_parameters)` -> [B], of a chosen response over a rejected one.

A loss with a parameter `labels` is given the pairs as they were compared, the first response as `chosen`, and in `labels` the
probability [B] that it wins; for all others `losses.expected` takes care of soft labels.
"""

DuelRule = Callable[..., Duel]
"""Picks the duel: `rule(rewards [K, B, M], distinct [B, M, M], key)` -> Duel.

`distinct[b, i, j]` says that the texts of candidates i and j differ: two identical texts tell an oracle nothing. A rule with
keyword-only parameters of the names in `sampling.SEES` is given these too; what no rule asks for is not computed.
"""


class Preference(Protocol):
    """The noise-free taste behind an oracle: N prompts and two responses each -> P(first wins) of each pair.

    What is returned is N probabilities, None or NaN where there is no answer; or an iterator of (row, probability), which
    may come in any order, each one being on disk before the next is awaited, and end before all rows have come.

    The pairs are shown in a random order, and what is answered is turned back. One that looks at a single response at a time
    has no use for that, and says so by an attribute `pointwise` that is true.

    One that has a parameter `keys` (default None) is given the N names of the asks there, where a label is paid for; none
    are given where win rates are measured. In the same way one that has a parameter `finished` is given N pairs there: whether
    the first and the second response ended by themselves, or were cut.
    """

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], /) -> Any: ...


Oracle = Callable[..., Iterator[Judgement]]
"""Labels N duels: `oracle(prompts, first, second, swapped, keys, asks)` -> a `Judgement` whenever answers come.

Duels that no judgement is about are not answered. `swapped` [N] bool: which pairs are to be shown the other way round.
A random key per duel, `keys` [N], drives whatever noise there is. `asks` are N names, unique over all runs: a duel that is
sent again after a crash bears the same name, so that who bills for an answer can give it from his own record. One with a
parameter `finished` is given N pairs there: whether the two responses ended by themselves; one with a parameter `foreseen`
N probabilities by the ERM that the first wins, for who wants to compare.
"""


@runtime_checkable
class LateOracle(Protocol):
    """An oracle that may answer after the step that asked: a duel that no judgement was about when its call ended stays open.

    Attributes:
      max_staleness: policy steps after which nobody is to be asked about an open duel any more.
    """

    @property
    def max_staleness(self) -> int: ...

    def __call__(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: np.ndarray,
        keys: Array,
        asks: Sequence[str],
        /,
    ) -> Iterator[Judgement]: ...

    def collect(self, asks: Sequence[str]) -> Judgement:
        """Returns, without waiting, what has become of N open duels, by the names under which they were asked about."""
        ...

    def withdraw(self, asks: Sequence[str]) -> None:
        """Has nobody asked about these any more; `collect` says NaN of each, unless somebody was faster."""
        ...


class Response(Protocol):
    """One response as a server wrote it: ids, the end-of-sequence token included, and the log-prob of each at temperature 1."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[float]: ...


class OtherVersion(ValueError):
    """Servers have other weights than they should; to push again may help. The text names who and which versions."""


class PolicyServers(Protocol):
    """Servers that write responses with the weights they are given; every version of these has a name.

    Attributes:
      run: begins the names of this run's versions, as no other run's.
      turn: held by whoever has responses written, so that the weights do not change under him.
    """

    @property
    def run(self) -> str: ...

    @property
    def turn(self) -> AbstractContextManager[object]: ...

    def versions(self) -> Mapping[str, str]:
        """Returns the version that each server has, of those that are up; waits until one is.

        Returns:
          URL -> version.

        Raises:
          OSError: none is up after all that waiting.
        """
        ...

    def push(
        self, tensors: Mapping[str, np.ndarray], version: str, urls: Sequence[str], base: str | None = None
    ) -> None:
        """Gives servers other weights.

        Args:
          tensors: by the names of Hugging Face checkpoints.
          version: what they are called.
          urls: which servers.
          base: the version that the tensors change; None: they are all there are.

        Raises:
          OtherVersion: none of them has taken the weights.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        version: str,
        *,
        num_samples: int,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        absent_ids: Sequence[int],
        vocab_size: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> Sequence[Sequence[Response]]:
        """Has responses written, whichever servers do it.

        Args:
          prompts: B, token ids without padding.
          seeds: B, what decides the responses to each.
          version: of the weights that must have written every token.
          num_samples: M.
          max_new_tokens: T.
          eos_ids: tokens that end a response.
          absent_ids: rows of the vocabulary that are never drawn.
          vocab_size: responses have smaller ids.
          temperature, top_k, top_p: as in `sea_jax.actors.generation.GenerationConfig`.

        Returns:
          B lists of M.

        Raises:
          OtherVersion: servers are up, but with other weights.
          OSError: none is up after all the waiting.
        """
        ...


Generate = Callable[[Params, Prompts, Array, int], Candidates]
"""Trained parameters, prompts, key, and how many policy steps made the parameters -> candidates."""

Respond = Callable[[int, Params, Prompts, Array, int], tuple[Candidates, Mapping[str, float]]]
"""The same with the number of the batch of prompts before it -> candidates, and what the log says of them."""

Reward = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # N prompts, N responses -> [N] float64
