"""Reading texts from JSON lines."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bd3_ds.runtime.errors import UserError
from data_prep.text_field import no_field
from data_prep.unpacked_text import open_text


def json_texts(path: Path, raw: BinaryIO, field: str) -> Iterator[str | None]:
    """The texts of JSON lines, None for null; raises UserError that names the line for all else."""
    with open_text(path, raw, newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            record = _record(path, where, line)
            if field not in record:
                raise no_field(where, field, list(record))
            if isinstance(record, _Twice) and field in record.keys_twice:
                raise UserError(f"--source: {where} has the key '{field}' twice, and only one can be meant; remove one")
            text = record[field]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"--text-field {field}: {where} holds no string there but {_JSON_KINDS[type(text)]}; name the key "
                    "that holds the text, or write it as one string"
                )
            yield text


_JSON_KINDS: dict[type, str] = {
    list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number",
}  # fmt: skip


class _Twice(dict[str, Any]):
    """A JSON object of which some keys were given more than once."""

    keys_twice: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        value, seen = _Twice(pairs), Counter(key for key, _ in pairs)
        value.keys_twice = frozenset(key for key, times in seen.items() if times > 1)
    return value


def _record(path: Path, where: str, line: str) -> dict[str, Any]:
    """The object on a line; else UserError with how to get one object a line."""
    begins = line.lstrip()[0]
    shown = shlex.quote(str(path))
    program = "'.[]'" if begins == "[" else "."
    remedy = f"give one object a line, such as `jq -c {program} {shown}` writes"
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        if begins == "[":
            raise UserError(f"--source: {where} is no JSON object but begins an array; {remedy}") from None
        more = f"; {remedy}" if line.strip() == "{" else ""  # of an object over several lines
        raise UserError(f"--source: {where} is not valid JSON ({error}){more}") from None
    if not isinstance(record, dict):
        kind = "an array" if isinstance(record, list) else "a single value"
        raise UserError(f"--source: {where} is no JSON object but {kind}; {remedy}")
    return record
