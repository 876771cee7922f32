"""The policy's weights on their way to the servers: a safetensors file in memory, or the same file over HTTP."""

import contextlib
import fcntl
import hmac
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PREFIX = "sea_jax-weights-"
SHM, HTTP = "shm", "http"  # transports


@dataclass(frozen=True)
class Route:
    """How weights come from the learner to the servers.

    Attributes:
      transport: SHM (the servers read the file) or HTTP (they fetch it).
      directory: where the file lies; SHM: the same directory for the servers.
      host: HTTP: the learner's address, as the servers reach it.
      port: HTTP: 0 is any that is free.
    """

    transport: str = SHM
    directory: Path = Path("/dev/shm")
    host: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True)
class Offer:
    """What a server is told of the weights: `path`, or `url` and `bearer`; fields of a `protocol.WeightsRequest`."""

    path: str | None = None
    url: str | None = None
    bearer: str | None = None


@contextlib.contextmanager
def offer(tensors: Mapping[str, np.ndarray], route: Route) -> Iterator[Offer]:
    """Keeps tensors where servers can get them; when it is left, nothing remains.

    Raises:
      OSError: the directory is full or not there, or the port is taken; the message names the field of the configuration.
    """
    with write(tensors, route.directory) as path:
        if route.transport == SHM:
            yield Offer(path=str(path))
        else:
            with serve(path, route.host, route.port) as given:
                yield given


@contextlib.contextmanager
def write(tensors: Mapping[str, np.ndarray], directory: Path) -> Iterator[Path]:
    """Writes tensors to a file that only this user can read, under a name that nobody can guess.

    Yields:
      The file, removed at the end; what killed processes left there is removed at the beginning.

    Raises:
      OSError: the directory is full or not there.
    """
    try:
        _remove_stale(directory)
        own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    except OSError as error:
        raise OSError(f"config.actor.weights_directory={directory}: {error.strerror}; name one in memory") from error
    try:
        with (own / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as long as it is held, the file is in use
            (own / "new").rename(own / "lock")  # only now does anybody look at it
            path = own / "model.safetensors"
            size = sum(tensor.nbytes for tensor in tensors.values())
            free = shutil.disk_usage(directory).free
            if size > free:
                raise OSError(
                    f"config.actor.weights_directory={directory} has {free / 2**20:.0f} MiB free and the weights take "
                    f"{size / 2**20:.0f} MiB; enlarge it (docker: --shm-size), or name another"
                )
            save_file(dict(tensors), path, metadata={"format": "pt"})
            path.chmod(0o600)
            yield path
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _remove_stale(directory: Path) -> None:
    """Removes this user's weights that no living process holds."""
    for left in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, in use, or gone by now
            if left.stat().st_uid == os.getuid():
                with (left / "lock").open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)


@contextlib.contextmanager
def serve(path: Path, host: str, port: int = 0) -> Iterator[Offer]:
    """Serves one file over HTTP, to those who bear a token made for it.

    Args:
      path: the file.
      host: address of this host to listen on, as others reach it.
      port: 0 is any that is free.

    Yields:
      Offer with the file's URL and its token; both are worth nothing when it is left.

    Raises:
      OSError: the address is not this host's, or the port is taken.
    """
    name, bearer = secrets.token_hex(8), secrets.token_urlsafe(32)

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds that a peer may be silent

        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {bearer}".encode()):
                self.send_error(401)
            elif self.path != f"/{name}":
                self.send_error(404)
            else:
                with path.open("rb") as file:
                    self.send_response(200)
                    self.send_header("Content-Type", "application/octet-stream")
                    self.send_header("Content-Length", str(path.stat().st_size))
                    self.end_headers()
                    with contextlib.suppress(ConnectionError, TimeoutError):  # the server's error tells of it
                        shutil.copyfileobj(file, self.wfile, 2**20)

        def log_message(self, *arguments: object) -> None:
            """Says nothing on the learner's terminal."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise OSError(
            f"config.actor.weights_host={host}, weights_port={port}: cannot listen there ({error.strerror}); name an "
            "address of this host that the servers reach, and a port that is free, or 0"
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Offer(url=f"http://{host}:{server.server_port}/{name}", bearer=bearer)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
