"""Serves a policy on vLLM: writes responses and takes new weights.

python -m gpu_bridge.serve_policy --model=DIR --port=8101
"""

import sys
from pathlib import Path

from gpu_bridge import protocol
from gpu_bridge.server import serve
from gpu_bridge.server.backend import VllmPolicy


def main() -> int:
    """Reads the flags and serves."""
    flags = serve.parser(protocol.POLICY, "Serves a policy: writes responses and takes new weights.", "bfloat16")
    flags.add_argument(
        "--weights_dir", type=Path, help="directory, besides /dev/shm, where the learner may leave weights"
    )
    read, extra = serve.parse(flags, sys.argv[1:])
    return serve.run(protocol.POLICY, read, extra, VllmPolicy, "vllm")


if __name__ == "__main__":
    sys.exit(main())
