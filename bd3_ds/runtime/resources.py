"""Files that come with the code, `configs/` and `ds_configs/`: beside the package in a checkout, in it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # the checkout, or the site-packages that the package is installed in


def shipped(folder: str) -> Path:
    """The directory of `configs` or `ds_configs`; pyproject.toml puts both into the wheel under bd3_ds/."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else ROOT / folder


def find_shipped(name: str, folder: str, suffix: str) -> Path:
    """The file that a user means by `name`: his own, else one that is shipped in `folder`.

    `configs/recipes/docs_pretrain.yaml` and plain `docs_pretrain` name the same shipped recipe from anywhere. What is
    neither comes back as it was given, for the reader to say that it is not there.
    """
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    top = folder.partition("/")[0]
    place = shipped(top) / folder.removeprefix(top).lstrip("/")
    within = path.relative_to(folder) if path.is_relative_to(folder) else path if path.parent == Path(".") else None
    if within is None:
        return path
    found = place / (within if within.suffix == suffix else f"{within}{suffix}")
    return found if found.is_file() else path
