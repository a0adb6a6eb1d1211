"""Loads files and key=value overrides into one frozen RunConfig, and back; all problems are reported together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bd3_ds.config.keys import flat, schema_keys
from bd3_ds.config.merge import CONFIGS, empty_tree, merge_file, merge_overrides, merge_tree, put
from bd3_ds.config.plugins import load_plugins
from bd3_ds.config.rules import Range
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.resources import find_shipped


def load_recipe(recipe: str, overrides: list[str]) -> RunConfig:
    """base.yaml, the recipe's includes, the recipe itself and the overrides; raises UserError with all problems.

    recipe: a YAML file, or one that is shipped: `configs/recipes/docs_pretrain.yaml` or `docs_pretrain` from anywhere.
    The modules that it names under `plugins` are imported.
    """
    path = find_shipped(recipe, "configs/recipes", ".yaml")
    tree = empty_tree(RunConfig)
    problems = [*merge_file(tree, CONFIGS / "base.yaml"), *merge_file(tree, path), *merge_overrides(tree, overrides)]
    missing = [] if problems else sorted(OmegaConf.missing_keys(tree))
    problems += [f"{key} has no value; give it in {path} or as {key}=…" for key in missing]
    if problems:
        raise UserError(*problems)
    run = _freeze(tree)
    load_plugins(run.plugins)
    return run


def load_resolved(path: Path) -> RunConfig:
    """A configuration as `to_yaml` wrote it; keys that came into being since then have their defaults."""
    tree = empty_tree(RunConfig)
    problems = [*merge_file(tree, CONFIGS / "base.yaml"), *merge_file(tree, path, "configuration")]
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing and not problems:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems = [f"configuration {path} is not complete: it lacks {', '.join(missing[:3])}{rest}"]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def load_defaults(values: dict[str, Any], origin: str) -> RunConfig:
    """base.yaml with `values` (dotted key -> value, from `origin`) over it, for a model that no recipe made."""
    tree = empty_tree(RunConfig)
    content: dict[str, Any] = {}
    for key, value in values.items():
        put(content, key.split("."), value)
    problems = [*merge_file(tree, CONFIGS / "base.yaml"), *merge_tree(tree, content, origin)]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def from_values(values: dict[str, Any], origin: str) -> RunConfig:
    """The configuration of nested plain values (from `origin`), as `dataclasses.asdict` and then JSON make of one.

    JSON's keys are strings; where the schema has numbers they are turned back. Keys that are missing have their
    defaults; raises UserError for all else that is wrong.
    """
    if "${" in str(values):
        raise UserError(f"{origin} holds ${{…}}, which a resolved configuration does not")
    tree = empty_tree(RunConfig)
    problems = [*merge_file(tree, CONFIGS / "base.yaml"), *merge_tree(tree, values, origin)]
    problems = problems or [f"{origin} lacks {key}" for key in sorted(OmegaConf.missing_keys(tree))]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def override(run: RunConfig, overrides: list[str], allowed: tuple[str, ...]) -> RunConfig:
    """`run` with key=value overrides over it, of keys that begin with one of `allowed`; raises UserError."""
    merged = empty_tree(RunConfig)
    problems = merge_tree(merged, dataclasses.asdict(run), "the export")
    problems += [
        f"{word.partition('=')[0]} cannot be changed here; keys that can begin with {', '.join(allowed)}"
        for word in overrides
        if not word.startswith(allowed)
    ]
    problems = problems or merge_overrides(merged, overrides)
    if problems:
        raise UserError(*problems)
    return _freeze(merged)


def to_yaml(run: RunConfig) -> str:
    """The resolved configuration as YAML that `load_resolved` reads back."""
    values = dataclasses.asdict(run)
    for key, value in flat(run).items():
        rule = schema_keys()[key].rule
        for word, number in rule.words.items() if isinstance(rule, Range) else ():
            if value == number:
                put(values, key.split("."), word)
    return str(OmegaConf.to_yaml(OmegaConf.create(values)))


def _freeze(tree: DictConfig) -> RunConfig:
    run = OmegaConf.to_object(tree)
    assert isinstance(run, RunConfig)
    return run
