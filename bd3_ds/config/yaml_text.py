"""YAML as it was written: what is no text keeps its spelling, so that `010` is not 8."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Plain(str):
    """An unquoted YAML scalar that YAML 1.1 reads as something else than text, as it was written; `kind` says what."""

    kind: str = "value"

    @classmethod
    def of(cls, text: str, kind: str) -> Plain:
        made = cls(text)
        made.kind = kind
        return made


_KINDS = {"bool": "true or false", "int": "number", "float": "number", "timestamp": "date"}
# YAML 1.1 requires a point in every float; nobody who writes 1e-3 means a word.
_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's, but numbers, truth values and dates keep their spelling, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found duplicate key {key.value}; keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.MappingNode | yaml.SequenceNode) -> Any:
        """At once, so that what contains itself (`&a [*a]`) is an error and not a circle."""
        return (
            self.construct_mapping(node, deep=True)
            if isinstance(node, yaml.MappingNode)
            else self.construct_sequence(node, deep=True)
        )

    def construct_as_written(self, node: yaml.ScalarNode) -> Plain:
        return Plain.of(str(self.construct_scalar(node)), _KINDS[node.tag.rpartition(":")[2]])


for _kind in _KINDS:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_as_written)
for _kind in ("map", "seq"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_whole)
# A lone "=" is text here.
_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: str(loader.construct_scalar(node)))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a YAML document; raises yaml.YAMLError. Mappings, lists and None are Python's own."""
    # Only PyYAML's SafeLoader is derived from, and what is made of foreign tags is an error.
    return yaml.load(text, Loader=_Loader)


def natural(written: Plain) -> Any:
    """The number or truth value that YAML 1.1 reads; dates stay text."""
    if written.kind == "date":
        return str(written)
    value = yaml.safe_load(written)
    return float(value) if isinstance(value, str) else value
