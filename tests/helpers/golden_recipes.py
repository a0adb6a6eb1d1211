"""Every recipe as it resolves, kept in tests/golden/recipes, so that a changed default shows in review.

`python -m tests.helpers.golden_recipes` writes the files anew; the test compares.
"""

from __future__ import annotations

from pathlib import Path

from bd3_ds.config.load import CONFIGS, load_recipe, to_yaml

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "recipes"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))


def main() -> None:
    """Write one file a recipe and drop those whose recipe is gone."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in GOLDEN.glob("*.yaml"):
        file.unlink()
    for recipe in RECIPES:
        (GOLDEN / recipe.name).write_text(to_yaml(load_recipe(str(recipe), [])))


if __name__ == "__main__":
    main()
