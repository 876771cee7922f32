"""Intervals against literal numbers; the files of a run after crashes; the progress lines of a pipe."""

import importlib.util
import io
import json
import logging
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sea_jax.runtime import metrics
from sea_jax.runtime.files import read_lines
from sea_jax.runtime.metrics import Metrics, MetricsSettings, NotFiniteError, Writer, check_finite
from sea_jax.runtime.progress import Progress
from sea_jax.statistics import over_seeds, win_rate
from tests.support.full_disk import full_disk


def test_wilson_interval_of_8_wins_in_10() -> None:
    interval = win_rate([1.0] * 8 + [0.0] * 2)
    assert (interval.mean, interval.count) == (0.8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_a_tie_counts_half() -> None:
    assert win_rate([1, 0.5, 0.5, 0]) == win_rate(np.array([1, 1, 0, 0]))


@given(wins=st.integers(0, 30), losses=st.integers(0, 30))
def test_wilson_interval_is_that_of_scipy(wins: int, losses: int) -> None:
    if wins + losses == 0:
        return
    interval = win_rate([1.0] * wins + [0.0] * losses)
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1


@pytest.mark.parametrize("wins", [[], [1.0, 0.7], [float("nan")], [[1.0, 0.0]]])
def test_win_rate_refuses(wins: Any) -> None:
    with pytest.raises(ValueError, match=r"wins must"):
        win_rate(wins)


def test_student_interval_over_three_seeds() -> None:
    # t(0.975, 2) = 4.302653, standard deviation 0.1, so 4.302653 * 0.1 / sqrt(3) = 0.248414.
    interval = over_seeds([0.5, 0.6, 0.7])
    assert interval.count == 3
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.6, 0.351586, 0.848414), abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    interval = over_seeds([0.6])
    assert (interval.mean, interval.count) == (0.6, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")]])
def test_over_seeds_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite number per seed"):
        over_seeds(values)


def test_check_finite_says_what_broke_where_and_what_to_do() -> None:
    metrics: Metrics = {
        "train/loss": float("nan"),
        "train/rm/loss_rew": jnp.inf,
        "train/rm/acc_rew": 0.5,
        "note": "nan",
    }
    with pytest.raises(NotFiniteError) as raised:
        check_finite(metrics, 12, "checkpoints/10")
    message = str(raised.value)
    assert "step 12: train/loss is nan, train/rm/loss_rew is inf; the last good checkpoint is checkpoints/10" in message
    assert "lower learning rate" in message
    assert "acc_rew" not in message
    assert "note" not in message
    assert isinstance(raised.value, FloatingPointError)


def test_check_finite_without_a_checkpoint() -> None:
    check_finite({"train/loss": 0.7}, 3, None)
    with pytest.raises(NotFiniteError, match="there is no checkpoint yet"):
        check_finite({"train/loss": -math.inf}, 3, None)


def test_writer_writes_flat_lines_in_the_order_given(tmp_path: Path) -> None:
    with Writer(tmp_path / "run") as writer:
        writer.write(0, {"b": jnp.float32(0.5), "a": np.int64(3), "note": "é"})
        text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        assert text == '{"step": 0, "b": 0.5, "a": 3, "note": "é"}\n'  # on disk before the file is closed
        writer.sample({"step": 0, "response": "one\u2028two\n", "reward": np.float32(0.25)})
    assert read_lines(tmp_path / "run" / "samples.jsonl") == [{"step": 0, "response": "one\u2028two\n", "reward": 0.25}]


@pytest.mark.parametrize("value", [float("nan"), np.inf, [1.0], None, np.zeros(2)])
def test_writer_refuses_what_is_no_number(tmp_path: Path, value: Any) -> None:
    with Writer(tmp_path) as writer:
        with pytest.raises(ValueError, match="train/loss must be a finite number or text"):
            writer.write(1, {"train/loss": value})
        with pytest.raises(ValueError, match="reward must be a finite number or text"):
            writer.sample({"step": 1, "reward": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_writer_refuses_a_step_of_the_callers_own(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        with pytest.raises(ValueError, match='must not hold "step"'):
            writer.write(1, {"step": 2})
        with pytest.raises(ValueError, match="whole number as its step"):
            writer.sample({"reward": 1.0})
    with pytest.raises(ValueError, match="start_step must be 0 or more, found -1"):
        Writer(tmp_path, start_step=-1)


def run_five_steps(workdir: Path, first: int, **options: Any) -> None:
    with Writer(workdir, **options) as writer:
        for step in range(first, 6):
            writer.write(step, {"train/loss": 1.0 / (step + 1)})
            writer.sample({"step": step, "response": "text"})


def test_a_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path) -> None:
    run_five_steps(tmp_path / "unbroken", 0)
    run_five_steps(tmp_path / "resumed", 0)
    run_five_steps(tmp_path / "resumed", 4, start_step=3)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_run_from_step_0_begins_with_empty_files(tmp_path: Path) -> None:
    run_five_steps(tmp_path, 0)
    run_five_steps(tmp_path, 0)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("torn", "kept"),
    [
        (b'{"step": 2, "trai', [1]),
        ('{"step": 2, "note": "é'.encode()[:-1], [1]),  # torn inside a character
        (b'{"step": 2}', [1, 2]),  # only the end of the line is missing
    ],
)
def test_a_torn_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    with caplog.at_level(logging.WARNING), Writer(tmp_path, start_step=5) as writer:
        writer.write(6, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 6]
    assert ("torn" in caplog.text) == (len(kept) == 1)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("damaged", ['{"step":', "3"])
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        Writer(tmp_path, start_step=3)
    assert path.read_text() == content


def test_a_line_without_a_step_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"reward": 1}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl: every line needs a whole number as its step"):
        Writer(tmp_path, start_step=3)


def events(directory: Path) -> Iterator[Event]:
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]


def test_tensorboard_holds_the_numbers_and_purges_on_resume(tmp_path: Path) -> None:
    with Writer(tmp_path, start_step=3) as writer:
        writer.write(4, {"train/loss": 0.25, "note": "text"})
    found = list(events(tmp_path / "tensorboard"))
    restarts = [event.step for event in found if event.session_log.status == SessionLog.START]
    numbers = [(event.step, v.tag, v.simple_value) for event in found for v in event.summary.value]
    assert restarts == [4]
    assert numbers == [(4, "train/loss", 0.25)]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def write_until_full(directory: Path, room: int, text: str) -> None:
    with Writer(directory) as writer, full_disk(room):
        for step in range(200):
            writer.write(step, {"loss": 0.5, "said": text})
            writer.sample({"step": step, "response": text * 2})


@pytest.mark.parametrize(
    ("room", "text", "named"),
    [(0, "", "metrics.jsonl"), (5000, "many words " * 9, "samples.jsonl"), (5000, "", "tensorboard")],
)
def test_a_full_disk_is_one_error_that_names_the_file_and_a_resumed_run_goes_on(
    tmp_path: Path, room: int, text: str, named: str
) -> None:
    with pytest.raises(
        OSError, match=rf"{tmp_path}/{named}: File too large. Make room and start the same command again"
    ):
        write_until_full(tmp_path, room, text)
    with Writer(tmp_path, start_step=3) as writer:
        writer.write(4, {"loss": 0.5})
    steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == (
        [0, 4] if room == 0 else [0, 1, 2, 3, 4]
    )  # what stood in a buffer came through when there was room


NOTED: list[tuple[int, dict[str, float]]] = []


def noting(step: int, numbers: dict[str, float]) -> None:
    NOTED.append((step, numbers))


def test_a_function_of_the_users_is_given_the_numbers_of_every_step(tmp_path: Path) -> None:
    NOTED.clear()
    own = metrics.user_functions(MetricsSettings(writers=(f"{__name__}:noting",)))
    with Writer(tmp_path, tensorboard=False, others=own) as writer:
        writer.write(1, {"loss": np.float32(0.5), "said": "something"})
        writer.write(2, {"loss": 0.25})
    assert NOTED == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(ValueError, match=r"^config.metrics.writers=mine:writer: No module named 'mine'"):
        metrics.user_functions(MetricsSettings(writers=("mine:writer",)))


def test_weights_and_biases_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert metrics.user_functions(MetricsSettings()) == []
    with pytest.raises(ValueError, match=r"^config.metrics.writers=\('wandb',\): wandb is not installed; pip install"):
        metrics.user_functions(MetricsSettings(writers=("wandb",)))


def test_weights_and_biases_is_given_the_numbers_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = metrics.WeightsAndBiases(tmp_path, "tiny-seed0", "0123456789abcdef", {"loss.beta": 0.1})
    with Writer(tmp_path, others=[sink]) as writer:
        writer.write(1, {"train/loss": 0.5, "said": "something"})
        writer.write(2, {"train/loss": 0.25})
        assert sink._run.summary["train/loss"] == 0.25
        assert (sink._run.id, sink._run.config["loss.beta"]) == ("0123456789abcdef", 0.1)
    assert list((tmp_path / "wandb").glob("offline-run-*-0123456789abcdef/*.wandb"))


def test_piped_progress_is_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(20, "step", 2, stream=stream, clock=clock) as progress:
        clock.now_s += 31
        progress.update(3, {"queries": "48/320", "labels": 123456, "loss": 0.693147})
        clock.now_s += 3600
        progress.update(20, {"note": "a\r\x1b[31mb\nc"})
    assert stream.getvalue() == (
        "step 3/20 queries 48/320 labels 123456 loss 0.6931 elapsed 0:31 eta 8:47\n"
        "step 20/20 note a  [31mb c elapsed 1:00:31 eta 0:00\n"
    )


def test_the_remaining_time_counts_neither_the_first_units_compilation_nor_evaluations_as_units() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "query", 20, stream=stream, clock=clock) as progress:
        clock.now_s += 50
        progress.update(20, {}, aside_s=50, important=True)
        clock.now_s += 60  # of which most go to compilation
        progress.update(24, {}, important=True)
        for done, evaluation_s in ((28, 0), (32, 100), (36, 0)):
            clock.now_s += 8 + evaluation_s
            progress.update(done, {}, important=True, aside_s=evaluation_s, aside_left_s=0 if done < 32 else 200)
    etas = [line.split("eta ")[1] for line in stream.getvalue().splitlines()]
    # 60 / 4 * 76 s; then 2 s a query: 144; 136 + 200; 128 + 200
    assert etas == ["?", "19:00", "2:24", "5:36", "5:28"]


def test_piped_progress_is_limited_but_for_important_and_last_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(6, "step", stream=stream, clock=clock) as progress:
        progress.update(0, {})
        for step, important in ((1, False), (2, True), (3, False), (4, False), (5, False), (6, False)):
            clock.now_s += 2
            progress.update(step, {}, important=important)
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["0/6", "2/6", "5/6", "6/6"]
    assert stream.getvalue().startswith("step 0/6 elapsed 0:00 eta ?\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_keeps_important_lines() -> None:
    terminal = Terminal()
    with Progress(20, "step", 2, stream=terminal) as progress:
        progress.update(3, {"queries": "48/320"}, important=True)
    assert "\r" in terminal.getvalue()
    assert "3/20" in terminal.getvalue()
    assert "queries=48/320" in terminal.getvalue()
    assert "step 3/20 queries 48/320" in terminal.getvalue()
