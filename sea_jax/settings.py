"""What a setting may be, and how a fault names its field."""

import importlib
import math
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda v: 0 < v < math.inf, "a finite number above 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "0 or more")
AT_LEAST_1: Check = (lambda v: v >= 1, "1 or more")
FRACTION: Check = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
GIVEN: Check = (lambda v: bool(v), "a non-empty text")
DTYPE: Check = (lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16")
URLS: Check = (
    lambda v: all(is_http(url) for url in addresses(v)),
    "http:// or https:// URLs with a host and without a path, separated by commas",
)


@contextmanager
def naming(field: str, value: object) -> Iterator[None]:
    """Lets errors name the field whose value they are about.

    Args:
      field: such as oracle.reward_model.
      value: of the field.

    Raises:
      ValueError: what is inside raised a ValueError or an OSError.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"config.{field}={value}: {error}") from error


def addresses(urls: str) -> tuple[str, ...]:
    """Returns the URLs of a field, without the slash at their end.

    Args:
      urls: separated by commas.
    """
    return tuple(url.strip().rstrip("/") for url in urls.split(",")) if urls else ()


def is_http(url: str) -> bool:
    """Returns whether a text is the URL of an HTTP server, without a path.

    Args:
      url: any text.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    plain = not (parts.path or parts.query or parts.fragment or parts.username)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def one_of(*names: str) -> Check:
    """Returns a check for one of some names."""
    return lambda v: v in names, f"one of {', '.join(names)}"


def one_of_numbers(*numbers: int) -> Check:
    """Returns a check for one of some numbers."""
    return lambda v: v in numbers, f"one of {', '.join(map(str, numbers))}"


def one_of_or_user(names: Mapping[str, Any] | tuple[str, ...]) -> Check:
    """Returns a check for one of some names, or my_module:my_function."""
    return lambda v: v in names or v.count(":") == 1, f"one of {', '.join(names)}, or my_module:my_function"


def user_function(name: str, field: str) -> Callable[..., Any]:
    """Returns the user's own function.

    Args:
      name: my_module:my_function, importable from where the program was started.
      field: the config field it stands in, for the error.

    Returns:
      The function.

    Raises:
      ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"config.{field}={name}: {error}; give the name of an importable function") from error
    if not callable(found):
        raise ValueError(f"config.{field}={name}: expected a function, found {type(found).__name__}")
    return found
