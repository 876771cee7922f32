"""Responses that are kept, compared and written ahead, with a writer who says what he was asked."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.actors.in_process import kept
from sea_jax.actors.journal import Journal, Written
from sea_jax.actors.responder import EngineResponder, resumable
from sea_jax.types import Array, Candidates, Params, Prompts

SHAPE = (2, 3, 4)  # B, M, T


def prompts(number: int) -> Prompts:
    return Prompts(jnp.full((2, 5), number, jnp.int32), jnp.ones((2, 5), bool))


def key(number: int) -> Array:
    return jax.random.fold_in(jax.random.key(7), number)


class Writer:
    """Answers with its prompts' number and the weights, and remembers what it was asked."""

    def __init__(self, logprob: float = -1.0) -> None:
        self.asked: list[tuple[int, int, float]] = []  # number of the batch, version, weight
        self.logprob = logprob
        self.go = threading.Event()
        self.go.set()

    def __call__(self, trained: Params, prompts: Prompts, key: Array, version: int) -> Candidates:
        assert self.go.wait(timeout=20)
        number, weight = int(prompts.tokens[0, 0]), float(trained["w"])
        self.asked.append((number, version, weight))
        tokens = jnp.full(SHAPE, 100 * number + version, jnp.int32) + jax.random.randint(key, SHAPE, 0, 50)
        return Candidates(tokens, jnp.full(SHAPE[:2], 2), jnp.full(SHAPE, self.logprob), jnp.zeros((*SHAPE[:2], 0)))


def learners(trained: Params, prompts: Prompts, tokens: Array, lengths: Array) -> Array:
    """The learner's log-probs: -1 on the response, anything on the padding."""
    valid = jnp.arange(tokens.shape[-1]) < lengths[..., None]
    return jnp.where(valid, -1.0, 99.0)


INITIAL = {"w": jnp.float32(0)}


def opened(
    directory: Path, writer: Writer, *, ahead: bool = False, keep: int = 2, sync_every: int = 1
) -> tuple[EngineResponder, Journal]:
    journal = Journal(directory, keep)
    following = (lambda number: (prompts(number), key(number))) if ahead else None
    return EngineResponder(
        writer, learners, journal, max_logprob_gap=0.05, initial=INITIAL, sync_every=sync_every, next_batch=following
    ), journal


def ask(responses: EngineResponder, number: int, version: int) -> tuple[Candidates, Any]:
    return responses(number, {"w": jnp.float32(version)}, prompts(number), key(number), version)


def test_what_is_on_disk_is_not_written_again(tmp_path: Path) -> None:
    writer = Writer()
    first, report = ask(opened(tmp_path, writer)[0], 0, 0)
    again, report_again = ask(opened(tmp_path, writer)[0], 0, 0)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert report == report_again == {"actor/logprob_gap": 0.0, "actor/staleness": 0}
    assert writer.asked == [(0, 0, 0.0)]


def test_the_next_batch_is_written_by_the_policy_before_the_step(tmp_path: Path) -> None:
    writer = Writer()
    responses, _ = opened(tmp_path, writer, ahead=True)
    reports = [ask(responses, number, version=number)[1] for number in range(3)]
    responses.settle()
    assert writer.asked == [(0, 0, 0.0), (1, 0, 0.0), (2, 1, 1.0), (3, 2, 2.0)]
    assert [report["actor/staleness"] for report in reports] == [0, 1, 1]


def test_the_learner_may_take_the_parameters_while_they_are_written_with(tmp_path: Path) -> None:
    writer = Writer()
    responses, journal = opened(tmp_path, writer, ahead=True)
    trained = {"w": jnp.float32(3)}
    journal.record(0, Written(writer(trained, prompts(0), key(0), 3), 3, 0.0))
    writer.go.clear()
    responses(0, trained, prompts(0), key(0), 3)
    trained["w"].delete()  # as a donated buffer is
    writer.go.set()
    responses.settle()
    assert writer.asked[-1] == (1, 3, 3.0)


def test_a_run_that_goes_on_finds_what_was_being_written_ahead(tmp_path: Path) -> None:
    undisturbed = Writer()
    responses, _ = opened(tmp_path / "undisturbed", undisturbed, ahead=True)
    expected = [ask(responses, number, version=number) for number in range(3)]
    writer = Writer()
    responses, _ = opened(tmp_path / "killed", writer, ahead=True)
    ask(responses, 0, 0)
    responses.settle()  # before a checkpoint
    resumed, _ = opened(tmp_path / "killed", writer, ahead=True)
    found = [ask(resumed, number, version=number) for number in (1, 2)]
    for (candidates, report), (wanted, wanted_report) in zip(found, expected[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, candidates, wanted)
        assert report == wanted_report


@pytest.mark.parametrize("logprob", [-1.1, float("nan")])
def test_a_writer_that_computes_something_else_stops_the_run(logprob: float, tmp_path: Path) -> None:
    responses, journal = opened(tmp_path, Writer(logprob))
    with pytest.raises(
        ValueError, match=r"actor/logprob_gap is (0.1000|nan) .* after 4 policy steps.*max_logprob_gap=0.05"
    ):
        ask(responses, 0, 4)
    assert journal.find(0) is None


def ask_and_take(responses: EngineResponder, number: int) -> dict[str, float]:
    """Asks for batch after batch, one policy step each; the learner's next step takes the parameters' buffers."""
    trained = {"w": jnp.float32(number)}
    _, report = responses(number, trained, prompts(number), key(number), number)
    responses.settle()
    trained["w"].delete()
    return dict(report)


def test_weights_are_kept_between_two_pushes(tmp_path: Path) -> None:
    writer = Writer()
    responses, _ = opened(tmp_path, writer, sync_every=3)
    reports = [ask_and_take(responses, number) for number in range(7)]
    assert writer.asked == [(0, 0, 0.0), (1, 0, 0.0), (2, 0, 0.0), (3, 3, 3.0), (4, 3, 3.0), (5, 3, 3.0), (6, 6, 6.0)]
    assert [report["actor/staleness"] for report in reports] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("saved", [1, 2, 3, 6])
def test_a_run_that_goes_on_where_it_may_writes_with_the_same_weights(tmp_path: Path, saved: int, ahead: bool) -> None:
    undisturbed, first, second = Writer(), Writer(), Writer()
    responses, _ = opened(tmp_path / "undisturbed", undisturbed, sync_every=3, ahead=ahead)
    expected = [ask_and_take(responses, number) for number in range(9)]
    responses, _ = opened(tmp_path / "killed", first, sync_every=3, ahead=ahead)
    for number in range(saved + 1):  # one more batch than the checkpoint knows of
        ask_and_take(responses, number)
    assert resumable(saved, 3)
    responses, _ = opened(tmp_path / "killed", second, sync_every=3, ahead=ahead)
    assert [ask_and_take(responses, number) for number in range(saved, 9)] == expected[saved:]
    assert first.asked + second.asked == undisturbed.asked


def test_where_a_run_cannot_go_on() -> None:
    assert [version for version in range(9) if not resumable(version, 3)] == [4, 5, 7, 8]
    assert all(resumable(version, 1) for version in range(9))
    assert all(resumable(version, 1000) for version in range(9))


def test_an_error_does_not_wait_for_what_is_being_written_ahead(tmp_path: Path) -> None:
    writer = Writer()
    responses, journal = opened(tmp_path, writer, ahead=True)
    journal.record(0, Written(writer({"w": jnp.float32(0)}, prompts(0), key(0), 0), 0, 0.0))
    writer.go.clear()  # a server hangs
    with contextlib.suppress(KeyboardInterrupt), responses:
        ask(responses, 0, 0)
        raise KeyboardInterrupt
    (thread,) = (one for one in threading.enumerate() if one.name.endswith("(work)"))
    assert thread.daemon
    writer.go.set()
    thread.join(20)


def test_an_end_without_an_error_keeps_what_is_being_written_ahead(tmp_path: Path) -> None:
    responses, journal = opened(tmp_path, Writer(), ahead=True)
    with responses:
        ask(responses, 0, 0)
    assert journal.find(1) is not None


def test_a_failure_of_what_is_written_ahead_comes_up_where_it_is_needed(tmp_path: Path) -> None:
    writer = Writer()
    responses, _ = opened(tmp_path, writer, ahead=True)
    writer.logprob = -1.0
    ask(responses, 0, 0)
    responses.settle()
    writer.logprob = -3.0
    ask(responses, 1, 1)
    with pytest.raises(ValueError, match="logprob_gap"):
        ask(responses, 2, 2)


def test_what_no_checkpoint_comes_past_again_is_forgotten(tmp_path: Path) -> None:
    responses, journal = opened(tmp_path, Writer(), keep=1)
    for number in range(6):
        ask(responses, number, number)
        if number % 2:
            journal.checkpointed(number + 1)
    # The checkpoint behind 6 batches may not be on disk yet, the one behind 4 is.
    assert sorted(int(path.stem) for path in tmp_path.glob("*.npz")) == [4, 5]


def test_what_was_written_in_this_process_is_kept_for_each_key(tmp_path: Path) -> None:
    writer = Writer()
    first = kept(writer, Journal(tmp_path, 1))(0, INITIAL, prompts(0), key(0), 0)[0]
    respond = kept(writer, Journal(tmp_path, 1))
    again, other = (respond(0, INITIAL, prompts(0), key(number), 0)[0] for number in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert len(writer.asked) == 2
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()
    journal = Journal(tmp_path, 1)
    for batches in (1, 2, 3):
        journal.checkpointed(batches)
    assert not list(tmp_path.glob("*.npz"))


def test_a_torn_file_is_not_taken_for_responses(tmp_path: Path) -> None:
    (tmp_path / "0.npz.unfinished").write_bytes(b"PK")
    assert Journal(tmp_path, 1).find(0) is None
