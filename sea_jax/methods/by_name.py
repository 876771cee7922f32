"""Every built-in method by the name that `config.method` gives it."""

from collections.abc import Callable, Mapping

from sea_jax.agent import FillSlots
from sea_jax.config import RunSettings
from sea_jax.methods.apl import apl
from sea_jax.methods.information_directed import information_directed
from sea_jax.methods.online import iterative, offline, online, selm
from sea_jax.methods.reinforce import ppo, reinforce
from sea_jax.methods.sea import dyna, sea
from sea_jax.methods.variants import VARIANTS
from sea_jax.methods.xpo import xpo

METHODS: Mapping[str, Callable[[RunSettings], FillSlots]] = {
    "sea": sea,
    "dyna": dyna,
    "information_directed": information_directed,
    "reinforce": reinforce,
    "ppo": ppo,
    "offline": offline,
    "iterative": iterative,
    "online": online,
    "apl": apl,
    "xpo": xpo,
    "selm": selm,
    **VARIANTS,
}
