"""How a main meets a person: flags, our own messages and only the warnings of the libraries, one line for a foreseen error."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from sea_jax.runtime import processes
from sea_jax.runtime.metrics import NotFiniteError

CONFIG = config_flags.DEFINE_config_file("config", help_string="Path of the configuration file.", lock_config=True)

HELP_CONFIG = flags.DEFINE_bool("help_config", False, "Print every field of the configuration, and stop.")

DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", True, "On GPUs: the same numbers every time, without which a stopped run may not go on."
)

PACKAGE = str(Path(__file__).parent.parent)
QUOTES = "\"'\\"  # around the names in a KeyError's text
FORESEEN = (ValueError, OSError, NotFiniteError)


def run(job: Callable[[], None], required: str = "config") -> None:
    """Parses the flags and does the job; a foreseen error becomes one message and exit status 1.

    Args:
      job: reads the flags and does everything.
      required: name of the flag that must be given.
    """

    def main(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            hint = "; fields are set as --config.FIELD=VALUE" if required == CONFIG.name else ""
            sys.exit(f"error: unexpected arguments {arguments[1:]}{hint}")
        quiet_libraries()
        try:
            job()
        except FORESEEN as error:
            if absl_logging.level_debug():
                raise
            sys.exit(f"error: {error}")

    flags.mark_flag_as_required(required)
    app.run(main, flags_parser=parse)


def prepare_devices() -> None:
    """Asks for reproducible kernels, unless a flag says otherwise; before JAX is used.

    A run that goes on from a checkpoint must come past the same texts, or the labels that were paid for would belong to others:
    sums in an order that changes from one time to the next, as GPUs take them for speed, would tell other tokens apart.
    """
    if DETERMINISTIC.value and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def parse(arguments: Sequence[str]) -> Sequence[str]:
    """Parses the flags and returns what is none; a config file or field that is not there becomes one message."""
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        lines = str(error).strip().splitlines()
        # A configuration file that raises comes with its whole traceback, of which the last line says why.
        reason = f"--config: {lines[-1]}" if any(line.startswith("Traceback") for line in lines) else str(error)
        sys.exit(f"error: {reason}; --help lists the flags")
    except (AttributeError, KeyError) as error:  # raised by a locked configuration for a field that it does not have
        overrides = ", ".join(argument for argument in arguments if argument.startswith("--config."))
        sys.exit(
            f"error: no such field in the configuration: {str(error.args[0]).strip(QUOTES)}\nset were: {overrides}"
        )
    except FileNotFoundError as error:
        sys.exit(f"error: --config: {error}")


def quiet_libraries() -> None:
    """Lets through this package's messages from INFO on, everybody else's from WARNING on; one plain line each."""
    handler = absl_logging.get_absl_handler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(PACKAGE))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))


WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory for everything the run writes; train: default runs/NAME-seedSEED."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: HOST:PORT of the first, or auto where the cluster (Slurm, TPU, ...) tells."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator=HOST:PORT: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator=HOST:PORT: which one this is, from 0.")


def join_processes() -> None:
    """Joins the processes of a run that the flags speak of.

    Raises:
      ValueError: the flags do not name all that is needed.
    """
    if not COORDINATOR.value:
        return
    if COORDINATOR.value == "auto":
        processes.connect()
        return
    if NUM_PROCESSES.value is None or PROCESS_ID.value is None:
        raise ValueError("--coordinator=HOST:PORT needs --num_processes and --process_id too")
    processes.connect(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
