"""Where things are kept that can be made again: compiled programs, and models under a name of the user's."""

from pathlib import Path

import jax

from sea_jax.builtin import cache_dir

PREFIX = "cache:"


def resolve(name: str) -> Path:
    """Returns the directory that a config field names.

    Args:
      name: a path, or cache:NAME for a directory inside the cache.

    Returns:
      The path; it need not exist.
    """
    return cache_dir() / name.removeprefix(PREFIX) if name.startswith(PREFIX) else Path(name).expanduser()


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the cache, so that nothing is compiled twice."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
