"""Who may import whom: rooms that do not know each other can be tested, and changed, one at a time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# docs/map.md explains the table; a package may always import itself.
_BASE = {"runtime", "config"}
MAY_IMPORT = {
    "runtime": set(),
    "config": {"runtime"},
    "data": _BASE,
    "diffusion": _BASE,
    "model": _BASE,
    "checkpoint": _BASE,
    "parallel": _BASE | {"model"},
    "sampling": _BASE | {"diffusion", "model"},
    "interop": _BASE | {"data", "model", "checkpoint"},
    "train": _BASE | {"data", "diffusion", "model", "checkpoint", "parallel", "interop"},
    "planning": _BASE | {"data", "diffusion", "model", "checkpoint", "parallel", "train"},
    "evaluation": _BASE | {"data", "diffusion", "model", "checkpoint", "sampling", "interop"},
    "report": _BASE,
    "launch": _BASE,
    "data_prep": _BASE | {"data"},
    "hub": {"data", "interop"},  # one file: `import bd3_ds.hub` registers our classes with transformers
    "commands": _BASE
    | {"data", "diffusion", "model", "checkpoint", "sampling", "interop", "train", "planning", "evaluation", "report"},
}

# A library is imported by these files and directories alone, so that a new version of it is met in one place.
HOMES = {
    "deepspeed": (
        "bd3_ds/train/engine.py",
        "bd3_ds/train/hardware.py",
        "bd3_ds/train/optimizers.py",
        "bd3_ds/runtime/world.py",
        "bd3_ds/parallel/",
    ),
    "omegaconf": ("bd3_ds/config/",),
    "streaming": ("bd3_ds/data/", "data_prep/"),
    "transformers": (
        "bd3_ds/data/tokenizer.py",
        "bd3_ds/evaluation/text/gen_ppl.py",
        "bd3_ds/hub.py",
        "bd3_ds/interop/",
    ),
}

# Imported before a configuration is found to be good, so torch must not come with them.
LIGHT = (
    "run.py",
    "bd3_ds/config/",
    "bd3_ds/diffusion/objectives/",
    "bd3_ds/diffusion/schedules.py",
    "bd3_ds/diffusion/weighting.py",
    "bd3_ds/model/attention/backends/",
    "bd3_ds/train/optimizers.py",
    "bd3_ds/train/preflight.py",
    "bd3_ds/commands/train.py",
)

FILES = [ROOT / "run.py", *sorted((ROOT / "bd3_ds").rglob("*.py")), *sorted((ROOT / "data_prep").rglob("*.py"))]


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Dotted names that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(dotted: str) -> str | None:
    """The package of ours that a dotted name lies in; None for the top of bd3_ds and for libraries."""
    first, *rest = dotted.split(".")
    if first == "bd3_ds":
        return rest[0] if len(rest) > 1 or (rest and rest[0] in MAY_IMPORT) else None
    return first if first == "data_prep" else None


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = package(name(path).removesuffix(".py").replace("/", "."))
    for dotted in imports(ast.walk(tree)):
        library = dotted.split(".")[0]
        if library in HOMES:
            assert name(path).startswith(HOMES[library]), f"{name(path)} imports {library}"
        other = package(dotted)
        if own is not None and other not in (None, own):
            assert other in MAY_IMPORT[own], f"{name(path)} imports {dotted}"
    if name(path).startswith(LIGHT):
        assert not any(dotted.split(".")[0] == "torch" for dotted in imports(tree.body))


def test_every_package_is_in_the_table() -> None:
    found = {path.parent.name for path in (ROOT / "bd3_ds").glob("*/__init__.py")}
    assert found | {"data_prep", "hub"} == set(MAY_IMPORT)


def module_of(path: Path) -> str:
    return name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def needs() -> dict[str, set[str]]:
    """The modules of ours that each imports, anywhere in it but for type checkers alone."""
    known = {module_of(path) for path in FILES}
    graph = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        found = {part for dotted in imports(ast.walk(tree)) for part in (dotted, dotted.rpartition(".")[0])}
        graph[module_of(path)] = (found & known) - {module_of(path)}
    return graph


def test_there_is_no_circle() -> None:
    """Modules are taken away as long as there is one that needs no other; a circle is what stays."""
    graph = needs()
    while free := {module for module, wanted in graph.items() if not wanted & graph.keys()}:
        graph = {module: wanted for module, wanted in graph.items() if module not in free}
    assert graph == {}
