"""Programs that tests start as processes of their own."""

import os
import sys

if (
    os.environ.get("USE_TORCH") == "0"
):  # transformers does not look at it any more, and takes three seconds to import torch
    sys.modules["torch"] = None  # type: ignore[assignment]
