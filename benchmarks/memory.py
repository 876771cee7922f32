"""The most memory that one side of the step takes, in a process of its own that benchmarks.step starts."""

import importlib
import pickle
import re
import sys
from pathlib import Path

from benchmarks.inputs import Step


def main(side: str, path: str) -> None:
    """Runs one round and prints the process's peak resident bytes.

    Args:
      side: "ours" or "torch".
      path: a pickle of Settings, Inputs and the directories of policy and encoder.
    """
    sizes, inputs, policy, encoder = pickle.loads(Path(path).read_bytes())
    # Only one of the two libraries is loaded.
    module, name = {"ours": ("jax_step", "JaxStep"), "torch": ("torch_step", "TorchStep")}[side]
    step: Step = getattr(importlib.import_module(f"benchmarks.{module}"), name)(sizes, inputs, policy, encoder)
    step.generate(0, sizes.new_tokens)
    step.features()
    step.oracle(inputs.posts, 0)
    step.erm(0)
    step.learn()
    # The kernel's own mark of this program alone; getrusage goes on from that of the process that started it.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(int(peak[1]) * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
