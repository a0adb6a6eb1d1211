"""The schema as a list of dotted keys, each with its type and rule, and values by dotted key."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from bd3_ds.config.rules import Rule, rule_of
from bd3_ds.config.schema import RunConfig


@dataclass(frozen=True)
class Key:
    """A leaf of the schema: the type it is annotated with and the rule beside it."""

    annotation: Any
    rule: Rule | None

    @property
    def is_mapping(self) -> bool:
        """Whether its value is a mapping, whose entries can be given one by one."""
        return typing.get_origin(self.annotation) is dict


@cache
def schema_keys() -> dict[str, Key]:
    """Every dotted key of a run."""
    return dict(_keys(RunConfig, ""))


def _keys(cls: Any, prefix: str) -> Iterator[tuple[str, Key]]:
    rules = typing.get_type_hints(cls, include_extras=True)
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, Key(annotation, rule_of(rules[name]))


def flat(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, sets of evaluation packs as one value."""
    return dict(leaves(dataclasses.asdict(run)))


def leaves(node: dict[Any, Any], cls: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value as far as the schema is nested; a mapping where the schema has none stays whole."""
    hints = typing.get_type_hints(cls) if cls else {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        annotation = hints.get(str(name))
        if isinstance(value, dict) and (dataclasses.is_dataclass(annotation) or (annotation is None and value)):
            yield from leaves(value, annotation, key + ".")
        else:
            yield key, value
