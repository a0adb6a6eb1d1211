"""From files and key=value words to one frozen RunConfig; every problem found is reported, not the first alone."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load_recipe(recipe: str, overrides: list[str]) -> RunConfig:
    """base.yaml, the recipe's includes, the recipe itself and the overrides; raises UserError with all problems."""
    path = Path(recipe)
    tree = _empty(RunConfig)
    problems = [*_merge_file(tree, CONFIGS / "base.yaml"), *_merge_file(tree, path), *_merge_words(tree, overrides)]
    missing = [] if problems else sorted(OmegaConf.missing_keys(tree))
    problems += [f"{key} has no value; give it in {path} or as {key}=…" for key in missing]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def load_resolved(path: Path) -> RunConfig:
    """A configuration as `to_yaml` wrote it; keys that came into being since then have their defaults."""
    tree = _empty(RunConfig)
    problems = [*_merge_file(tree, CONFIGS / "base.yaml"), *_merge_file(tree, path, "configuration")]
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing and not problems:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems = [f"configuration {path} is not complete: it lacks {', '.join(missing[:3])}{rest}"]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def load_defaults(values: dict[str, Any], origin: str) -> RunConfig:
    """base.yaml with `values` (dotted key -> value, from `origin`) over it, for a model that no recipe made."""
    tree = _empty(RunConfig)
    content = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(content, key, value)
    problems = [*_merge_file(tree, CONFIGS / "base.yaml"), *_merge_tree(tree, content, origin)]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def from_values(values: dict[str, Any], origin: str) -> RunConfig:
    """The configuration of nested plain values (from `origin`), as `dataclasses.asdict` and then JSON make of one.

    JSON's keys are words; where the schema wants numbers they are turned back. Keys that are missing have their
    defaults; raises UserError for all else that is wrong.
    """
    if "${" in str(values):
        raise UserError(f"{origin} holds ${{…}}, which a resolved configuration does not")
    tree = _empty(RunConfig)
    content = OmegaConf.create(_with_numbers(values, RunConfig, origin))
    problems = [*_merge_file(tree, CONFIGS / "base.yaml"), *_merge_tree(tree, content, origin)]
    problems = problems or [f"{origin} lacks {key}" for key in sorted(OmegaConf.missing_keys(tree))]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def override(run: RunConfig, words: list[str], allowed: tuple[str, ...]) -> RunConfig:
    """`run` with key=value words over it, of keys that begin with one of `allowed`; raises UserError."""
    merged = _empty(RunConfig)
    problems = _merge_tree(merged, OmegaConf.structured(run), "the export")
    problems += [
        f"{word.partition('=')[0]} cannot be changed here; keys that can begin with {', '.join(allowed)}"
        for word in words
        if not word.startswith(allowed)
    ]
    problems = problems or _merge_words(merged, words)
    if problems:
        raise UserError(*problems)
    return _freeze(merged)


def to_yaml(run: RunConfig) -> str:
    """The resolved configuration as YAML that `load_resolved` reads back."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(run)))


def flat(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, sets of evaluation packs as one value."""
    return dict(_leaves(OmegaConf.structured(run), RunConfig))


def _empty(cls: Any) -> DictConfig:
    """A writable tree of a dataclass and its sections, all leaves missing."""
    tree = OmegaConf.structured(cls)
    OmegaConf.set_readonly(tree, False)
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            tree[name] = _empty(annotation)
    assert isinstance(tree, DictConfig)
    return tree


def _freeze(tree: DictConfig) -> RunConfig:
    run = OmegaConf.to_object(tree)
    assert isinstance(run, RunConfig)
    return run


def _with_numbers(values: dict[str, Any], cls: Any, origin: str) -> dict[str, Any]:
    """`values` with the keys of mappings as the schema has them; raises UserError for a section that is none."""
    hints = typing.get_type_hints(cls)
    done: dict[str, Any] = {}
    for key, value in values.items():
        annotation = hints.get(key)
        if dataclasses.is_dataclass(annotation):
            if not isinstance(value, dict):
                raise UserError(f"{key} in {origin} must be a section, not {value}")
            value = _with_numbers(value, annotation, origin)
        elif (
            typing.get_origin(annotation) is dict and typing.get_args(annotation)[0] is int and isinstance(value, dict)
        ):
            value = {int(word) if str(word).isdecimal() else word: number for word, number in value.items()}
        done[key] = value
    return done


def _merge_file(tree: DictConfig, path: Path, what: str = "recipe", above: tuple[Path, ...] = ()) -> list[str]:
    """Merge a file and what it includes into `tree`; `above` are the files that include this one."""
    if path in above:
        return [f"{path} includes itself"]
    content = _read_yaml(path, what)
    includes = content.pop("include", [])
    if not OmegaConf.is_list(includes) and includes:
        return [f"include in {path} must be a list such as [model/tiny]"]
    problems = []
    for name in includes:
        part = CONFIGS / f"{name}.yaml"
        if not part.is_file():
            known = [p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml")]
            problems.append(f"include '{name}' in {path} is unknown; {did_you_mean(str(name), known)}")
            continue
        problems += _merge_file(tree, part, above=(*above, path))
    return problems + _merge_tree(tree, content, str(path))


def _read_yaml(path: Path, what: str) -> DictConfig:
    try:
        content = OmegaConf.load(path)
        OmegaConf.resolve(content)
    except FileNotFoundError:
        recipes = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        recipes = recipes or [f"configs/recipes/{p.name}" for p in (CONFIGS / "recipes").glob("*.yaml")]
        raise UserError(f"{what} {path} not found; {did_you_mean(str(path), recipes)}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{what} {path} must hold 'key: value' lines, not a {type(content).__name__}")
    return content


def _merge_words(tree: DictConfig, words: list[str]) -> list[str]:
    problems = []
    seen: set[str] = set()
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            problems.append(f"'{word}' is not an override; write key=value, such as optim.lr=1e-4")
            continue
        if key in seen:
            problems.append(f"{key} is given twice on the command line; keep one")
            continue
        seen.add(key)
        try:
            content = OmegaConf.from_dotlist([word])
            OmegaConf.resolve(content)
        except IndexError:
            problems.append(f"'{word}' is not an override: '{key}' is no key")
            continue
        except (YAMLError, OmegaConfBaseException) as error:
            hint = "; YAML wants a space after each ':' in braces" if re.search(r"\{.*:\S", word) else ""
            problems.append(f"'{word}' cannot be read: {' '.join(str(error).split())}{hint}")
            continue
        # eval.sets.NAME=DIR adds one set; eval.sets={…} gives them all.
        one_of_many = any(key.startswith(known + ".") for known, _ in _types(RunConfig))
        problems += _merge_tree(tree, content, "the command line", merge=one_of_many)
    return problems


def _merge_tree(tree: DictConfig, content: DictConfig, origin: str, merge: bool = False) -> list[str]:
    problems = []
    known = dict(_types(RunConfig))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for key, value in _leaves(content, RunConfig):
        if key in sections:
            problems.append(f"{key} in {origin} is a section; set the keys in it, such as {_example(key, known)}")
        elif key not in known:
            problems.append(f"unknown key {key} in {origin}; {did_you_mean(key, known)}")
        else:
            try:
                OmegaConf.update(tree, key, value, merge=merge)
            except OmegaConfBaseException:
                shown = "null" if value is None else value
                problems.append(f"{key}={shown} in {origin} must be {_describe(known[key])}")
    return problems


def _example(section: str, known: dict[str, Any]) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _types(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> annotation, for every leaf of a tree of dataclasses."""
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from _types(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, annotation


def _leaves(node: DictConfig, cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value as far as the schema is nested; a mapping where the schema has none stays whole."""
    hints = typing.get_type_hints(cls) if cls else {}
    for name in node:
        word = str(name)
        key = prefix + word
        value = None if OmegaConf.is_missing(node, name) else node[name]
        annotation = hints.get(word)
        nested = dataclasses.is_dataclass(annotation)
        if isinstance(value, DictConfig) and (nested or annotation is None):
            yield from _leaves(value, annotation, key + ".")
        elif OmegaConf.is_missing(node, name):
            continue
        else:
            yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _describe(annotation: Any) -> str:
    names = {
        int: "a whole number such as 1_000",
        float: "a number such as 3e-4",
        bool: "true or false",
        str: "a word",
    }
    if annotation == typing.List[str]:
        return "a list of words such as [mlp, head]"
    if typing.get_origin(annotation) is list:
        return f"a list such as [{', '.join(['0.5', '0.9'] if float in typing.get_args(annotation) else ['4', '16'])}]"
    if annotation == typing.Dict[int, typing.List[int]]:
        return "'step: [block sizes]' pairs such as {0: [128], 500: [16]}"
    if annotation == typing.Dict[str, float]:
        return "'pack: share' pairs such as {data/code: 0.2}"
    optional = [part for part in typing.get_args(annotation) if part is not type(None)]
    if type(None) in typing.get_args(annotation):
        return f"{names[optional[0]]}, or null"
    return names.get(annotation, "'name: directory' pairs")
