"""What the laboratories' commands share: arguments, recipes by name, sizes."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from experiments.simulation import Recipe, Sizes
from sea_jax.ensemble import EnsembleSettings
from sea_jax.losses import LossSettings


def add_arguments(parser: argparse.ArgumentParser, *, queries: int, output: str) -> None:
    """Adds the arguments of every laboratory; the two given are defaults."""
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--queries", type=int, default=queries)
    parser.add_argument("--recipes", nargs="*", help="some of the names; default: all")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.01, 0.03, 0.1, 0.3], help="of the policy's Adam")
    parser.add_argument("--output", type=Path, default=Path(output))


def choose_recipes(
    parser: argparse.ArgumentParser, given: argparse.Namespace, known: Mapping[str, Recipe]
) -> dict[str, Recipe]:
    """Returns the recipes that --recipes names, or all; ends the program where there is none of a name."""
    names = given.recipes or list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--recipes: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def sizes_for(recipes: Mapping[str, Recipe], *, queries: int, batch_size: int, num_samples: int) -> Sizes:
    """Returns the sizes at which recipes are compared, with a small ERM and DPO at its own beta."""
    return Sizes(
        queries=queries,
        batch_size=batch_size,
        num_samples=num_samples,
        best_of_n=8,
        evaluations=12,
        ensemble=EnsembleSettings(num_heads=8, hidden_size=32, batch_size=64, steps=2, learning_rate=3e-3),
        loss=LossSettings(),
        rules=tuple(sorted({recipe.rule for recipe in recipes.values()})),
    )
