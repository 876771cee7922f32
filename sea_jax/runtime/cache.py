"""Where things are kept that can be made again: compiled programs, and models under a name of the user's."""

import os
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Returns the directory for downloaded and derived files: $SEA_JAX_CACHE, else ~/.cache/sea_jax."""
    return Path(os.environ.get("SEA_JAX_CACHE") or "~/.cache/sea_jax").expanduser()


PREFIX = "cache:"


def resolve(name: str) -> Path:
    """Returns the directory, which need not exist, that a config field names: a path, or cache:NAME inside the cache."""
    return cache_dir() / name.removeprefix(PREFIX) if name.startswith(PREFIX) else Path(name).expanduser()


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the cache, so that nothing is compiled twice."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Also the small ones: a run has a hundred of them, and each takes longer to compile than to read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
