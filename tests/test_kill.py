"""A run that is killed, interrupted or runs out of disk, with an oracle that bills: nothing is lost and nothing paid twice."""

import contextlib
import http.server
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs import tiny_random

ROOT = Path(__file__).parent.parent
POLL_S = 0.001
LIMIT_S = 600.0


@dataclass
class Service:
    """An oracle that answers over HTTP and bills: an ask whose key it knows is answered from its record, free of charge.

    Attributes:
      record: key -> what was asked and what was answered.
      asked: how often each key was sent.
      calls: batches that came in.
      before: called with the number of a batch before anything of it is answered or billed.
      after: called when the batch is billed and the answer not yet sent.
    """

    record: dict[str, tuple[tuple[str, ...], float]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    before: Callable[[int], None] = lambda number: None
    after: Callable[[int], None] = lambda number: None
    url: str = ""

    def answer(self, prompts: list[str], first: list[str], second: list[str], keys: list[str]) -> list[float]:
        self.calls += 1
        self.before(self.calls)
        self.asked.update(keys)
        for key, *pair in zip(keys, prompts, first, second, strict=True):
            new = (tuple(pair), float(tiny_random.prefers_many_es(*([text] for text in pair))[0]))
            assert self.record.setdefault(key, new) == new, f"{key} came again with another pair"
        self.after(self.calls)
        return [self.record[key][1] for key in keys]


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    own = Service()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                answer = json.dumps(own.answer(**body)).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)
            except OSError:
                pass  # who asked is dead

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        own.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield own
        server.shutdown()


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as own:
        yield own


@dataclass(frozen=True)
class Started:
    """A run in a process of its own.

    Attributes:
      process: the process.
      workdir: its work directory.
      told: where it tells its phases.
      output: where it says things.
      since: when it was started, in seconds of the file system's clock.
    """

    process: subprocess.Popen[bytes]
    workdir: Path
    told: Path
    output: Path
    since: float

    def phase(self) -> tuple[int, str]:
        """How many phases have begun, and which is the last."""
        words = self.told.read_text().split()
        whole = words[-1:] == ["."]  # else it is being written
        return (int(words[0]), " ".join(words[1:-1])) if whole else (0, "start")

    def saves(self) -> list[str]:
        """Its saves that have begun and are not whole."""
        found = []
        for path in (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"):
            with contextlib.suppress(FileNotFoundError):  # it has become whole
                if path.stat().st_mtime > self.since:  # else it was begun by a run that was killed
                    found.append(path.name)
        return found

    def finish(self) -> tuple[int, str]:
        """Waits for the end; returns the exit status and what was said."""
        return self.process.wait(timeout=LIMIT_S), self.output.read_text()


def start(workdir: Path, service: Service, *flags: str) -> Started:
    told, output = workdir.with_name(f"{workdir.name}.phase"), workdir.with_name(f"{workdir.name}.output")
    told.write_text("")
    since = told.stat().st_mtime
    environment = os.environ | {
        "BILLED_RUN_SERVICE": service.url,
        "BILLED_RUN_PHASE": str(told),
        "JAX_PLATFORMS": "cpu",
        "USE_TORCH": "0",
        "PYTHONDONTWRITEBYTECODE": "",  # the next start finds its modules compiled
    }
    command = [
        sys.executable,
        "-m",
        "tests.programs.billed_run",
        "--config=tests/programs/billed_run.py",
        f"--workdir={workdir}",
        *flags,
    ]
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return Started(process, workdir, told, output, since)


def run(workdir: Path, service: Service) -> None:
    status, output = start(workdir, service).finish()
    assert status == 0, output


def outcome(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock said."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_time")} for line in lines]


def ledger(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "queries.jsonl").read_bytes().split(b"\n")[:-1]]


def assert_bill_is_the_ledger(workdir: Path, service: Service) -> None:
    run_id = (workdir / "run_id").read_text()
    lines = ledger(workdir)
    paid = {f"{run_id}/{line['key']}": line["probability"] for line in lines if line.get("counted")}
    swapped = {f"{run_id}/{line['key']}": line["swapped"] for line in lines if line["event"] == "ask"}
    shown = {key: probability for key, (_, probability) in service.record.items()}
    assert {key: 1 - answer if swapped[key] else answer for key, answer in shown.items()} == paid
    assert 0 < sum(swapped.values()) < 96
    assert len(paid) == 96


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    assert outcome(workdir) == outcome(undisturbed)
    for name in ("queries.jsonl", "samples.jsonl", "evaluations.jsonl"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that nothing happened to; what was compiled for it serves all others."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with serving() as own:
        run(workdir, own)
    assert_bill_is_the_ledger(workdir, own)
    assert max(own.asked.values()) == 1
    return workdir


# ---- SIGKILL

Strike = Callable[[Started, Service, int, float], None]  # the n-th of what to wait for, and seconds to let pass then


def at_phase(*names: str) -> Strike:
    """Kills in the n-th phase of these names."""

    def strike(started: Started, service: Service, number: int, delay_s: float) -> None:
        seen: set[int] = set()
        while started.process.poll() is None:
            count, name = started.phase()
            if name in names:
                seen.add(count)
            if len(seen) == number:
                time.sleep(delay_s)
                started.process.kill()
                return
            time.sleep(POLL_S)

    return strike


def at_answer(moment: str) -> Strike:
    """Kills when the n-th batch has come in at the service: before it is answered, or when only the answer is to be sent."""

    def strike(started: Started, service: Service, number: int, delay_s: float) -> None:
        first = service.calls

        def kill(call: int) -> None:
            if call == first + number:
                started.process.kill()
                started.process.wait()
                raise ConnectionAbortedError

        setattr(service, moment, kill)
        started.process.wait(LIMIT_S)
        setattr(service, moment, lambda call: None)

    return strike


def at_save(started: Started, service: Service, number: int, delay_s: float) -> None:
    """Kills in the n-th save."""
    seen: set[str] = set()
    while started.process.poll() is None:
        seen |= set(started.saves())
        if len(seen) == number:
            time.sleep(delay_s)
            started.process.kill()
            return
        time.sleep(POLL_S)


def at_any_time(started: Started, service: Service, number: int, delay_s: float) -> None:
    """Kills so many seconds after the start."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.process.wait(3000 * delay_s)
    started.process.kill()


GENERATING = ("actor/generate_time", "plan/generate_time")
LEARNING = ("train/learn_time", "train/rm/learn_time", "plan/learn_time")
STRIKES = [
    *[at_phase(*GENERATING)] * 5,
    *[at_answer("before")] * 3,
    *[at_answer("after")] * 4,
    *[at_phase(*LEARNING)] * 2,
    *[at_save] * 3,
    *[at_any_time] * 3,
]


def doing(killed: Started) -> set[str]:
    """What a run was doing when it was killed; it saves in the background."""
    lines = ledger(killed.workdir) if (killed.workdir / "queries.jsonl").exists() else []
    labelled = {line["key"] for line in lines if line["event"] == "label"}
    _, name = killed.phase()
    if name == "actor/oracle_time" and any(line["key"] not in labelled for line in lines):
        name = "between ask and label"
    name = "generation" if name in GENERATING else "learning" if name in LEARNING else name
    return {name, "save"} if killed.saves() else {name}


@pytest.mark.slow
def test_a_run_that_is_killed_at_20_instants_ends_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path, service: Service, record_property: Callable[[str, object], None]
) -> None:
    draw, workdir = random.Random(0), tmp_path / "run"
    strikes = draw.sample(STRIKES, len(STRIKES))
    hits: Counter[str] = Counter()
    for strike in strikes:
        started = start(workdir, service)
        strike(started, service, draw.randint(1, 3), draw.uniform(0, 0.003))
        status, output = started.finish()
        assert status == -signal.SIGKILL, output
        hits.update(doing(started))
    asked_again = sum(count - 1 for count in service.asked.values())
    run(workdir, service)
    record_property("hits", dict(hits))
    print(f"killed {len(strikes)} times: {dict(hits)}; {asked_again} asks were sent again")
    assert_same_run(workdir, undisturbed)
    assert_bill_is_the_ledger(workdir, service)
    assert len(strikes) == 20
    assert min(hits["generation"], hits["between ask and label"], hits["save"]) > 0
    assert asked_again > 0


# ---- SIGTERM, a service that fails, a full disk


@pytest.mark.slow
def test_sigterm_saves_and_says_so_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, service: Service
) -> None:
    started = start(tmp_path / "run", service)
    service.before = lambda number: started.process.terminate() if number == 5 else None
    status, output = started.finish()
    assert status == 130
    assert "stopped at step 5 and saved; the same command goes on from there" in output
    assert "Traceback" not in output
    run(tmp_path / "run", service)
    assert_same_run(tmp_path / "run", undisturbed)
    assert_bill_is_the_ledger(tmp_path / "run", service)
    assert max(service.asked.values()) == 1


@pytest.mark.slow
def test_a_service_that_is_gone_stops_the_run_with_one_error_and_is_asked_under_the_same_keys(
    undisturbed: Path, tmp_path: Path, service: Service
) -> None:
    def gone(number: int) -> None:
        if number == 5:
            raise ConnectionAbortedError

    service.after = gone  # billed, but the answer is lost on the way
    status, output = start(tmp_path / "run", service, "--config.oracle.retries=0").finish()
    assert status == 1
    assert_one_error(
        output,
        r"error: the oracle did not answer: config.oracle.kind=tests.programs.billed_run:billed failed with RemoteDisc.* "
        r"pairs, stands in .*queries.jsonl: start the same",
    )
    run(tmp_path / "run", service)
    assert_same_run(tmp_path / "run", undisturbed)
    assert_bill_is_the_ledger(tmp_path / "run", service)
    assert max(service.asked.values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("file", ["queries.jsonl", "checkpoints", "responses"])
def test_a_full_disk_stops_the_run_with_one_error_and_an_intact_last_checkpoint(
    file: str, undisturbed: Path, tmp_path: Path, service: Service
) -> None:
    workdir = tmp_path / "run"

    def fill(number: int) -> None:
        if number == 7:  # the asks are written, the labels are not
            while started.saves():
                time.sleep(POLL_S)
            room = {"queries.jsonl": (workdir / "queries.jsonl").stat().st_size + 50, "responses": 20_000}.get(
                file, 60_000
            )
            resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (room, room))

    started = start(workdir, service)
    service.after = fill
    status, output = started.finish()
    assert status == 1
    assert_one_error(output, rf"error: {workdir}/{file}\S*: .*File too large.* start the same command again")
    service.after = lambda number: None
    run(workdir, service)
    assert "going on from the checkpoint of step 6" in (tmp_path / "run.output").read_text()
    assert_same_run(workdir, undisturbed)
    assert_bill_is_the_ledger(workdir, service)


def assert_one_error(output: str, message: str) -> None:
    assert len(re.findall(message, output)) == 1, output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output, output
