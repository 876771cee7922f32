"""What this machine can do at best, and how many of its processors a measurement gets."""

import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

# Rows, inner and columns: a large square, and the shapes in which a small decoder spends its time.
MATMUL_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (2304, 576, 1536), (2304, 1536, 576))
COPY_BYTES = 256 * 2**20  # far more than any cache holds


def confine(threads: int) -> None:
    """Gives this process so many processors, and starts it anew if PyTorch's threads would otherwise spin.

    XLA makes one thread per processor that the process may use; PyTorch reads these settings when it is loaded. OpenMP
    threads that spin while they wait would take the processors from whatever is measured next.

    Args:
      threads: processors, for XLA and PyTorch alike.

    Raises:
      ValueError: the process may use fewer.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < threads:
        raise ValueError(f"--threads={threads}: this process may use {len(processors)} processors")
    os.sched_setaffinity(0, processors[:threads])
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)
    torch.set_num_threads(threads)


def best_s(run: Callable[[], object], repeats: int = 7) -> float:
    """Returns the seconds of the fastest run; the first, which may compile, is left out.

    Args:
      run: returns when the work is done.
      repeats: runs that count.
    """
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_flops(dtype: str) -> dict[str, float]:
    """Returns the most floating-point operations per second of a matrix product, in XLA and in PyTorch.

    Args:
      dtype: "float32" or "bfloat16".

    Returns:
      {"xla", "torch"}, operations per second; a product of [m, k] and [k, n] counts 2 m k n.
    """
    multiply = jax.jit(jnp.matmul)
    best = {"xla": 0.0, "torch": 0.0}
    for m, k, n in MATMUL_SHAPES:
        left, right = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((m, k), (k, n)))
        torch_left, torch_right = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
        seconds = {
            "xla": best_s(lambda a=left, b=right: multiply(a, b).block_until_ready()),  # type: ignore[misc]
            "torch": best_s(lambda a=torch_left, b=torch_right: a @ b),  # type: ignore[misc]
        }
        best = {name: max(best[name], 2 * m * k * n / seconds[name]) for name in best}
    return best


def copy_bandwidth() -> float:
    """Returns the bytes per second that a copy reads and writes, all processors of this process at work."""
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.zeros(COPY_BYTES // 4)
    seconds = min(
        best_s(lambda: target.copy_(source)),
        best_s(lambda: np.copyto(target.numpy(), source.numpy())),
    )
    return 2 * COPY_BYTES / seconds
