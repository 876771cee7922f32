"""People as an oracle: what goes together, and that nothing they said is lost when the page is killed."""

import random
import threading
import time

import jax
import numpy as np
import pytest

from configs import people as configured
from configs import tiny_random
from sea_jax import config as configuration
from sea_jax.oracles.people import People, PeopleSettings
from tests.support import people

FAULTS = [
    ({"oracle.label": "soft"}, "config.oracle.label=soft: what people say is the label"),
    ({"oracle.flip_probability": 0.1}, "config.oracle.flip_probability=0.1: oracle.kind=people needs 0"),
    ({"people.names": ("a", "b"), "people.redundancy": 3}, "config.people.redundancy=3: config.people.names has 2"),
    ({"people.names": ("a", "a")}, r"config.people.names=\('a', 'a'\): must be different names"),
    ({"people.tls_key": __file__}, "config.people.tls_certificate='': https needs both"),
    ({"people.guidelines": "/no/such.md"}, "config.people.guidelines=/no/such.md: there is no such file"),
    ({"people.slightly": 0.4}, "config.people.slightly=0.4: must be 0, or a number between 0.5 and 1"),
    ({"eval.judge.kind": "people"}, "config.eval.judge.kind='people': must be"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_what_cannot_work_is_refused_before_anything_is_loaded(changes, said):
    config = tiny_random.get_config()
    config.oracle.kind = "people"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=said):
        configuration.resolve(config)


def test_people_are_not_asked_about_held_out_prompts():
    settings = configuration.resolve(configured.get_config())
    assert settings.oracle.kind == "people"
    assert not settings.eval.oracle
    assert settings.eval.judge.kind == "embedding"
    assert settings.max_queries == 64


def test_a_page_that_is_killed_again_and_again_loses_nothing_and_asks_nobody_twice(tmp_path):
    """The learner goes on asking, people go on clicking; what both have is the same in the end."""
    draw = random.Random(0)
    workdir = tmp_path / "run"
    workdir.mkdir()
    oracle = People(PeopleSettings(names=("anna", "ben"), port=0, undo_s=0.0))
    texts = [(f"prompt {i}", "e" * (i % 4), "e" * (i % 3)) for i in range(48)]
    over = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        while not over.wait(draw.uniform(0.2, 1.0)) and kills < 8:
            process = oracle._page._process if oracle._page else None
            if process is not None and process.poll() is None:
                process.kill()
                kills += 1

    labels: dict[int, float] = {}
    with (
        oracle.open(workdir, 48, lambda: False),
        people.working(workdir, people.prefers_many_es, "anna", "ben") as said,
    ):
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        for start in range(0, len(texts), 6):
            rows = list(range(start, start + 6))
            while kills < min(8, start // 6 + 1) and not over.is_set():
                time.sleep(0.05)
            prompts, first, second = zip(*(texts[row] for row in rows), strict=True)
            swapped = np.array([row % 2 == 1 for row in rows])
            keys = jax.random.split(jax.random.key(start), 6)
            for judgement in oracle(prompts, first, second, swapped, keys, [f"run/{row}" for row in rows]):
                labels |= {rows[row]: label for row, label in zip(judgement.rows, judgement.label, strict=True)}
        over.set()
        killer.join()
        again = oracle.collect([f"run/{row}" for row in range(48)])  # as one that was killed before it wrote them down
    assert kills == 8
    wanted = {row: 1.0 if len(a) > len(b) else 0.0 if len(b) > len(a) else 0.5 for row, (_, a, b) in enumerate(texts)}
    assert labels == wanted
    assert dict(zip(again.rows.tolist(), again.label.tolist(), strict=True)) == wanted
    clicks = [number for clicked in said.values() for number, _ in clicked]
    assert len(clicks) == len(set(clicks))
    assert min(map(len, said.values())) > 0


def test_a_run_that_is_told_to_stop_does_not_wait_for_people(tmp_path):
    oracle = People(PeopleSettings(port=0))
    with oracle.open(tmp_path, 1, lambda: True), pytest.raises(SystemExit) as stopped:
        list(oracle(["p"], ["a"], ["b"], np.array([False]), jax.random.split(jax.random.key(0), 1), ["run/0"]))
    assert stopped.value.code == 130
