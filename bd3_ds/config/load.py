"""From files and key=value words to one frozen RunConfig; every problem found is reported, not the first alone."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bd3_ds.config.schema import AUTO, RunConfig
from bd3_ds.config.values import Unfit, at_home, convert, describe, is_optional
from bd3_ds.config.words import without_spaced, word_value
from bd3_ds.config.yaml_text import Plain, natural, read_yaml
from bd3_ds.runtime.errors import UserError, did_you_mean

MICRO_BATCH = "train.micro_batch"  # the one key that is a number or `auto`
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
    content: dict[str, Any] = {}
    for key, value in values.items():
        _put(content, key.split("."), value)
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
    problems = [*_merge_file(tree, CONFIGS / "base.yaml"), *_merge_tree(tree, values, origin)]
    problems = problems or [f"{origin} lacks {key}" for key in sorted(OmegaConf.missing_keys(tree))]
    if problems:
        raise UserError(*problems)
    return _freeze(tree)


def override(run: RunConfig, words: list[str], allowed: tuple[str, ...]) -> RunConfig:
    """`run` with key=value words over it, of keys that begin with one of `allowed`; raises UserError."""
    merged = _empty(RunConfig)
    problems = _merge_tree(merged, dataclasses.asdict(run), "the export")
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
    values = dataclasses.asdict(run)
    if run.train.micro_batch == AUTO:
        values["train"][MICRO_BATCH.rpartition(".")[2]] = "auto"
    return str(OmegaConf.to_yaml(OmegaConf.create(values)))


def flat(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, sets of evaluation packs as one value."""
    return dict(_leaves(dataclasses.asdict(run), RunConfig))


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


def _merge_file(tree: DictConfig, path: Path, what: str = "recipe", above: tuple[Path, ...] = ()) -> list[str]:
    """Merge a file and what it includes into `tree`; `above` are the files that include this one."""
    if path in above:
        return [f"{path} includes itself"]
    content = _read_yaml(path, what)
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
        problems += _merge_file(tree, part, above=(*above, path))
    return problems + _merge_tree(tree, content, str(path))


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    try:
        content = _resolved(read_yaml(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        recipes = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        recipes = recipes or [os.path.relpath(p) for p in (CONFIGS / "recipes").glob("*.yaml")]
        raise UserError(f"{what} {path} not found; {did_you_mean(str(path), recipes)}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise UserError(f"{what} {path} must hold 'key: value' lines, not a {kind}")
    return content


def _resolved(content: Any) -> Any:
    """`content` with its ${…} replaced, as text where they give a scalar; the rest keeps its spelling."""
    if "${" not in str(content):
        return content
    if not isinstance(content, dict):
        return _resolved({"value": content})["value"]
    found = OmegaConf.create(_natural(content))
    OmegaConf.resolve(found)
    return _overlaid(content, OmegaConf.to_container(found))


def _natural(written: Any) -> Any:
    """With numbers where numbers were written, as references show them."""
    if isinstance(written, dict):
        return {_natural(key): _natural(value) for key, value in written.items()}
    if isinstance(written, list):
        return [_natural(value) for value in written]
    return natural(written) if isinstance(written, Plain) else written


def _overlaid(written: Any, found: Any) -> Any:
    if isinstance(written, dict):
        return {key: _overlaid(value, found[key]) for key, value in written.items()}
    if isinstance(written, list):
        return [_overlaid(value, one) for value, one in zip(written, found, strict=True)]
    if not (isinstance(written, str) and "${" in written):
        return written
    return str(found) if isinstance(found, bool | int | float | str) else found


def _put(content: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        content = content.setdefault(name, {})
    content[names[-1]] = value


def _merge_words(tree: DictConfig, words: list[str]) -> list[str]:
    words, problems = without_spaced(words)
    seen: set[str] = set()
    known = dict(_types(RunConfig))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            problems.append(f"'{word}' is not an override; write key=value, such as optim.lr=1e-4")
            continue
        if key in seen:
            problems.append(f"{key} is given twice on the command line; keep one")
            continue
        seen.add(key)
        # eval.sets.NAME=DIR adds one set; eval.sets={…} gives them all.
        whole = next((one for one in known if key.startswith(one + ".")), None)
        names = [*whole.split("."), key[len(whole) + 1 :]] if whole else key.split(".")
        kind = typing.get_args(known[whole])[-1] if whole and _is_mapping(known[whole]) else known.get(key)
        if text == "" and kind is not str:
            instead = "; write null for none" if is_optional(kind) else ""
            problems.append(f"{key}= has no value{instead}")
            continue
        hint = "; YAML wants a space after each ':' in braces" if re.search(r"\{.*:\S", word) else ""
        try:
            value = _resolved(word_value(text, kind))
        except (YAMLError, OmegaConfBaseException, RecursionError) as error:
            problems.append(f"'{word}' cannot be read: {' '.join(str(error).split())}{hint}")
            continue
        content: dict[str, Any] = {}
        _put(content, names, value)
        found = _merge_tree(tree, content, "the command line", merge=whole is not None, as_it_stands=True)
        problems += [problem + (hint if _is_mapping(kind) else "") for problem in found]
    return problems


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _merge_tree(
    tree: DictConfig, content: dict[Any, Any], origin: str, merge: bool = False, as_it_stands: bool = False
) -> list[str]:
    problems = []
    known = dict(_types(RunConfig))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    seen: set[str] = set()
    for key, value in _leaves(content, RunConfig):
        if key in seen:
            problems.append(f"{key} is given twice in {origin}; keep one")
        elif key in sections:
            problems.append(f"{key} in {origin} must be a section; set the keys in it, such as {_example(key, known)}")
        elif key not in known:
            problems.append(f"unknown key {key} in {origin}; {_nearest(key, known)}")
        else:
            try:
                OmegaConf.update(tree, key, _value(key, value, known[key], as_it_stands), merge=merge)
            except (Unfit, OmegaConfBaseException) as error:
                reason = error if isinstance(error, Unfit) else f"must be {describe(known[key])}"
                problems.append(f"{key}={_shown(value)} in {origin} {reason}")
        seen.add(key)
    return problems


def _value(key: str, value: Any, annotation: Any, as_it_stands: bool) -> Any:
    """Of the key's type; raises Unfit."""
    if key != MICRO_BATCH:
        return at_home(key, convert(value, annotation, as_it_stands))
    if value == "auto":
        return AUTO
    try:
        number = convert(value, annotation)
    except Unfit as error:
        raise Unfit(f"{error}, or auto") from None
    if number < 0 and isinstance(value, str):
        raise Unfit("must be above 0, or auto")
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


def _example(section: str, known: dict[str, Any]) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _types(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> annotation, for every leaf of a tree of dataclasses."""
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from _types(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, annotation


def _leaves(node: dict[Any, Any], cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value as far as the schema is nested; a mapping where the schema has none stays whole."""
    hints = typing.get_type_hints(cls) if cls else {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        annotation = hints.get(str(name))
        if isinstance(value, dict) and (dataclasses.is_dataclass(annotation) or (annotation is None and value)):
            yield from _leaves(value, annotation, key + ".")
        elif value != MISSING:
            yield key, value
