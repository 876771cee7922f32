"""Serves a reward model, on vLLM or, where vLLM does not know the model, on mosec.

python -m gpu_bridge.serve_oracle --model=DIR --port=8102
"""

import sys

from gpu_bridge import protocol
from gpu_bridge.server import serve
from gpu_bridge.server.backend import MosecOracle, VllmOracle


def main() -> int:
    """Reads the flags and serves."""
    flags = serve.parser(protocol.ORACLE, "Serves a reward model: scores conversations.", "float32")
    flags.add_argument(
        "--backend", choices=("vllm", "mosec"), default="vllm", help="mosec: transformers' own model, on one device"
    )
    read, extra = serve.parse(flags, sys.argv[1:])
    return serve.run(protocol.ORACLE, read, extra, VllmOracle if read.backend == "vllm" else MosecOracle, read.backend)


if __name__ == "__main__":
    sys.exit(main())
