"""Starts actors, oracle and learner from one command, and ends them together.

python -m gpu_bridge.launch --policy=DIR --oracle=DIR --gpus=8 -- --config=configs/tldr.py:1b --workdir=runs/tldr
python -m gpu_bridge.launch --policy=DIR --oracle=DIR --gpus=8 --layout=half -- --config=configs/tldr.py:6.9b
python -m gpu_bridge.launch --policy=DIR --gpus=0 -- --config=configs/quickstart.py      (CPU: one actor, the config's oracle)

Layouts (SEA paper, App. H, Fig. 8): "all" puts an actor and an oracle on every GPU, and the learner over all of them: their
shares of each GPU's memory are --shares=ACTOR,ORACLE,LEARNER. "half" leaves the second half of the GPUs to the learner.
What stands behind -- is handed to `python -m sea_jax.train`; who writes and who labels is added to it.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpu_bridge import child, protocol

SHARES = {"all": (0.3, 0.25, 0.4), "half": (0.5, 0.4, 0.9)}
POLL_S = 0.2


@dataclass(frozen=True)
class Place:
    """Where a server runs.

    Attributes:
      kind: protocol.POLICY or protocol.ORACLE.
      number: among those of its kind.
      gpu: its GPU; None: the CPU.
      memory_fraction: of that GPU.
    """

    kind: str
    number: int
    gpu: int | None
    memory_fraction: float

    @property
    def name(self) -> str:
        """Returns what its files are called."""
        return f"{self.kind}-{self.number}"


@dataclass(frozen=True)
class Plan:
    """Who runs where.

    Attributes:
      servers: Place of each.
      learner_gpus: of the learner; empty: the CPU.
      learner_memory_fraction: of each of its GPUs.
    """

    servers: tuple[Place, ...]
    learner_gpus: tuple[int, ...]
    learner_memory_fraction: float


def plan(layout: str, gpus: int, shares: Sequence[float], oracle: bool) -> Plan:
    """Divides the GPUs.

    Args:
      layout: "all" or "half".
      gpus: how many there are; 0: one server of each kind, and the learner, on the CPU.
      shares: of a GPU's memory, for an actor, an oracle and the learner.
      oracle: whether the oracle is served.

    Returns:
      Plan.

    Raises:
      ValueError: the GPUs cannot be halved, or the shares on one GPU exceed it.
    """
    actor_share, oracle_share, learner_share = shares
    kinds = [(protocol.POLICY, actor_share), *([(protocol.ORACLE, oracle_share)] if oracle else [])]
    if layout == "half" and (gpus < 2 or gpus % 2):
        raise ValueError(f"--gpus={gpus}: --layout=half needs an even number of GPUs, 2 or more")
    together = sum(share for _, share in kinds) + (learner_share if layout == "all" else 0)
    if gpus and (together > 1 or min(shares) <= 0 or learner_share > 1):
        raise ValueError(
            f"--shares={','.join(map(str, shares))}: what shares a GPU comes to {together:.2f} of it, above 1"
        )
    served = range(gpus // 2 if layout == "half" else gpus)
    places = [Place(kind, gpu, gpu, share) for kind, share in kinds for gpu in served]
    if not gpus:
        places = [Place(kind, 0, None, share) for kind, share in kinds]
    learners = range(gpus // 2, gpus) if layout == "half" else range(gpus)
    return Plan(tuple(places), tuple(learners), learner_share)


def server_command(
    place: Place, python: Path, models: Mapping[str, Path], logs: Path, extra: Sequence[str]
) -> list[str]:
    """Returns the command that starts a server.

    Args:
      place: Place.
      python: of the environment that holds the engine.
      models: directories by kind.
      logs: where its files go.
      extra: further flags of every server.
    """
    return [
        *(str(python), "-m", f"gpu_bridge.serve_{place.kind}"),
        f"--model={models[place.kind]}",
        f"--url_file={logs / place.name}.url",
        f"--log_dir={logs / place.name}",
        f"--gpu_memory_fraction={place.memory_fraction}",
        *extra,
    ]


def learner_command(
    arguments: Sequence[str], urls: Mapping[str, Sequence[str]], reward_model: Path | None
) -> list[str]:
    """Returns the command that starts the learner.

    Args:
      arguments: of `python -m sea_jax.train`.
      urls: of the servers that are there, by kind.
      reward_model: directory of the oracle's model, whose tokenizer the learner needs; None: the config's own oracle.
    """
    added = ["--config.actor.kind=bridge", f"--config.actor.urls={','.join(urls[protocol.POLICY])}"]
    if reward_model is not None:
        added += ["--config.oracle.kind=remote", f"--config.oracle.urls={','.join(urls[protocol.ORACLE])}"]
        added.append(f"--config.oracle.reward_model={reward_model}")
    return [sys.executable, "-m", "sea_jax.train", *arguments, *added]


def environment(gpus: Sequence[int] | None, token: str, **more: str) -> dict[str, str]:
    """Returns a child's environment.

    Args:
      gpus: that it may see; None: all, there are none.
      token: of every server.
      more: further variables.
    """
    seen = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    return {**os.environ, protocol.TOKEN_VARIABLE: token, **seen, **more}


@contextmanager
def server(command: Sequence[str], env: Mapping[str, str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a server behind a keeper, which ends it with all that it started, however this process ends.

    Args:
      command: of the server.
      env: its environment.
      output: file for what it prints.
    """
    scratch = tempfile.mkdtemp()
    with output.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, child.__file__, scratch, *command],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C is for the learner first, which still needs the server for its step
        )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait()


@contextmanager
def learner(command: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the learner; on leaving it is told to save and stop, and a second Ctrl-C ends it at once.

    Args:
      command: of the learner.
      env: its environment.
    """
    process = subprocess.Popen(command, env=dict(env), start_new_session=True)
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise


def wait_for_urls(
    places: Sequence[Place], servers: Sequence[subprocess.Popen[bytes]], logs: Path
) -> dict[str, list[str]]:
    """Waits until every server listens; the learner itself waits until they are ready.

    Args:
      places: Place of each.
      servers: their processes.
      logs: where they write their URLs.

    Returns:
      URLs by kind.

    Raises:
      ValueError: a server ended.
    """
    urls: dict[str, list[str]] = {}
    for place, server in zip(places, servers, strict=True):
        file = logs / f"{place.name}.url"
        while not file.exists():
            if server.poll() is not None:
                raise ValueError(
                    f"{place.name} ended with status {server.returncode}; {logs / place.name}.log says why"
                )
            time.sleep(POLL_S)
        urls.setdefault(place.kind, []).append(file.read_text().strip())
    return urls


def launch(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Starts everything and waits for the learner.

    Args:
      flags: from `main`.
      arguments: of the learner.

    Returns:
      The learner's exit status.

    Raises:
      ValueError: the layout cannot be, or a server ended while the learner needed it.
    """
    layout = plan(flags.layout, flags.gpus, flags.shares or SHARES[flags.layout], flags.oracle is not None)
    token = os.environ.get(protocol.TOKEN_VARIABLE, "").strip() or secrets.token_urlsafe(32)
    models = {protocol.POLICY: flags.policy, protocol.ORACLE: flags.oracle}
    flags.log_dir.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="servers-", dir=flags.log_dir)).absolute()
    print(f"{len(layout.servers)} servers start, their output is in {logs}", flush=True)
    with ExitStack() as running:
        servers = [
            running.enter_context(
                server(
                    server_command(place, flags.bridge_python, models, logs, flags.server_flag),
                    environment(None if place.gpu is None else [place.gpu], token),
                    logs / f"{place.name}.log",
                )
            )
            for place in layout.servers
        ]
        urls = wait_for_urls(layout.servers, servers, logs)
        more = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(layout.learner_memory_fraction)} if layout.learner_gpus else {}
        command = learner_command(arguments, urls, flags.oracle)
        with learner(command, environment(layout.learner_gpus or None, token, **more)) as process:
            while process.poll() is None:
                ended = [place for place, one in zip(layout.servers, servers, strict=True) if one.poll() is not None]
                if ended:
                    raise ValueError(
                        f"{ended[0].name} ended; {logs / ended[0].name}.log says why. The learner saves: start the same "
                        "command again and it goes on"
                    )
                time.sleep(POLL_S)
            return process.returncode


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if len(shares) != 3:
        raise ValueError(text)
    return shares


def main() -> int:
    """Reads the flags and launches."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_bridge.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--policy", type=Path, required=True, help="directory of the policy, the same as config.policy.source")
    add("--oracle", type=Path, help="directory of the reward model; without it the config's own oracle labels")
    add("--gpus", type=int, default=8, help="GPUs of this host; 0: the CPU (default 8)")
    add("--layout", choices=tuple(SHARES), default="all", help="who shares the GPUs (default all)")
    add("--shares", type=_shares, help="of a GPU's memory: ACTOR,ORACLE,LEARNER (default: by the layout)")
    add("--bridge_python", type=Path, default=Path(".venv-bridge/bin/python"), help="python that has the engine")
    add("--log_dir", type=Path, default=Path("runs/bridge"), help="directory for what the servers print")
    add("--server_flag", action="append", default=[], help="a flag for every server, such as --max_model_len=512")
    own = list(sys.argv[1:])
    end = own.index("--") if "--" in own else len(own)
    flags, arguments = parser.parse_args(own[:end]), own[end + 1 :]
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, _interrupt)
    try:
        return launch(flags, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
