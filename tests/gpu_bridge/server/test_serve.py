"""The servers' command line, where the token comes from, and when they end."""

import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from safetensors.numpy import save_file

from gpu_bridge import protocol
from gpu_bridge.server import serve
from tests.gpu_bridge.server.test_gateway import ASKED, WEIGHTS

TOKEN = "a-token-for-tests"
# A server whose engine dies at the first request and cannot be started again.
MORTAL = """
import asyncio, sys
from gpu_bridge.server import serve
from gpu_bridge.server.backend import EngineFailed
from tests.gpu_bridge.server.test_gateway import Engine

class Mortal(Engine):
    async def start(self):
        engines.append(self)
        if len(engines) > 1:
            raise OSError(28, "No space left on device")

    async def generate(self, request):
        self.death.set_result("it was ended by signal 9")
        while len(engines) < 2 or not engines[1].stopped:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # the server is ending by now
        raise EngineFailed("it is gone")

engines = []
flags, extra = serve.parse(serve.parser("policy", "Serves.", "bfloat16"), sys.argv[1:])
sys.exit(serve.run("policy", flags, extra, lambda config, progress: Mortal(), "json"))
"""


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(protocol.TOKEN_VARIABLE, raising=False)


def test_a_token_is_drawn_once_and_kept_from_others(tmp_path, capsys):
    drawn = serve.find_token(None, tmp_path / "logs", "policy")
    file = tmp_path / "logs/policy.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(drawn) >= 32
    assert serve.find_token(None, tmp_path / "logs", "policy") == drawn
    shown = capsys.readouterr().out
    assert str(file) in shown
    assert drawn not in shown
    assert serve.find_token(None, tmp_path / "logs", "oracle") != drawn


def test_the_environment_and_the_file_must_agree(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert serve.find_token(file, tmp_path, "policy") == TOKEN
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, TOKEN)
    assert serve.find_token(file, tmp_path, "policy") == serve.find_token(None, tmp_path, "policy") == TOKEN
    assert not (tmp_path / "policy.token").exists()
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, TOKEN + "2")
    with pytest.raises(ValueError, match="differ; give one of them"):
        serve.find_token(file, tmp_path, "policy")


@pytest.mark.parametrize("bad", ["", "short", "a token\nof two lines, long", "ein Schlüssel mit Umlaut"])
def test_a_weak_token_is_refused(bad, tmp_path):
    (tmp_path / "token").write_text(bad)
    with pytest.raises(ValueError, match="expected a token of 16 or more"):
        serve.find_token(tmp_path / "token", tmp_path, "policy")


def test_what_stands_behind_the_dashes_is_the_engines(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    flags = serve.parser("policy", "Serves.", "bfloat16")
    read, extra = serve.parse(flags, [f"--model={tmp_path}", "--port=1", "--", "--seed", "3"])
    assert (read.port, read.host, extra) == (1, "127.0.0.1", ("--seed", "3"))
    for argv, error in [
        (["--model=/nowhere"], "expected a directory with a config.json, found /nowhere"),
        ([f"--model={tmp_path}", "--", "--trust-remote-code"], "a model's own code is not run"),
        ([f"--model={tmp_path}", "--", "--trust_remote_code=true"], "a model's own code is not run"),
    ]:
        with pytest.raises(SystemExit):
            serve.parse(flags, argv)
        assert error in capsys.readouterr().err


def test_a_server_whose_engine_is_gone_for_good_answers_who_waits_and_ends(tmp_path, monkeypatch):
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, TOKEN)
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    argv = [f"--model={tmp_path}", f"--url_file={tmp_path / 'url'}", f"--log_dir={tmp_path}", "--max_restarts=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", MORTAL, *argv], cwd=Path(__file__).parents[3], stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "url").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        url = (tmp_path / "url").read_text().strip()
        with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as http:
            while http.get("/health").status_code != 200 and time.monotonic() < until:
                time.sleep(0.01)
            process.send_signal(signal.SIGUSR1)  # tells a learner to save, and a server nothing
            answer = http.post("/generate", json=ASKED)
        assert (answer.status_code, "it is gone" in answer.json()["error"]) == (503, True)
        _, told = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 1
    line = "policy server: the engine did not start: [Errno 28] No space left on device; it was started anew 1 times"
    assert line in told
    assert "Traceback" not in told
    assert not (tmp_path / "url").exists()
