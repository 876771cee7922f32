"""Checks the shapes and dtypes of the annotations in every call that a test makes; imported before any of sea_jax."""

import functools
import importlib
import sys
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

# Where arrays go in or come out; other modules of sea_jax are imported as they are.
MODULES = (
    "sea_jax.actors",
    "sea_jax.data.batching",
    "sea_jax.data.prompts",
    "sea_jax.ensemble",
    "sea_jax.features",
    "sea_jax.learner",
    "sea_jax.losses",
    "sea_jax.models",
    "sea_jax.oracles.embedding",
    "sea_jax.oracles.preferences",
    "sea_jax.oracles.reward_model",
    "sea_jax.policy",
    "sea_jax.policy_logprobs",
    "sea_jax.replay",
    "sea_jax.runtime.processes",
    "sea_jax.sampling",
    "sea_jax.types",
)


# Who makes pytrees of shapes without arrays, or of arrays with axes before those that the fields name (scan, tree.map).
PLACEHOLDERS = ("jax.", "orbax.", "sea_jax.memory")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arrays among arguments and results; what else the annotations say is the static type checker's.

    What PLACEHOLDERS put into a pytree is not looked at.
    """
    function.__annotations__ = {
        name: annotation if _names_arrays(annotation) else Any for name, annotation in function.__annotations__.items()
    }
    check = beartype.beartype(function)
    if function.__name__ != "__init__":
        return check

    @functools.wraps(function)
    def unless_by_jax(*arguments: Any, **named: Any) -> Any:
        return None if _caller().startswith(PLACEHOLDERS) else check(*arguments, **named)

    return unless_by_jax


def _names_arrays(annotation: Any) -> bool:
    """Whether an annotation holds the shape of an array; what a function takes and returns shows when it is called."""
    if typing.get_origin(annotation) is Callable:
        return False
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_names_arrays, typing.get_args(annotation)))


def _caller() -> str:
    """The module that makes an object, behind the frames of those who check it."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("jaxtyping", "beartype"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "")


jaxtyping.install_import_hook(MODULES, f"{__name__}.checked")


def admit_host_arrays() -> None:
    """Lets functions be called with arrays of the host, which for their shapes makes no difference; pytrees stay strict.

    To be called before any other module of sea_jax is imported: they take the name from `sea_jax.types`.
    """
    types = importlib.import_module("sea_jax.types")
    types.Array = types.AnyArray  # type: ignore[attr-defined]
