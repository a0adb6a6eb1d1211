"""Command-line overrides, `key=value`: splitting, and the value after the `=`."""

from __future__ import annotations

from typing import Any

from bd3_ds.config.values import is_optional, is_text
from bd3_ds.config.yaml_text import read_yaml

NULL = ("null", "Null", "NULL", "~")


def reject_spaced(overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides without those written `key = value`, which the shell splits, and a sentence about each of these."""
    rest, problems = list(overrides), []
    for index, word in enumerate(overrides):
        before = overrides[index - 1] if index else "="
        after = overrides[index + 1] if index + 1 < len(overrides) else "="
        key, equals, value = (part.strip() for part in word.partition("="))
        parts = [word]
        if not key and equals and "=" not in before:
            key, value, parts = before, value or ("" if "=" in after else after), [before, word]
            parts += [after] if word == "=" and "=" not in after else []
        elif key and equals and not value and "=" not in after:
            value, parts = after, [word, after]
        elif not equals or key == word.partition("=")[0]:
            continue
        problems.append(f"'{key} = {value}' has spaces around '='; write {key}={value or '…'}")
        for part in parts:
            if part in rest:
                rest.remove(part)
    return rest, problems


def override_value(text: str, annotation: Any) -> Any:
    """The value after the `=`: text as it is but for one pair of quotes around it, all else as YAML."""
    if not is_text(annotation):
        return read_yaml(text)
    return None if is_optional(annotation) and text in NULL else unquoted(text)


def unquoted(text: str) -> str:
    """The text without one pair of quotes around all of it, which a shell has left."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text[1:-1]
    return text
