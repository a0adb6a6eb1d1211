"""Checks of the field that holds the text (--text-field): present, unique, of strings."""

from __future__ import annotations

from typing import Any

from bd3_ds.runtime.errors import UserError


def require_strings(where: str, field: str, schema: Any) -> None:
    """Raise UserError unless the Arrow `schema` of `where` has one column `field`, and that holds strings (or nulls).

    Other types have no text of their own, only Python's way of writing them.
    """
    import pyarrow

    if field not in schema.names:
        raise no_field(where, field, schema.names)
    require_once(where, field, schema.names)
    kind = schema.field(field).type
    if not _is_string(kind):
        strings = [column.name for column in schema if _is_string(column.type)]
        named = f"name a column of strings ({', '.join(strings[:10])})" if strings else "no other column holds strings"
        binary = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        cast = "cast this one to string if its bytes are UTF-8" if binary else "write this one as strings"
        raise UserError(
            f"--text-field {field}: {where} has the type {kind} there, which is no text; {named}; or {cast}"
        )


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def require_once(where: str, field: str, fields: list[str]) -> None:
    """Raise UserError where `field` is the name of several."""
    if fields.count(field) > 1:
        raise UserError(
            f"--text-field {field}: {where} has {fields.count(field)} columns of this name; rename all but one"
        )


def no_field(where: str, field: str, fields: list[str]) -> UserError:
    """The sentence for a field that `where` lacks."""
    return UserError(
        f"--text-field {field}: {where} has no such field; it has: {', '.join(fields[:10]) or 'no fields at all'}"
    )
