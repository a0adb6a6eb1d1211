"""Modules of a user's that register schedules, objectives and the like: `plugins` of a recipe, BD3_DS_PLUGINS.

They are imported before a configuration is checked. A recipe names its own; the environment variable BD3_DS_PLUGINS
(names with commas between them) and the entry points of the group `bd3_ds.plugins` of installed packages count in every
mode. What an export names is never imported for its sake: exports come from elsewhere, and importing is running.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points

from bd3_ds.runtime.errors import UserError

GROUP = "bd3_ds.plugins"
VARIABLE = "BD3_DS_PLUGINS"


def load_plugins(names: Sequence[str] = ()) -> None:
    """Import what is installed, what the environment names, and these modules.

    Modules lie in the working directory or are installed. What is imported already stays as it is. Raises UserError for
    the first that fails.
    """
    _load_installed()
    for name in filter(None, (word.strip() for word in os.environ.get(VARIABLE, "").split(","))):
        _load(name, VARIABLE)
    for name in names:
        _load(name, "plugins")


def require_plugins(names: Sequence[str], what: str) -> None:
    """Raise UserError where `what`, such as an export, was made with modules that have not been imported here."""
    load_plugins()
    missing = [name for name in names if name not in sys.modules]
    if missing:
        raise UserError(
            f"{what} was made with plugins={','.join(names)}, which an export does not bring along; set "
            f"{VARIABLE}={','.join(missing)} where its modules can be imported (the working directory, or installed)"
        )


@cache
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        _load(point.module, f"the entry point {point.name} of {GROUP}")


def _load(name: str, origin: str) -> None:
    if name in sys.modules:
        return
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # at the end, so that nothing of ours is hidden
    try:
        importlib.import_module(name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"{origin} names the module {name}, which is not in {here} and not installed; give the name of a module"
            ) from None
        raise UserError(f"{origin} names the module {name}, which needs {error.name}; install it") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f" ({one.filename}:{one.lineno})" for one in reversed(frames)), "")
        raise UserError(
            f"{origin} names the module {name}, which cannot be imported: {type(error).__name__}: {error}{place}"
        ) from None
