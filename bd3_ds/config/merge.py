"""Merges files and key=value overrides into a tree of the schema, key by key; problems are sentences in a list."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bd3_ds.config.keys import Key, leaves, schema_keys
from bd3_ds.config.overrides import override_value, reject_spaced
from bd3_ds.config.rules import PathText, Range
from bd3_ds.config.values import Unfit, at_home, convert, describe, is_optional
from bd3_ds.config.yaml_file import read_file, resolved
from bd3_ds.runtime.errors import did_you_mean
from bd3_ds.runtime.resources import shipped

CONFIGS = shipped("configs")


def empty_tree(cls: Any) -> DictConfig:
    """A writable tree of a dataclass and its sections, all leaves missing."""
    tree = OmegaConf.structured(cls)
    OmegaConf.set_readonly(tree, False)
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            tree[name] = empty_tree(annotation)
    assert isinstance(tree, DictConfig)
    return tree


def merge_file(tree: DictConfig, path: Path, what: str = "recipe", above: tuple[Path, ...] = ()) -> list[str]:
    """Merge a file and what it includes into `tree`; `above` are the files that include this one."""
    if path in above:
        return [f"{path} includes itself"]
    content = read_file(path, what, CONFIGS / "recipes")
    includes = content.pop("include", None) or []
    if not isinstance(includes, list):
        return [f"include in {path} must be a list such as [model/tiny]"]
    problems = []
    for name in includes:
        part = CONFIGS / f"{name}.yaml"
        if not part.is_file():
            known = [p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml")]
            problems.append(f"include '{name}' in {path} is unknown; {did_you_mean(str(name), known)}")
            continue
        problems += merge_file(tree, part, above=(*above, path))
    return problems + merge_tree(tree, content, str(path))


def put(content: dict[str, Any], names: list[str], value: Any) -> None:
    """Set the value at the end of a path of names in nested mappings, which are made where they are missing."""
    for name in names[:-1]:
        content = content.setdefault(name, {})
    content[names[-1]] = value


def merge_overrides(tree: DictConfig, overrides: list[str]) -> list[str]:
    """Merge the key=value overrides of a command line; each key once."""
    overrides, problems = reject_spaced(overrides)
    seen: set[str] = set()
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip():
            problems.append(f"'{word}' is not an override; write key=value, such as optim.lr=1e-4")
        elif key in seen:
            problems.append(f"{key} is given twice on the command line; keep one")
        else:
            problems += _merge_override(tree, word)
        seen.add(key)
    return problems


def _merge_override(tree: DictConfig, word: str) -> list[str]:
    known = schema_keys()
    key, _, text = word.partition("=")
    # eval.sets.NAME=DIR adds one set; eval.sets={…} gives them all.
    whole = next((one for one in known if key.startswith(one + ".")), None)
    names = [*whole.split("."), key[len(whole) + 1 :]] if whole else key.split(".")
    kind = known[key].annotation if key in known else None
    if whole and known[whole].is_mapping:
        kind = typing.get_args(known[whole].annotation)[-1]
    if text == "" and kind is not str:
        return [f"{key}= has no value" + ("; write null for none" if is_optional(kind) else "")]
    hint = "; YAML needs a space after each ':' in braces" if re.search(r"\{.*:\S", word) else ""
    try:
        value = resolved(override_value(text, kind))
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        return [f"'{word}' cannot be read: {' '.join(str(error).split())}{hint}"]
    content: dict[str, Any] = {}
    put(content, names, value)
    hint = hint if key in known and known[key].is_mapping else ""
    found = merge_tree(tree, content, "the command line", merge=whole is not None, as_it_stands=True)
    return [problem + hint for problem in found]


def merge_tree(
    tree: DictConfig, content: dict[Any, Any], origin: str, merge: bool = False, as_it_stands: bool = False
) -> list[str]:
    """Merge nested values from `origin`; `merge`: entries of mappings are added to those that are there.

    `as_it_stands`: unquoted text may look like a number, as on the command line.
    """
    problems, known, seen = [], schema_keys(), set()
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for key, value in leaves(content):
        if value == MISSING:
            continue
        if key in seen:
            problems.append(f"{key} is given twice in {origin}; keep one")
        elif key in sections:
            example = next(one for one in known if one.startswith(key + "."))
            problems.append(f"{key} in {origin} must be a section; set the keys in it, such as {example}")
        elif key not in known:
            problems.append(f"unknown key {key} in {origin}; {_nearest(key, known)}")
        else:
            try:
                OmegaConf.update(tree, key, _value(value, known[key], as_it_stands), merge=merge)
            except (Unfit, OmegaConfBaseException) as error:
                reason = error if isinstance(error, Unfit) else f"must be {describe(known[key].annotation)}"
                problems.append(f"{key}={_shown(value)} in {origin} {reason}")
        seen.add(key)
    return problems


def _value(value: Any, key: Key, as_it_stands: bool) -> Any:
    """Of the key's type; raises Unfit."""
    if isinstance(key.rule, PathText):
        return at_home(convert(value, key.annotation, as_it_stands), key.rule.in_keys)
    if not isinstance(key.rule, Range) or not key.rule.words:
        return convert(value, key.annotation, as_it_stands)
    if value in key.rule.words:
        return key.rule.words[value]
    try:
        number = convert(value, key.annotation)
    except Unfit as error:
        raise Unfit(f"{error}{key.rule.or_words}") from None
    if isinstance(value, str) and number in key.rule.words.values():  # written as the number that stands for a word
        raise Unfit(f"must {key.rule.must}")
    return number


def _shown(value: Any) -> str:
    """As YAML has it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _nearest(key: str, known: Iterable[str]) -> str:
    """A half-sentence that names the keys that may be meant: those with the same last part, or the most alike."""
    last = key.rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] == last]
    return did_you_mean(key, known, first=same, otherwise="configs/base.yaml lists all keys")
