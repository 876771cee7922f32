"""What a setting is: one field of a frozen dataclass that says its default, unit, source and range, beside what it sets."""

import dataclasses
import importlib
import json
import math
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Check = tuple[Callable[[Any], bool], str]


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object, or nothing."""
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        return False


ANY: Check = (lambda v: True, "")
POSITIVE: Check = (lambda v: 0 < v < math.inf, "a finite number above 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "0 or more")
AT_LEAST_1: Check = (lambda v: v >= 1, "1 or more")
FRACTION: Check = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
BELOW_1: Check = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
GIVEN: Check = (lambda v: bool(v), "a non-empty text")
DTYPE: Check = (lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16")
JSON_OBJECT: Check = (_is_object, "a JSON object")
URLS: Check = (
    lambda v: all(is_http(url) for url in addresses(v)),
    "http:// or https:// URLs with a host and without a path, separated by commas",
)

NOT_THERE = dataclasses.MISSING  # of a value that older versions had: the default


def setting(
    default: Any, says: str, must: Check = ANY, *, unit: str = "", source: str = "", before: Any = NOT_THERE
) -> Any:
    """Returns a field of a dataclass of settings.

    Args:
      default: the only one there is.
      says: what the setting is, in a line.
      must: what it may be.
      unit: of a number.
      source: where the default comes from.
      before: what a run that was begun before there was the setting did; the default where it is not given.
    """
    told = {
        "says": says,
        "must": must,
        "unit": unit,
        "source": source,
        "before": default if before is NOT_THERE else before,
    }
    return dataclasses.field(default=default, metadata=told)


def section(settings: type) -> Any:
    """Returns a field that holds the settings of a part."""
    return dataclasses.field(default_factory=settings)


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yields every setting with its dotted name and its value."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def faults(settings: Any, prefix: str = "") -> Iterator[str]:
    """Yields a line for every value that cannot work: its name, what was found, what would do.

    A part with a method `faults` adds lines about its settings together.
    """
    for name, field, value in walk(settings, prefix):
        holds, wanted = field.metadata["must"]
        if not holds(value):
            yield f"config.{name}={value!r}: must be {wanted}"
    for field in dataclasses.fields(settings):
        part = getattr(settings, field.name)
        if hasattr(part, "faults"):
            yield from part.faults()


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
    return is_http_path(url) and not urllib.parse.urlsplit(url).path


def is_http_path(url: str) -> bool:
    """Returns whether a text is the URL of an HTTP server and perhaps a path there, without anything else.

    Args:
      url: any text.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or parts.username)
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
