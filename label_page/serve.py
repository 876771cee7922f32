"""The page's process: `python -m label_page.serve`, which a run starts, and which ends when its standard input does.

Settings come as one JSON line on standard input; once it listens, it says where as one JSON line on standard output.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import uvicorn

from label_page.app import Page, application
from label_page.checks import read_checks
from label_page.guard import Bearer, digest
from label_page.progress import Progress
from label_page.prompt import to_html
from label_page.store import Rules, Store

LINKS = "links.txt"
BIND_WAIT_S = 20.0  # for the port of a page whose run was killed
CONNECTIONS = 512


class Settings(pydantic.BaseModel):
    """What a run tells the page.

    Attributes:
      directory: of the store.
      run: the run's work directory, whose metrics are shown.
      token: that only the learner has.
      names, redundancy, lease_s, undo_s, slightly, check_every: as of the run's settings.
      budget: labels that the run pays for.
      guidelines, checks, tls_certificate, tls_key: files; "": none.
      host, port: where to listen.
    """

    directory: Path
    run: Path
    token: str
    names: tuple[str, ...]
    redundancy: int
    lease_s: float
    undo_s: float
    slightly: float
    check_every: int
    budget: int
    guidelines: str
    checks: str
    host: str
    port: int
    tls_certificate: str
    tls_key: str


@dataclass
class Links:
    """The links that are not used yet, in a file that nobody else can read.

    Attributes:
      store: Store.
      names: of people; (""): of whoever.
      url: of the page.
      file: where they stand.
    """

    store: Store
    names: Sequence[str]
    url: str
    file: Path

    def write(self) -> list[str]:
        """Makes those that are missing; returns a line for each."""
        found = self.store.invitations(self.names)
        lines = [f"{name or 'whoever labels'}: {self.url}/#{token}" for name, token in found.items()]
        descriptor = os.open(self.file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write("Each link lets one browser in, once.\n" + "".join(f"{line}\n" for line in lines))
        return lines


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
      OSError: there is no such host here, or somebody else has the port.
    """
    until = time.monotonic() + BIND_WAIT_S
    while True:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
            found.listen(128)
            return found
        except OSError as error:
            found.close()
            if time.monotonic() > until:
                raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from error
            time.sleep(0.2)


def address(host: str, port: int, secure: bool) -> str:
    """Returns what people type to reach a host and port."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http{'s' if secure else ''}://{name}:{port}"


def serve(settings: Settings) -> None:
    """Serves until standard input ends."""
    rules = Rules(
        redundancy=settings.redundancy,
        lease_s=settings.lease_s,
        undo_s=settings.undo_s,
        slightly=settings.slightly,
        check_every=settings.check_every,
    )
    checks = read_checks(Path(settings.checks)) if settings.checks else []
    guidelines = Path(settings.guidelines).read_text(encoding="utf-8") if settings.guidelines else ""
    store = Store(settings.directory, rules)
    store.post_checks(checks)
    found = listening(settings.host, settings.port)
    host, port = found.getsockname()[:2]
    url = address(settings.host, port, bool(settings.tls_certificate))
    links = Links(store, settings.names or ("",), url, settings.directory / LINKS)
    page = Page(
        store=store,
        bearer=Bearer(settings.token),
        names=settings.names,
        invite=links.write,
        guidelines=to_html(guidelines),
        budget=settings.budget,
        progress=Progress(settings.run / "metrics.jsonl"),
        cookie=f"sea_jax_{digest(str(settings.directory))[:8]}",  # cookies of one host are shared by all its ports
        secure=bool(settings.tls_certificate),
    )
    server = uvicorn.Server(
        uvicorn.Config(
            application(page),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_level="warning",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
            ssl_certfile=settings.tls_certificate or None,
            ssl_keyfile=settings.tls_key or None,
        )
    )
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    told = {"port": port, "host": host, "links": links.write(), "file": str(links.file)}
    print(json.dumps(told), flush=True)
    try:
        asyncio.run(server.serve(sockets=[found]))
    finally:
        store.close()


def _end_with_input(server: uvicorn.Server) -> None:
    """Lets a server end when whoever started it is gone, however that ended."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    server.should_exit = True


def main() -> None:
    """Reads the settings and serves; what keeps it from that is one line on standard output."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's to handle, which still wants its answers
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(sys.stdin.fileno(), 1) or b"\n"
    told: Any = json.loads(line)
    try:
        serve(Settings(**told))
    except (OSError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
