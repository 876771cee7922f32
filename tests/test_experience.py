import json
import os
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sea_jax import experience
from sea_jax.experience import Ledger, LedgerError, Replay

C, B, D = 5, 3, 2

ADD = jax.jit(experience.add)
SAMPLE = jax.jit(experience.sample, static_argnames="batch_size")


def pairs(first: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Pairs whose features and labels tell their number."""
    numbers = jnp.arange(first, first + count, dtype=jnp.float32)
    return numbers[:, None, None] + jnp.array([[0.0, 0.25], [0.5, 0.75]]), numbers / 1024


def filled(capacity: int, count: int) -> Replay:
    """A replay to which the pairs 1 to `count` were added."""
    replay = experience.empty_replay(capacity, D)
    for number in range(1, count + 1):
        replay = ADD(replay, *pairs(number, 1), jnp.array([True]))
    return replay


@given(masks=st.lists(st.tuples(*[st.booleans()] * B), max_size=8))
def test_the_replay_is_a_bounded_queue(masks):
    replay, queue, added = experience.empty_replay(C, D), deque[int](maxlen=C), 0
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
    _, labels, weights = jax.vmap(lambda key: experience.sample(replay, 2, key))(
        jax.random.split(jax.random.key(0), num_batches)
    )
    assert weights.min() == 1
    numbers = np.sort(np.asarray(labels * 1024).astype(int), axis=1)
    counts = np.zeros((7, 7), int)
    np.add.at(counts, tuple(numbers.T), 1)
    assert stats.chisquare(counts[counts > 0]).pvalue > 0.01
    assert (counts > 0).sum() == 15  # every pair of 6


# ---- The ledger


def line(number: int, counted: bool = True) -> dict:
    return {"key": f"0-{number}", "first": f"réponse\n{number}\u2028", "label": 1.0, "counted": counted}


def written(path: Path) -> list[dict]:
    """What stands on disk."""
    return [json.loads(row) for row in path.read_bytes().decode().split("\n")[:-1]]


def test_lines_are_on_disk_before_record_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "queries.jsonl", []

    def fsync(descriptor: int) -> None:
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        synced.append(written(path))

    monkeypatch.setattr(os, "fsync", fsync)
    with Ledger(path) as ledger:
        ledger.record([line(0), line(1)])
        assert synced == [[line(0), line(1)]]
        ledger.record([line(2)])
        assert synced[1:] == [[line(0), line(1), line(2)]]


def test_a_ledger_remembers(tmp_path):
    path = tmp_path / "queries.jsonl"
    with Ledger(path) as ledger:
        assert ledger.find("0-0") is None
        ledger.record([line(0), line(1, counted=False), line(2)])
    with Ledger(path) as ledger:
        assert ledger.find("0-1") == line(1, counted=False)
        assert ledger.find("0-3") is None
        assert ledger.lines() == [line(0), line(1, counted=False), line(2)]
        assert ledger.counted() == 2
        ledger.record([line(3)])
        assert ledger.counted() == 3
    assert written(path) == [line(0), line(1, counted=False), line(2), line(3)]


def test_a_key_is_written_once(tmp_path):
    path = tmp_path / "queries.jsonl"
    with Ledger(path) as ledger:
        ledger.record([line(0)])
        ledger.record([line(0) | {"label": 0.0}, line(1)])
        assert ledger.find("0-0") == line(0)
        assert ledger.counted() == 2
    assert written(path) == [line(0), line(1)]


def test_nothing_new_touches_no_disk(tmp_path, monkeypatch):
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        ledger.record([line(0)])
        monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("synced"))
        ledger.record([line(0)])
        ledger.record([])


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path, caplog):
    whole = "".join(json.dumps(line(i), ensure_ascii=False) + "\n" for i in range(3)).encode()
    start_of_last = whole[:-1].rindex(b"\n") + 1
    for end in range(start_of_last + 1, len(whole)):
        path = tmp_path / f"{end}.jsonl"
        path.write_bytes(whole[:end])
        with Ledger(path) as ledger:
            assert ledger.lines() == [line(0), line(1)]
            ledger.record([line(2)])
        assert path.read_bytes() == whole
    assert "torn last line" in caplog.text


@pytest.mark.parametrize("damage", ["{", "3", "[]", "null", '{"label": 1.0}', "\x00\x00", ""])
def test_a_damaged_line_in_the_middle_stops_the_run(tmp_path, damage):
    path = tmp_path / "queries.jsonl"
    content = "\n".join([json.dumps(line(0)), damage, json.dumps(line(1)), ""])
    path.write_text(content)
    with pytest.raises(LedgerError, match=rf"{path}, line 2 is not a ledger line.*repair the line or restore"):
        Ledger(path)
    assert path.read_text() == content


def test_a_full_disk_is_not_swallowed(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        with pytest.raises(OSError, match="No space left"):
            ledger.record([line(0)])
        assert ledger.find("0-0") is None
        assert ledger.counted() == 0
