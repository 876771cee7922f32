import json
import os
import stat
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sea_jax.oracles.ledger import Ledger, LedgerError
from sea_jax.replay import Replay, add_pairs, empty_replay, resized, sample_pairs
from tests.support.full_disk import full_disk

C, B, D = 5, 3, 2

ADD = jax.jit(add_pairs)
SAMPLE = jax.jit(sample_pairs, static_argnames="batch_size")


def pairs(first: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Pairs whose features and labels tell their number."""
    numbers = jnp.arange(first, first + count, dtype=jnp.float32)
    return numbers[:, None, None] + jnp.array([[0.0, 0.25], [0.5, 0.75]]), numbers / 1024


def filled(capacity: int, count: int) -> Replay:
    """A replay to which the pairs 1 to `count` were added."""
    replay = empty_replay(capacity, D)
    for number in range(1, count + 1):
        replay = ADD(replay, *pairs(number, 1), jnp.array([True]))
    return replay


@given(masks=st.lists(st.tuples(*[st.booleans()] * B), max_size=8))
def test_the_replay_is_a_bounded_queue(masks):
    replay, queue, added = empty_replay(C, D), deque[int](maxlen=C), 0
    for index, kept in enumerate(masks):
        first = 1 + index * B
        replay = ADD(replay, *pairs(first, B), jnp.array(kept))
        queue.extend(first + row for row in range(B) if kept[row])
        added += sum(kept)
    assert int(replay.added) == added
    # Pair i stands in slot i % C, so the slots read from the oldest on are the queue.
    slots = [(added + i) % C for i in range(C)] if added > C else range(added)
    expected = [pairs(number, 1) for number in queue]
    assert len(slots) == len(expected)
    for slot, (features, labels) in zip(slots, expected, strict=True):
        np.testing.assert_array_equal(replay.features[slot], features[0])
        assert replay.labels[slot] == labels[0]


@pytest.mark.parametrize(("added", "batch_size"), [(3, 4), (5, 4), (12, 4), (12, 5), (12, 8), (0, 4)])
def test_a_batch_is_drawn_without_replacement_from_what_is_held(added, batch_size):
    replay = filled(C, added)
    held = set(range(max(1, added - C + 1), added + 1))
    for seed in range(5):
        features, labels, weights = SAMPLE(replay, batch_size, jax.random.key(seed))
        size = min(batch_size, C)
        assert (features.shape, labels.shape, weights.shape) == ((size, 2, D), (size,), (size,))
        assert set(np.asarray(weights)) <= {0.0, 1.0}
        drawn = [round(float(label) * 1024) for label, weight in zip(labels, weights, strict=True) if weight]
        assert len(drawn) == len(set(drawn)) == min(size, len(held))
        assert set(drawn) <= held
        for row, number in enumerate(drawn):
            np.testing.assert_array_equal(features[row], pairs(number, 1)[0][0])


def test_a_batch_is_drawn_uniformly():
    replay, num_batches = filled(8, 6), 2000
    _, labels, weights = jax.vmap(lambda key: sample_pairs(replay, 2, key))(
        jax.random.split(jax.random.key(0), num_batches)
    )
    assert weights.min() == 1
    numbers = np.sort(np.asarray(labels * 1024).astype(int), axis=1)
    counts = np.zeros((7, 7), int)
    np.add.at(counts, tuple(numbers.T), 1)
    assert stats.chisquare(counts[counts > 0]).pvalue > 0.01
    assert (counts > 0).sum() == 15  # every pair of 6


@pytest.mark.parametrize(("count", "capacity"), [(0, 8), (3, 8), (5, 8), (13, 8), (3, 4), (5, 4), (13, 4), (13, 5)])
def test_a_replay_of_another_capacity_holds_the_newest_pairs_and_goes_on_in_their_order(count, capacity):
    found = resized(filled(C, count), capacity)
    kept = list(range(max(1, count - min(C, capacity) + 1), count + 1))
    by_slot = {(number - 1) % capacity: pairs(number, 1) for number in kept}
    assert int(found.added) == count
    for slot in range(capacity):
        features, labels = by_slot.get(slot, (jnp.zeros((1, 2, D)), jnp.zeros(1)))
        np.testing.assert_array_equal(found.features[slot], features[0])
        assert found.labels[slot] == labels[0]


# ---- The ledger


def ask(number: int) -> dict:
    return {"key": f"0-{number}", "first": f"réponse\n{number}\u2028", "digest": f"{number:04x}"}


def answer(number: int, counted: bool = True) -> dict:
    """What an ask becomes when it is labelled."""
    return ask(number) | {"label": number / 4, "counted": counted}


def asked_line(number: int) -> dict:
    return {"event": "ask"} | ask(number)


def label_line(number: int) -> dict:
    """The line of an answer whose ask stands in the ledger."""
    return {"event": "label", "key": f"0-{number}", "label": number / 4, "counted": True}


def written(path: Path) -> list[dict]:
    """What stands on disk."""
    return [json.loads(row) for row in path.read_bytes().decode().split("\n")[:-1]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "queries.jsonl"


def test_lines_are_on_disk_before_ask_and_record_return(path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        synced.append(written(path))

    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "fsync", fsync)
        ledger.ask([ask(0), ask(1)])
        assert synced == [[asked_line(0), asked_line(1)]]
        ledger.record([answer(0), answer(2, counted=False), answer(1)])
        erm = {"event": "label"} | answer(2, counted=False)
        assert synced[1:] == [[asked_line(0), asked_line(1), label_line(0), erm, label_line(1)]]


def test_a_new_file_s_name_is_on_disk_before_anything_is_written(path, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append(sorted(os.listdir(descriptor)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    with Ledger(path):
        assert synced == [["queries.jsonl", "run_id"]]


def test_what_a_killed_run_wrote_but_did_not_sync_is_synced_before_it_is_used(path, monkeypatch):
    with Ledger(path) as ledger:
        ledger.record([answer(0)])
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with Ledger(path):
        assert path.stat().st_ino in synced


def test_a_ledger_remembers(path):
    with Ledger(path) as ledger:
        assert ledger.asked("0-0") is None
        assert ledger.find("0-0") is None
        ledger.ask([ask(0), ask(2), ask(3)])
        ledger.record([answer(0), answer(1, counted=False), answer(2)])
    for _ in range(2):
        with Ledger(path) as ledger:
            assert ledger.find("0-0") == answer(0)
            assert ledger.find("0-1") == answer(1, counted=False)
            assert (ledger.asked("0-3"), ledger.find("0-3")) == (ask(3), None)
            assert ledger.lines() == [answer(0), answer(1, counted=False), answer(2)]
            assert ledger.counted() == 2
    with Ledger(path) as ledger:
        ledger.record([answer(3)])
        assert ledger.counted() == 3
    assert written(path)[-1] == label_line(3)


def test_a_key_is_written_once(path):
    for _ in range(2):
        with Ledger(path) as ledger:
            ledger.ask([ask(0)])
            ledger.ask([ask(0) | {"first": "another"}, ask(1)])
            ledger.record([answer(0)])
            ledger.record([answer(0) | {"label": 1.0}, answer(1)])
            assert ledger.lines() == [answer(0), answer(1)]
    assert written(path) == [asked_line(0), asked_line(1), label_line(0), label_line(1)]


def test_nothing_new_touches_no_disk(path, monkeypatch):
    with Ledger(path) as ledger:
        ledger.record([answer(0)])
        monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("synced"))
        ledger.record([answer(0)])
        ledger.record([])
        ledger.ask([])


def test_a_ledger_that_does_not_write_holds_the_same_lines_and_leaves_the_disk_alone(tmp_path, path):
    with Ledger(tmp_path / "none" / "queries.jsonl", writes=False) as beside:
        beside.ask([ask(0)])
        beside.record([answer(0)])
        assert (beside.asked("0-0"), beside.lines()) == (ask(0), [answer(0)])
    assert not list(tmp_path.iterdir())
    with Ledger(path) as ledger:
        ledger.record([answer(0)])
    content = path.read_bytes() + b'{"event": "la'  # of a line that is being written
    path.write_bytes(content)
    with Ledger(path, writes=False) as beside:
        beside.record([answer(1)])
        assert beside.lines() == [answer(0), answer(1)]
    assert path.read_bytes() == content


def test_two_runs_never_write_one_ledger(path):
    with Ledger(path), pytest.raises(OSError, match=r"another run is writing this ledger.*--workdir"):
        Ledger(path)
    Ledger(path).record([{"key": "0-0", "digest": "d", "label": 1.0, "counted": True}])


def test_a_run_keeps_its_own_name(tmp_path):
    names = []
    for directory in ("one", "one", "two"):
        (tmp_path / directory).mkdir(exist_ok=True)
        with Ledger(tmp_path / directory / "queries.jsonl") as ledger:
            names.append(ledger.run_id)
            ledger.ask([ask(len(names))])
    assert names[0] == names[1] != names[2]
    assert len(names[0]) >= 16
    (tmp_path / "one" / "run_id").unlink()
    with pytest.raises(LedgerError, match=r"run_id is missing: .* under other names; restore the file"):
        Ledger(tmp_path / "one" / "queries.jsonl")


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path, caplog):
    with Ledger(tmp_path / "whole.jsonl") as ledger:
        ledger.ask([ask(0), ask(1)])
        ledger.record([answer(0), answer(1)])
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for end in set(range(ends[0] + 1, len(whole))) - set(ends):
        path = tmp_path / f"{end}.jsonl"
        path.write_bytes(whole[:end])
        caplog.clear()
        with Ledger(path) as ledger:
            assert len(ledger.lines()) == sum(end > ends[row] for row in (2, 3))
            assert (ledger.asked("0-1") is None) == (end < ends[1])
            ledger.ask([ask(0), ask(1)])
            ledger.record([answer(0), answer(1)])
        assert path.read_bytes() == whole
        assert "torn last line" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        *("{", "3", "[]", "null", "\x00\x00", ""),
        *('{"event": "label", "label": 1.0}', '{"event": "label", "key": "7", "label": 1.0, "counted": true}'),
        *('{"event": "guess", "key": "7"}', '{"key": "7", "digest": "00", "label": 1.0, "counted": true}'),
    ],
)
@pytest.mark.parametrize("behind", [json.dumps(asked_line(1)) + "\n", ""])
def test_a_damaged_line_stops_the_run(path, damage, behind):
    content = json.dumps(asked_line(0)) + "\n" + damage + "\n" + behind
    path.write_text(content)
    (path.parent / "run_id").write_text("ab")
    with pytest.raises(LedgerError, match=rf"{path}, line 2 is not a ledger line.*repair the line or restore"):
        Ledger(path)
    assert path.read_text() == content


@pytest.mark.parametrize("room", [0, 1, 30, 100])
def test_a_write_that_is_cut_short_leaves_file_and_memory_as_they_were(path, room):
    with Ledger(path) as ledger:
        ledger.ask([ask(0)])
        before = path.read_bytes()
        for write in (lambda: ledger.record([answer(0), answer(1)]), lambda: ledger.ask([ask(1), ask(2)])):
            with full_disk(len(before) + room), pytest.raises(OSError, match=rf"{path}: File too large; nothing was"):
                write()
            assert path.read_bytes() == before
        assert (ledger.lines(), ledger.counted(), ledger.asked("0-1")) == ([], 0, None)
        ledger.record([answer(0)])
    assert written(path) == [asked_line(0), label_line(0)]


def test_a_disk_that_does_not_sync_is_not_swallowed(path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=rf"{path}: No space left on device; nothing was asked or learnt"):
            ledger.record([answer(0)])
        assert ledger.find("0-0") is None
        assert ledger.counted() == 0
    assert not path.read_bytes()
