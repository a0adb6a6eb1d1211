"""Tokens added to a tokenizer after its training, read from the files beside its vocabulary.

added_tokens.json            token -> id
tokenizer_config.json        "added_tokens_decoder": id -> token with its flags
special_tokens_map.json      tokens by role; what the vocabulary lacks comes after all others, as transformers adds it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

ADDED_FILE = "added_tokens.json"
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_MASK = "mask_token"
# The order in which transformers adds roles that the vocabulary lacks.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", _MASK)
_MORE = "additional_special_tokens"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Added:
    """A token with its id, None for the next free one; `flags` as the library `tokenizers` takes them."""

    content: str
    id: int | None
    special: bool
    flags: dict[str, bool]


def read_added_tokens(directory: Path) -> list[Added]:
    """The added tokens of a tokenizer directory: those with ids in their order, then roles.

    Raises UserError for files that are damaged or contradict one another.
    """
    config, roles = _object(directory / _CONFIG), _object(directory / _MAP)
    by_role = [token for source in (config, roles) for token in _special(source)]
    special = {token for _, token in by_role}
    added: dict[str, Added] = {}
    for key, entry in _dict(config.get("added_tokens_decoder"), directory / _CONFIG).items():
        content = _content(entry)
        if content is None or not key.isdecimal():
            raise UserError(f"{directory / _CONFIG} is damaged: its added_tokens_decoder has no token at '{key}'")
        flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry} if isinstance(entry, dict) else {}
        is_special = bool(isinstance(entry, dict) and entry.get("special")) or content in special
        added[content] = Added(content, int(key), is_special, flags)
    for content, number in _object(directory / ADDED_FILE).items():
        if not isinstance(number, int):
            raise UserError(f"{directory / ADDED_FILE} is damaged: '{content}' has no id")
        known = added.setdefault(content, Added(content, number, content in special, {}))
        if known.id != number:
            raise UserError(
                f"{directory}: the token '{content}' has the id {number} in {ADDED_FILE} and {known.id} in {_CONFIG}; "
                "make them agree"
            )
    listed = sorted(added.values(), key=lambda token: token.id or 0)
    order = {role: place for place, role in enumerate(_ROLES)}
    others = sorted(by_role, key=lambda pair: order.get(pair[0], len(_ROLES)))
    return [
        *listed,
        *(Added(token, None, True, {}) for token in dict.fromkeys(t for _, t in others) if token not in added),
    ]


def add_tokens(backend: Any, added: list[Added], directory: Path) -> None:
    """Give a tokenizer of the library `tokenizers` the tokens that it lacks.

    A mask that would come last is left out: what has no mask gets one there. Raises UserError where a token cannot have
    its id.
    """
    from tokenizers import AddedToken

    masks = {
        token for source in (_CONFIG, _MAP) for role, token in _special(_object(directory / source)) if role == _MASK
    }
    left = list(added)
    while left and left[-1].id is None and (left[-1].content in masks or _has(backend, left[-1].content)):
        left.pop()
    known = {entry.content for entry in backend.get_added_tokens_decoder().values()}  # of a tokenizer.json
    for token in left:
        if token.id is None and _has(backend, token.content):
            continue
        if token.content in known and token.id == backend.token_to_id(token.content):
            continue
        if token.id is not None and backend.id_to_token(token.id) not in (None, token.content):
            raise _cannot(directory, token, f"which is that of '{backend.id_to_token(token.id)}'")
        flags = {"normalized": not token.special} | token.flags
        made = AddedToken(token.content, special=token.special, **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([made])
        got = backend.token_to_id(token.content)
        if token.id is not None and got != token.id:
            raise _cannot(directory, token, f"but its place is {got}, after the vocabulary and those before it")


def require_none_added(directory: Path, vocabulary: dict[int, str]) -> None:
    """Raise UserError for tokens beside a sentencepiece model that it does not hold itself."""
    for token in read_added_tokens(directory):
        # What has no id of its own is a role, for which the model has pieces; [MASK] is added by us.
        if token.id is not None and vocabulary.get(token.id) != token.content:
            raise UserError(
                f"tokenizer {directory}: the token '{token.content}' (id {token.id}) was added to the sentencepiece "
                "model, which cannot take it; save it with a tokenizer.json (save_pretrained of the fast tokenizer), "
                "or name the .model file to go without"
            )


def _cannot(directory: Path, token: Added, why: str) -> UserError:
    return UserError(
        f"tokenizer {directory}: the added token '{token.content}' is to have the id {token.id}, {why}; save it with a "
        "tokenizer.json (save_pretrained of the fast tokenizer), or mend its files"
    )


def _has(backend: Any, content: str) -> bool:
    return backend.token_to_id(content) is not None


def _special(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Roles with their tokens, in the order of the file."""
    found = [(role, _content(settings[role])) for role in _ROLES if role in settings]
    more = settings.get(_MORE)
    found += [(_MORE, _content(entry)) for entry in (more if isinstance(more, list) else [])]
    return [(role, token) for role, token in found if token]


def _content(entry: Any) -> str | None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _object(path: Path) -> dict[str, Any]:
    return _dict(read_json(path, "tokenizer settings"), path) if path.is_file() else {}


def _dict(value: Any, path: Path) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object where one belongs")
    return value or {}
