"""The servers' command line and where the token comes from."""

import stat

import pytest

from gpu_bridge import protocol, serve

TOKEN = "a-token-for-tests"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(protocol.TOKEN_VARIABLE, raising=False)


def test_a_token_is_drawn_once_and_kept_from_others(tmp_path, capsys):
    drawn = serve.token(None, tmp_path / "logs", "policy")
    file = tmp_path / "logs/policy.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(drawn) >= 32
    assert serve.token(None, tmp_path / "logs", "policy") == drawn
    shown = capsys.readouterr().out
    assert str(file) in shown
    assert drawn not in shown
    assert serve.token(None, tmp_path / "logs", "oracle") != drawn


def test_the_environment_and_the_file_must_agree(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert serve.token(file, tmp_path, "policy") == TOKEN
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, TOKEN)
    assert serve.token(file, tmp_path, "policy") == serve.token(None, tmp_path, "policy") == TOKEN
    assert not (tmp_path / "policy.token").exists()
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, TOKEN + "2")
    with pytest.raises(ValueError, match="differ; give one of them"):
        serve.token(file, tmp_path, "policy")


@pytest.mark.parametrize("bad", ["", "short", "a token\nof two lines, long", "ein Schlüssel mit Umlaut"])
def test_a_weak_token_is_refused(bad, tmp_path):
    (tmp_path / "token").write_text(bad)
    with pytest.raises(ValueError, match="expected a token of 16 or more"):
        serve.token(tmp_path / "token", tmp_path, "policy")


def test_what_stands_behind_the_dashes_is_the_engines(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    flags = serve.parser("policy", "Serves.", "bfloat16")
    read, extra = serve.arguments(flags, [f"--model={tmp_path}", "--port=1", "--", "--seed", "3"])
    assert (read.port, read.host, extra) == (1, "127.0.0.1", ("--seed", "3"))
    for argv, error in [
        (["--model=/nowhere"], "expected a directory with a config.json, found /nowhere"),
        ([f"--model={tmp_path}", "--", "--trust-remote-code"], "a model's own code is not run"),
        ([f"--model={tmp_path}", "--", "--trust_remote_code=true"], "a model's own code is not run"),
    ]:
        with pytest.raises(SystemExit):
            serve.arguments(flags, argv)
        assert error in capsys.readouterr().err
