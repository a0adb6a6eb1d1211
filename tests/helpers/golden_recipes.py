"""What every recipe resolves to beyond the defaults, kept in tests/golden/recipes, so that a change shows in review.

A changed default shows in configs/base.yaml itself, and a new key changes none of these files.
`python -m tests.helpers.golden_recipes` writes them anew; the test compares.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from bd3_ds.config.keys import flat
from bd3_ds.config.load import load_defaults, load_recipe
from bd3_ds.config.merge import CONFIGS
from bd3_ds.config.schema import RunConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "recipes"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))


def golden_text(run: RunConfig) -> str:
    """The keys whose values are not those of base.yaml, dotted, as YAML."""
    defaults = flat(load_defaults({"run_dir": "none", "data.train": "none"}, "the test"))
    return yaml.safe_dump({key: value for key, value in flat(run).items() if value != defaults[key]}, sort_keys=False)


def main() -> None:
    """Write one file a recipe and drop those whose recipe is gone."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in GOLDEN.glob("*.yaml"):
        file.unlink()
    for recipe in RECIPES:
        (GOLDEN / recipe.name).write_text(golden_text(load_recipe(str(recipe), [])))


if __name__ == "__main__":
    main()
