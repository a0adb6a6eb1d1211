"""The modelling code as flat files that transformers can load without this package.

One source of truth: the files are those of the package, with absolute imports of it turned into relative ones. This
works in the package and in such a copy of it, so that a model saved anywhere carries its code on.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

PACKAGE = "bd3_ds"
_HERE = __name__.rpartition(".")[0]
_MODELING = "modeling_bd3_ds"
_OURS = re.compile(rf"^(\s*)from {PACKAGE}\.[\w.]*?(\w+) import", re.MULTILINE)


def code_files() -> dict[str, str]:
    """File name -> text: the modelling code first, then all that it needs of this package."""
    root = f"{_HERE}.{_MODELING}"
    waiting, found = [root, *_backends()], dict[str, str]()
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = _source(name)
            waiting += _imported(found[name])
    files = {name.rpartition(".")[2]: _OURS.sub(r"\1from .\2 import", text) for name, text in found.items()}
    assert len(files) == len(found), "two modules of one name cannot lie in one folder"
    # Of a local folder transformers takes the files that the modelling code imports, and not those imported there.
    unnamed = sorted(set(files) - {_MODELING} - {name.rpartition(".")[2] for name in _imported(found[root])})
    if unnamed:
        named = "".join(f"from .{name} import __name__ as _{name}  # noqa: E402, F401\n" for name in unnamed)
        files[_MODELING] += (
            f"\n# transformers copies the files that this one imports, not those imported there.\n{named}"
        )
    return {f"{name}.py": text for name, text in files.items()}


def write_code(directory: Path) -> None:
    """Put the files into a model's folder."""
    for name, text in code_files().items():
        (directory / name).write_text(text, encoding="utf-8")


def _backends() -> list[str]:
    """Modules of attention backends: a registry imports them, nobody by name. In a copy the modelling code does."""
    if _HERE.partition(".")[0] != PACKAGE:
        return []
    home = importlib.import_module(f"{PACKAGE}.model.attention.backends")
    return [f"{home.__name__}.{module.name}" for module in pkgutil.iter_modules(home.__path__)]


def _source(name: str) -> str:
    file = importlib.import_module(name).__file__
    assert file is not None
    return Path(file).read_text(encoding="utf-8")


def _imported(text: str) -> list[str]:
    """Modules of ours that a file imports, by their full names."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 1:
            names.append(f"{_HERE}.{node.module}")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            names.append(node.module)
    return names
