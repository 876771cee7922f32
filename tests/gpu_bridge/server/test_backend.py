"""How an engine's process is talked to and what it is started with; the engines are stand-ins."""

import asyncio
import contextlib
import getpass
import tempfile

import httpx2
import pytest

from gpu_bridge.server import backend
from gpu_bridge.server.backend import EngineConfig, EngineFailed, VllmOracle

ONE = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"
LEAVES = """
import os, tempfile
print(tempfile.mkstemp()[1], os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.parametrize("unix", [True, False])
def test_no_request_is_sent_on_a_connection_that_the_engine_may_be_closing(unix, tmp_path):
    connections, kept = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections, kept
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ONE)
            await reader.readuntil(b"\r\n\r\n")  # a second request, at the moment when the connection is closed
            kept += 1
        writer.close()

    async def ask() -> None:
        if unix:
            server = await asyncio.start_unix_server(serve, tmp_path / "engine")
            client = backend.connect("http://engine", tmp_path / "engine")
        else:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            client = backend.connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server, client:
            for _ in range(3):
                await asyncio.gather(*(client.get("/health") for _ in range(2)))

    with contextlib.suppress(httpx2.RemoteProtocolError):
        asyncio.run(asyncio.wait_for(ask(), 10))
    assert (connections, kept) == (6, 0)


def test_what_an_engine_leaves_is_removed_and_what_it_compiled_is_kept(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "leaves.py").write_text(LEAVES)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(backend, "VLLM_SERVER", "leaves")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    async def start() -> None:
        engine = VllmOracle(EngineConfig(tmp_path, tmp_path / "logs", "float32"), lambda seconds, line: None)
        try:
            await engine.start()
        finally:
            await engine.stop()

    with pytest.raises(EngineFailed, match=rf"\n{scratch}/bridge-\w+/\w+ {scratch}/torchinductor_{getpass.getuser()}$"):
        asyncio.run(start())
    assert not list(scratch.iterdir())
