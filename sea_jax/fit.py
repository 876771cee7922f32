"""The former name of `sea_jax.memory`."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: sea_jax.fit is called sea_jax.memory now: python -m sea_jax.memory --config=... , with the same flags"
    )
