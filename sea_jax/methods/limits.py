"""What a method cannot take, said before anything is loaded."""

import functools
from collections.abc import Mapping
from typing import Any

from sea_jax.config import RunSettings
from sea_jax.settings import Check


def exactly(value: Any) -> Check:
    """Returns a check for one value."""
    return lambda v: v == value, f"{value}"


def check(settings: RunSettings, because: str, takes: Mapping[str, Check]) -> None:
    """Refuses settings that would be passed over, or without which the method is another.

    Args:
      settings: of the run.
      because: what the method is that it cannot take others, a verb first.
      takes: name of a setting -> what it may be.

    Raises:
      ValueError: one line for each that is something else.
    """
    found = {name: functools.reduce(getattr, name.split("."), settings) for name in takes}
    faults = [
        f"config.{name}={found[name]}: method={settings.method} {because} and takes only {takes[name][1]}"
        for name in takes
        if not takes[name][0](found[name])
    ]
    if faults:
        raise ValueError("\n".join(faults))
