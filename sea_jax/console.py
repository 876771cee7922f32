"""What a person sees of a run: our own messages, and only the warnings of the libraries."""

import logging
from pathlib import Path

from absl import logging as absl_logging

PACKAGE = str(Path(__file__).parent)


def quiet_libraries() -> None:
    """Lets through this package's messages from INFO on, everybody else's from WARNING on; one plain line each."""
    handler = absl_logging.get_absl_handler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(PACKAGE))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
