"""From what was written to the schema's types: nothing is guessed, rounded or read in another base.

Text is taken as it stands. Numbers are decimal: leading zeros, base 60 (1:30), hexadecimal and octal forms are refused,
for YAML versions and readers disagree about them. Truth values are true and false.
"""

from __future__ import annotations

import os
import re
import typing
from typing import Any

from bd3_ds.config.yaml_text import Plain

_NUMBER = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.(?:[0-9]+(?:_[0-9]+)*)?)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
_NOT_FINITE = re.compile(r"[-+]?\.?(?:inf|nan)", re.IGNORECASE)
_OTHER_BASE = re.compile(r"[-+]?(?:0[0-9_oOxXbB]|[0-9][0-9_]*:)[0-9a-fA-F_:.]*")
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Unfit(Exception):
    """A value that its key does not take; the message follows `key=value in origin`."""


def is_optional(annotation: Any) -> bool:
    """Whether null is a value of the type."""
    return type(None) in typing.get_args(annotation)


def is_text(annotation: Any) -> bool:
    """Whether values of the type are text, or text and null."""
    return annotation is str or (is_optional(annotation) and str in typing.get_args(annotation))


def convert(value: Any, annotation: Any, as_it_stands: bool = False) -> Any:
    """`value` (of `read_yaml`, JSON or code) in the type that `annotation` names; raises Unfit.

    `as_it_stands`: unquoted text may look like a number, as on the command line.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if is_optional(annotation):
        if value is None:
            return None
        kind = next(part for part in parts if part is not type(None))
        return _scalar(value, kind, annotation, as_it_stands)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise Unfit(f"must be {describe(annotation)}")
        return [_inside(one, parts[0], annotation, as_it_stands) for one in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise Unfit(f"must be {describe(annotation)}")
        made = {}
        for key, one in value.items():
            name = _inside(key, parts[0], annotation, as_it_stands)
            if name in made:
                raise Unfit(f"gives {name} twice; keep one")
            made[name] = _inside(one, parts[1], annotation, as_it_stands)
        return made
    return _scalar(value, annotation, annotation, as_it_stands)


def at_home(value: Any, in_keys: bool = False) -> Any:
    """A path, or those of a mapping's values or keys, with leading `~` expanded. Raises Unfit."""
    if not isinstance(value, dict):
        return None if value is None else _expanded(value)
    if not in_keys:
        return {name: _expanded(path) for name, path in value.items()}
    full = {_expanded(path): one for path, one in value.items()}
    if len(full) < len(value):
        raise Unfit("names a pack twice; name it once, with the sum of both shares")
    return full


def _expanded(path: str) -> str:
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise Unfit(f"names the home of a user who is not known here; write ./{path} for a directory of that name")
    return full


def _inside(value: Any, kind: Any, annotation: Any, as_it_stands: bool) -> Any:
    """An element of a list or mapping, which itself may be a list."""
    if typing.get_origin(kind) is not None:
        try:
            return convert(value, kind, as_it_stands)
        except Unfit:
            raise Unfit(f"must be {describe(annotation)}") from None
    return _scalar(value, kind, annotation, as_it_stands)


def _scalar(value: Any, kind: type, annotation: Any, as_it_stands: bool) -> Any:
    if kind is str:
        return _text(value, annotation, as_it_stands)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in _TRUTH:
            return _TRUTH[value]
        raise Unfit(f"must be {describe(annotation)}")
    if isinstance(value, str):
        value = _number(value, annotation)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit(f"must be {describe(annotation)}")
    if kind is float:
        return float(value)
    if value != value // 1 or (isinstance(value, float) and abs(value) > 2**53):
        raise Unfit(f"must be {describe(annotation)}")
    return int(value)


def _text(value: Any, annotation: Any, as_it_stands: bool) -> str:
    if isinstance(value, Plain) and not as_it_stands:
        raise Unfit(f"is read by YAML as a {value.kind} and must be text; write it in quotes: '{value}'")
    if isinstance(value, str):
        if "${" in value:
            raise Unfit("holds '${' behind all references, which no value may")
        return str(value)
    if isinstance(value, bool | int | float):
        raise Unfit(f"must be {describe(annotation)}; write it in quotes")
    raise Unfit(f"must be {describe(annotation)}")


def _number(text: str, annotation: Any) -> int | float:
    text = text.strip()
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _NUMBER.fullmatch(text) and len(text) < 300:
        plain = text.replace("_", "")
        return float(plain) if re.search(r"[.eE]", plain) else int(plain)
    if _OTHER_BASE.fullmatch(text):
        raise Unfit(f"must be {describe(annotation)}, in decimal digits: no leading zeros, no base 60, 16 or 8")
    raise Unfit(f"must be {describe(annotation)}")


def describe(annotation: Any) -> str:
    """What a key takes, for a sentence."""
    names = {
        int: "a whole number such as 1_000",
        float: "a number such as 3e-4",
        bool: "true or false",
        str: "text",
    }
    if annotation == typing.List[str]:
        return "a list of words such as [mlp, head]"
    if typing.get_origin(annotation) is list:
        return f"a list such as [{', '.join(['0.5', '0.9'] if float in typing.get_args(annotation) else ['4', '16'])}]"
    if annotation == typing.Dict[int, typing.List[int]]:
        return "'step: [block sizes]' pairs such as {0: [128], 500: [16]}"
    if annotation == typing.Dict[str, float]:
        return "'name: number' pairs such as {data/code: 0.2}"
    if is_optional(annotation):
        optional = [part for part in typing.get_args(annotation) if part is not type(None)]
        return f"{names[optional[0]]}, or null"
    return names.get(annotation, "'name: directory' pairs")
