"""Runs a gateway and the engine behind it until a signal comes or no engine lives; what serve_policy and serve_oracle share."""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from gpu_bridge import protocol
from gpu_bridge.server import tensors
from gpu_bridge.server.backend import Backend, EngineConfig, Progress
from gpu_bridge.server.gateway import Gateway, GatewayConfig

SHM = Path("/dev/shm")
LINE_SECONDS = 15.0  # between progress lines where there is no terminal
MIN_TOKEN = 16  # characters

MakeBackend = Callable[[EngineConfig, Progress], Backend]


def parser(kind: str, description: str, dtype: str) -> argparse.ArgumentParser:
    """Makes the flags that both kinds of servers have.

    Args:
      kind: protocol.POLICY or protocol.ORACLE.
      description: begins the help.
      dtype: the default.

    Returns:
      The parser; `parse` reads with it.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m gpu_bridge.serve_{kind}",
        description=description,
        epilog="What stands behind -- is handed to the engine as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--model", type=Path, required=True, help="directory with config.json and *.safetensors, as the learner's")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (plain HTTP: in a network you trust)")
    add("--port", type=int, default=0, help="port to listen on; 0: any that is free")
    add("--url_file", type=Path, help="file to write the server's URL to, as soon as it listens")
    add(
        "--token_file",
        type=Path,
        help=f"file with the token that every request must bear; without it ${protocol.TOKEN_VARIABLE}, and without that "
        "a random one is written to a file in --log_dir",
    )
    add("--log_dir", type=Path, default=Path("runs/bridge"), help="directory for the engine's output")
    add("--dtype", default=dtype, choices=("float32", "bfloat16", "float16"), help="of the weights")
    add("--max_model_len", type=int, default=0, help="longest sequence in tokens; 0: what the model was made for")
    add("--max_num_seqs", type=int, default=128, help="sequences that are computed at the same time")
    add("--gpu_memory_fraction", type=float, default=0.9, help="share of each GPU's memory")
    add("--tensor_parallel", type=int, default=1, help="GPUs that share the model")
    add("--threads", type=int, default=0, help="OMP_NUM_THREADS; 0: as in the environment, or 1 on the CPU")
    add("--max_body_bytes", type=int, default=protocol.MAX_BODY_BYTES, help="longest request")
    add("--start_timeout_s", type=float, default=1800, help="seconds after which a start has failed")
    add(
        "--timeout_s", type=float, default=1800, help="seconds without an answer after which the engine is started anew"
    )
    add("--max_restarts", type=int, default=3, help="times within an hour that an engine which ended is started anew")
    return result


def parse(flags: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Reads a command line, without the program's name, into the flags and what stands behind `--`."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    read, extra = flags.parse_args(argv[:end]), tuple(argv[end + 1 :])
    if not (read.model / "config.json").exists():
        flags.error(f"--model: expected a directory with a config.json, found {read.model}")
    if any("trust" in argument and "remote" in argument for argument in extra):
        flags.error("a model's own code is not run")
    return read, extra


def find_token(file: Path | None, log_dir: Path, kind: str) -> str:
    """Finds the token, or draws one.

    Args:
      file: --token_file.
      log_dir: where a drawn one is kept.
      kind: of the server.

    Returns:
      The token.

    Raises:
      ValueError: it is too short, or the environment has another one than the file.
    """
    variable = os.environ.get(protocol.TOKEN_VARIABLE, "").strip()
    if file is None and not variable:
        file = log_dir / f"{kind}.token"
        log_dir.mkdir(parents=True, exist_ok=True)
    found = variable
    if file is not None:
        if not file.exists():
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as drawn:
                drawn.write((variable or secrets.token_urlsafe(32)) + "\n")
        found = file.read_text().strip()
        print(f"the token is in {file.absolute()}", flush=True)
    if variable and variable != found:
        raise ValueError(f"the token in {file} and that in ${protocol.TOKEN_VARIABLE} differ; give one of them")
    if len(found) < MIN_TOKEN or not (found.isascii() and found.isprintable()):
        raise ValueError(f"expected a token of {MIN_TOKEN} or more printable characters without spaces around them")
    return found


def progress_line(kind: str) -> Progress:
    """Makes what shows how a start goes: one line, written over on a terminal."""
    shown = 0.0

    def show(seconds: float, line: str) -> None:
        nonlocal shown
        text = f"{kind} server: {seconds:.0f} s, waiting for the engine: {line.strip()[-80:]}"
        if sys.stderr.isatty():
            print(f"\r{text[:118]:<118}", end="", file=sys.stderr, flush=True)
        elif seconds - shown >= LINE_SECONDS or seconds < shown:
            shown = seconds
            print(text, file=sys.stderr, flush=True)

    return show


def run(kind: str, flags: argparse.Namespace, extra: tuple[str, ...], make: MakeBackend, module: str) -> int:
    """Serves until SIGTERM or Ctrl-C, or until the engine is not started any more.

    Args:
      kind: protocol.POLICY or protocol.ORACLE.
      flags: from `parse`.
      extra: further arguments of the engine.
      make: makes the engine.
      module: what the engine needs to be installed.

    Returns:
      The exit status; 1: there is no engine.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    if importlib.util.find_spec(module) is None:
        print(
            f"{module} is not installed for {sys.executable}; `make bridge` sets up .venv-bridge, run this with its python"
        )
        return 1
    config = EngineConfig(
        model=flags.model.absolute(),
        log_dir=flags.log_dir.absolute(),
        dtype=flags.dtype,
        max_model_len=flags.max_model_len,
        max_num_seqs=flags.max_num_seqs,
        gpu_memory_fraction=flags.gpu_memory_fraction,
        tensor_parallel=flags.tensor_parallel,
        threads=flags.threads,
        start_timeout_s=flags.start_timeout_s,
        timeout_s=flags.timeout_s,
        extra=extra,
    )
    weights_dir = getattr(flags, "weights_dir", None)
    try:
        gateway_config = GatewayConfig(
            kind=kind,
            model=flags.model.name,
            token=find_token(flags.token_file, flags.log_dir, kind),
            max_body_bytes=flags.max_body_bytes,
            vocab_size=json.loads((flags.model / "config.json").read_text())["vocab_size"],
            weights_dirs=(SHM,) if weights_dir is None else (weights_dir.absolute(), SHM),
            tensors=tensors.read_model(flags.model) if kind == protocol.POLICY else {},
            max_restarts=flags.max_restarts,
        )
        listening = socket.create_server((flags.host, flags.port))
    except (OSError, ValueError, KeyError) as error:
        print(f"{kind} server: {error}", file=sys.stderr)
        return 1
    return asyncio.run(_serve(gateway_config, config, make, listening, flags.host, flags.url_file))


async def _serve(
    config: GatewayConfig,
    engine: EngineConfig,
    make: MakeBackend,
    listening: socket.socket,
    host: str,
    url_file: Path | None,
) -> int:
    """Runs gateway and engine on a socket."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    # Tells a learner to save, and may go to all of a job: it needs the servers until then. The engine's processes inherit it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    gateway = Gateway(config, lambda: make(engine, progress_line(config.kind)))
    server = uvicorn.Server(
        uvicorn.Config(
            gateway.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=5,
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    url = f"http://{host}:{listening.getsockname()[1]}"
    start = time.monotonic()
    tasks = [
        asyncio.ensure_future(work)
        for work in (gateway.run(), server.serve([listening]), stopped.wait(), gateway.ready.wait())
    ]
    living, serving, waiting, ready = tasks
    try:
        if url_file is not None:
            unfinished = url_file.with_name(f"{url_file.name}.tmp")
            unfinished.write_text(f"{url}\n")
            unfinished.replace(url_file)
        print(f"{config.kind} server: {url} (not ready yet)", flush=True)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not living.done():
            seconds = time.monotonic() - start
            print(f"\n{config.kind} server: {url} serves {config.model}, ready after {seconds:.0f} s", flush=True)
            await asyncio.wait({living, serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if living.done():
            print(f"\n{config.kind} server: {living.result()}", file=sys.stderr)
            return 1
        return 0
    finally:
        server.should_exit = True
        for task in (living, waiting, ready):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if url_file is not None:
            url_file.unlink(missing_ok=True)
