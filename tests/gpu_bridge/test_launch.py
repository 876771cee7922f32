"""Who runs where and when, and that nothing is left behind; the servers are stand-ins that write a URL and wait."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_bridge import launch, protocol
from sea_jax import config

ROOT = Path(__file__).parents[2]
STAND_IN = """#!{python}
import os, pathlib, sys, time
url = next(pathlib.Path(a.split("=", 1)[1]) for a in sys.argv if a.startswith("--url_file="))
url.with_suffix(".pid").write_text(str(os.getpid()))
url.with_suffix(".token").write_text(os.environ["{variable}"])
if {fails}: sys.exit("no engine here")
url.write_text("http://127.0.0.1:1\\n")
time.sleep(600)
"""
LATER_READY = """#!{python}
import json, os, pathlib, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
begin = time.monotonic()  # of one that is ready as soon as there are two of its kind
url = next(pathlib.Path(a.split("=", 1)[1]) for a in sys.argv if a.startswith("--url_file="))
kind, token = url.name.split("-")[0], os.environ["{variable}"]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        passed, both = time.monotonic() - begin, len(list(url.parent.glob(kind + "-*.url"))) == 2
        ready = (0.3 < passed and both or 10 < passed) and self.headers["Authorization"] == "Bearer " + token
        if ready and not url.with_suffix(".json").exists():
            told = {{"argv": sys.argv[3:], "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}}
            url.with_suffix(".json").write_text(json.dumps({{**told, "begin": begin, "ready": time.monotonic()}}))
        self.send_response(200 if ready else 503)
        self.end_headers()
        health = {{"status": "ready" if ready else "starting", "kind": kind, "model": "m"}}
        self.wfile.write(json.dumps({{**health, "version": "initial", "started": "1"}}).encode())
server = HTTPServer(("127.0.0.1", 0), Handler)
url.write_text(f"http://127.0.0.1:{{server.server_port}}\\n")
server.serve_forever()
"""


def flags(directory: Path, *, fails: bool = False, source: str = STAND_IN, gpus: int = 0) -> argparse.Namespace:
    stand_in = directory / "python"
    stand_in.write_text(source.format(python=sys.executable, variable=protocol.TOKEN_VARIABLE, fails=fails))
    stand_in.chmod(0o755)
    return argparse.Namespace(
        **{"layout": "all", "gpus": gpus, "shares": None, "policy": directory / "p", "oracle": directory / "o"},
        **{"bridge_python": stand_in, "log_dir": directory / "logs"},
        **{"server_flag": ["--max_num_seqs=8"], "policy_flag": ["--threads=3"], "oracle_flag": ["--backend=mosec"]},
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_on_every_gpu_or_half_for_the_learner() -> None:
    everywhere = launch.plan("all", 2, (0.3, 0.25, 0.4), oracle=True)
    assert [(place.kind, place.gpu, place.memory_fraction) for place in everywhere.servers] == [
        ("policy", 0, 0.3),
        ("policy", 1, 0.3),
        ("oracle", 0, 0.25),
        ("oracle", 1, 0.25),
    ]
    assert everywhere.learner_gpus == (0, 1)
    half = launch.plan("half", 8, (0.5, 0.4, 0.9), oracle=True)
    assert {place.gpu for place in half.servers} == {0, 1, 2, 3}
    assert half.learner_gpus == (4, 5, 6, 7)
    on_cpu = launch.plan("all", 0, (0.3, 0.25, 0.4), oracle=False)
    assert [(place.kind, place.gpu) for place in on_cpu.servers] == [("policy", None)]
    assert on_cpu.learner_gpus == ()


@pytest.mark.parametrize(
    ("layout", "gpus", "shares", "message"),
    [
        ("half", 3, (0.5, 0.4, 0.9), "--gpus=3.*even number"),
        ("all", 8, (0.5, 0.4, 0.4), "--shares=0.5,0.4,0.4.*1.30 of it"),
        ("half", 8, (0.7, 0.4, 0.9), "--shares=0.7,0.4,0.9.*1.10 of it"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout: str, gpus: int, shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.plan(layout, gpus, shares, oracle=True)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ("0", "1")), ("4,5,6,7", ("4", "5")), ("GPU-aa, GPU-bb", ("GPU-aa", "GPU-bb")), ("7,5,-1,3", ("7", "5"))],
)
def test_only_gpus_that_were_inherited_are_used(visible: str | None, names: tuple[str, ...]) -> None:
    assert launch.visible_gpus(2, visible) == names


@pytest.mark.parametrize(("visible", "found"), [("4,5", 2), ("4,5,-1,6", 2), ("", 0), ("-1", 0)])
def test_more_gpus_than_were_inherited_are_refused(visible: str, found: int) -> None:
    with pytest.raises(ValueError, match=f"--gpus=3: CUDA_VISIBLE_DEVICES={visible} allows {found}; "):
        launch.visible_gpus(3, visible)


@pytest.mark.parametrize(("positions", "length"), [(131072, 2048), (512, 512)])
def test_an_oracle_on_a_gpu_reads_what_the_learner_sends_and_no_more_than_its_model_can(
    tmp_path: Path, positions: int, length: int
) -> None:
    assert config.default().oracle.max_tokens == launch.ORACLE_TOKENS
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    place = launch.Place(protocol.ORACLE, 0, 0, 0.25)
    assert launch.default_flags(place, tmp_path) == ["--dtype=bfloat16", f"--max_model_len={length}"]


def test_servers_of_one_gpu_start_in_turn_those_of_others_meanwhile_and_the_learner_behind_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7,6")
    (tmp_path / "o").mkdir()
    (tmp_path / "o/config.json").write_text("{}")
    wrote = tmp_path / "learner"
    script = f"import os, time; open({str(wrote)!r}, 'w').write(f'{{time.monotonic()}} ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(launch, "learner_command", lambda *_: [sys.executable, "-c", script])
    assert launch.launch(flags(tmp_path, source=LATER_READY, gpus=2), []) == 0
    told = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("logs/*/*.json")}
    assert {name: one["gpus"] for name, one in told.items()} == {
        **{"policy-0": "5", "oracle-0": "5", "policy-1": "GPU-7", "oracle-1": "GPU-7"}
    }
    for gpu in (0, 1):
        assert told[f"policy-{gpu}"]["ready"] < told[f"oracle-{gpu}"]["begin"]
        assert told[f"policy-{gpu}"]["begin"] < told[f"policy-{1 - gpu}"]["ready"]
        assert told[f"policy-{gpu}"]["argv"][-2:] == ["--max_num_seqs=8", "--threads=3"]
        assert told[f"oracle-{gpu}"]["argv"][-4:] == [
            *("--dtype=bfloat16", "--max_model_len=2048", "--max_num_seqs=8", "--backend=mosec")
        ]
    began, seen = wrote.read_text().split()
    assert float(began) > max(one["ready"] for one in told.values())
    assert seen == "5,GPU-7"


def test_the_learner_is_told_who_writes_and_who_labels() -> None:
    urls = {"policy": ["http://a:1", "http://b:2"], "oracle": ["http://c:3"]}
    command = launch.learner_command(["--config=x.py"], urls, Path("/rm"))
    assert command[1:4] == ["-m", "sea_jax.train", "--config=x.py"]
    assert set(command[4:]) == {
        "--config.actor.kind=bridge",
        "--config.actor.urls=http://a:1,http://b:2",
        "--config.oracle.kind=remote",
        "--config.oracle.urls=http://c:3",
        "--config.oracle.reward_model=/rm",
    }


def test_when_the_learner_ends_its_status_is_returned_and_the_servers_are_gone(tmp_path: Path) -> None:
    assert launch.launch(flags(tmp_path), ["--config=configs/nowhere.py"]) == 1
    pids = [int(file.read_text()) for file in tmp_path.glob("logs/*/*.pid")]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    assert len({file.read_text() for file in tmp_path.glob("logs/*/*.token")}) == 1


def test_a_server_that_does_not_start_is_one_error_that_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy-0 ended with status 1; .*policy-0.log says why"):
        launch.launch(flags(tmp_path, fails=True), [])
    assert "no engine here" in next(tmp_path.glob("logs/*/policy-0.log")).read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGUSR1, 130)])
def test_servers_end_even_when_the_launcher_is_killed_and_when_it_is_told_to_save(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    given = flags(tmp_path)
    command = [sys.executable, "-m", "gpu_bridge.launch", "--policy=p", "--gpus=0", f"--log_dir={given.log_dir}"]
    command += [f"--bridge_python={given.bridge_python}", "--", "--config=configs/nowhere.py"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not (pids := list(tmp_path.glob("logs/*/*.pid"))) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == status
    pid = int(pids[0].read_text())
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
