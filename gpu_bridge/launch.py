"""Starts actors, oracle and learner from one command, and ends them together.

python -m gpu_bridge.launch --policy=DIR --oracle=DIR --gpus=8 -- --config=configs/tldr.py:1b --workdir=runs/tldr
python -m gpu_bridge.launch --policy=DIR --oracle=DIR --gpus=8 --layout=half -- --config=configs/tldr.py:6.9b
python -m gpu_bridge.launch --policy=DIR --gpus=0 -- --config=configs/quickstart.py      (CPU: one actor, the config's oracle)

Layouts (SEA paper, App. H, Fig. 8): "all" puts an actor and an oracle on every GPU, and the learner over all of them: their
shares of each GPU's memory are --shares=ACTOR,ORACLE,LEARNER. "half" leaves the second half of the GPUs to the learner.
On GPUs oracles compute in bfloat16 and read up to 2048 tokens, --oracle_flag=--max_model_len=N changes that.
What stands behind -- is handed to `python -m sea_jax.train`; who writes and who labels is added to it.
"""

import argparse
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpu_bridge import child, client, protocol

SHARES = {"all": (0.3, 0.25, 0.4), "half": (0.5, 0.4, 0.9)}
ORACLE_TOKENS = 2048  # as config.oracle.max_tokens; with a length of 131072 an 8B model's cache alone would take 16 GiB
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


def visible_gpus(count: int, visible: str | None) -> tuple[str, ...]:
    """Names the first `count` GPUs that this process may use.

    Args:
      count: how many are wanted.
      visible: CUDA_VISIBLE_DEVICES as it was inherited; None: it is not set.

    Raises:
      ValueError: it may use fewer.
    """
    if visible is None:
        return tuple(map(str, range(count)))
    # CUDA reads as far as the first name that is none, such as -1.
    names = tuple(itertools.takewhile(lambda name: name and name[0] != "-", map(str.strip, visible.split(","))))
    if len(names) < count:
        raise ValueError(
            f"--gpus={count}: CUDA_VISIBLE_DEVICES={visible} allows {len(names)}; give --gpus={len(names)} or name more"
        )
    return names[:count]


def default_flags(place: Place, model: Path) -> list[str]:
    """Returns flags with which a server's share of a GPU suffices; where one stands twice, a server takes the last.

    Raises:
      OSError: there is no config.json in it.
    """
    if place.gpu is None or place.kind == protocol.POLICY:  # which is served in bfloat16 by itself
        return []
    positions = json.loads((model / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    return ["--dtype=bfloat16", f"--max_model_len={min(ORACLE_TOKENS, positions or ORACLE_TOKENS)}"]


def server_command(
    place: Place, python: Path, models: Mapping[str, Path], logs: Path, extra: Sequence[str]
) -> list[str]:
    """Returns the command that starts a server.

    Args:
      place: Place.
      python: of the environment that holds the engine.
      models: directories by kind.
      logs: where its files go.
      extra: further flags.
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


def environment(gpus: Sequence[str] | None, token: str, **more: str) -> dict[str, str]:
    """Returns a child's environment; it may see the GPUs that are named, or None: there are none."""
    seen = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
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


def start_in_turn(
    places: Sequence[Place], start: Callable[[Place], subprocess.Popen[bytes]], logs: Path, token: str
) -> list[subprocess.Popen[bytes]]:
    """Starts the servers of one GPU one after another, those of different GPUs at the same time, until all are ready.

    While it starts, vLLM measures what is free on the whole GPU and takes every change for its own doing
    (https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu_worker.py, determine_available_memory).

    Raises:
      ValueError: a server ended, or is none of the bridge's.
    """
    servers: dict[Place, subprocess.Popen[bytes]] = {}
    waiting = list(places)
    while waiting:
        turns: dict[int | None, Place] = {}
        for place in waiting:
            turns.setdefault(place.gpu, place)
        for place in turns.values():
            if place not in servers:
                servers[place] = start(place)
            elif is_ready(place, logs, token):
                print(f"{place.name} is ready", flush=True)
                waiting.remove(place)
        for place, process in servers.items():
            check_running(place, process, logs)
        time.sleep(POLL_S)
    return [servers[place] for place in places]


def is_ready(place: Place, logs: Path, token: str) -> bool:
    """Returns whether a server, whose URL is in `logs`, answers requests."""
    try:
        url = (logs / f"{place.name}.url").read_text().strip()
        client.health(client.Servers(place.kind, (url,), token), url)
    except (FileNotFoundError, client.Unavailable):
        return False
    return True


def check_running(place: Place, server: subprocess.Popen[bytes], logs: Path) -> None:
    """Raises ValueError if a server has ended."""
    if server.poll() is not None:
        raise ValueError(f"{place.name} ended with status {server.returncode}; {logs / place.name}.log says why")


def wait_for_urls(
    places: Sequence[Place], servers: Sequence[subprocess.Popen[bytes]], logs: Path
) -> dict[str, list[str]]:
    """Waits until every server has written its URL to `logs`, and returns the URLs by kind.

    The learner itself waits until they are ready.

    Raises:
      ValueError: a server ended.
    """
    urls: dict[str, list[str]] = {}
    for place, process in zip(places, servers, strict=True):
        file = logs / f"{place.name}.url"
        while not file.exists():
            check_running(place, process, logs)
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
      OSError: a model is not there.
    """
    layout = plan(flags.layout, flags.gpus, flags.shares or SHARES[flags.layout], flags.oracle is not None)
    gpus = visible_gpus(flags.gpus, os.environ.get("CUDA_VISIBLE_DEVICES")) if flags.gpus else ()
    token = os.environ.get(protocol.TOKEN_VARIABLE, "").strip() or secrets.token_urlsafe(32)
    models = {protocol.POLICY: flags.policy, protocol.ORACLE: flags.oracle}
    own = {protocol.POLICY: flags.policy_flag, protocol.ORACLE: flags.oracle_flag}
    given = {
        place: [*default_flags(place, models[place.kind]), *flags.server_flag, *own[place.kind]]
        for place in layout.servers
    }
    flags.log_dir.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="servers-", dir=flags.log_dir)).absolute()
    print(f"{len(layout.servers)} servers start, their output is in {logs}", flush=True)
    with ExitStack() as running:

        def start(place: Place) -> subprocess.Popen[bytes]:
            command = server_command(place, flags.bridge_python, models, logs, given[place])
            env = environment(None if place.gpu is None else [gpus[place.gpu]], token)
            return running.enter_context(server(command, env, logs / f"{place.name}.log"))

        servers = start_in_turn(layout.servers, start, logs, token) if gpus else list(map(start, layout.servers))
        urls = wait_for_urls(layout.servers, servers, logs)
        more = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(layout.learner_memory_fraction)} if gpus else {}
        seen = [gpus[number] for number in layout.learner_gpus] if gpus else None
        command = learner_command(arguments, urls, flags.oracle)
        with learner(command, environment(seen, token, **more)) as process:
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
    for name, whom in (("server", "every server"), ("policy", "every actor"), ("oracle", "every oracle")):
        add(f"--{name}_flag", action="append", default=[], help=f"a flag for {whom}, such as --max_model_len=512")
    own = list(sys.argv[1:])
    end = own.index("--") if "--" in own else len(own)
    flags, arguments = parser.parse_args(own[:end]), own[end + 1 :]
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
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
