"""Finding the files of a split under a path."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import NamedTuple

from bd3_ds.runtime.errors import UserError
from data_prep.catalog import NamedSet
from data_prep.formats import COMPRESSION, Layout, check_ending, suffixes

IN_DIRECTORIES = (".txt", ".raw", ".tokens", ".jsonl", ".ndjson", ".csv", ".parquet")  # no README, no settings
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "development": "valid",
    "test": "test",
    "testing": "test",
    "heldout": "test",
}
_ABOUT = re.compile(r"(readme|licen[cs]e|changelog|citation)\b", re.IGNORECASE)


class Found(NamedTuple):
    """The files of a source in the order in which they are read, and names that were seen but are not read."""

    files: list[Path]
    left_out: list[Path]


def find_files(path: Path, split: str | None, layout: Layout) -> Found:
    """The file `path`, or the text files under the directory `path` in the order of their names.

    With a split only those of it, by `_of_split`. Raises UserError if none is left, and without a split for a directory
    whose names tell that it holds training and other files.
    """
    if not path.exists():
        raise no_such_path(path)
    if not path.is_dir():
        check_ending(path, layout)
        return Found([path], [])
    seen = _visible(path)
    found = [file for file in seen.files if suffixes(file)[0] in IN_DIRECTORIES]
    if not found:
        raise UserError(
            f"--source: the directory {path} holds no {', '.join(IN_DIRECTORIES)} ({', '.join(COMPRESSION)}) file"
        )
    if split is None:
        _require_one_split(path, found)
        chosen = found
    else:
        chosen = _of_split(path, split, found)
    taken = set(chosen)
    return Found(chosen, sorted([*(file for file in seen.files if file not in taken), *seen.left_out]))


def no_such_path(path: Path) -> UserError:
    """The sentence for a path that is not there, with the name nearest to it of those that are."""
    if path.is_symlink():
        return UserError(f"--source: {path} is a link to {os.readlink(path)}, which is not there; mend it")
    near = near_by(path)
    hint = f"; did you mean '{near}'?" if near else ""
    return UserError(f"--source: no such file or directory: {path}{hint}")


def near_by(path: Path) -> Path | None:
    """What lies beside `path`, which is not there, under the name that is most like its own."""
    place = path.parent
    names = [file.name for file in place.iterdir() if not file.name.startswith(".")] if place.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return place / close[0] if close else None


def _require_one_split(path: Path, found: list[Path]) -> None:
    splits: dict[str, list[str]] = {}
    for file in found:
        name = file.relative_to(path)
        splits.setdefault(_split_word(name) or "", []).append(str(name))
    named = {split: names for split, names in splits.items() if split}
    if "train" not in named or len(named) == 1:
        return
    listed = ", ".join(f"{split} ({len(names)}, such as {names[0]})" for split, names in sorted(named.items()))
    raise UserError(
        f"--source: {path} holds files of several splits by their names: {listed}; name one with --split, such as "
        f"--split train, or the files themselves, such as --source '{path}/*'"
    )


def _of_split(path: Path, split: str, found: list[Path]) -> list[Path]:
    """Files whose name (or else folder) names this split, or names none and begins with its word."""
    wanted, chosen = SPLIT_WORDS.get(split), []
    for file in found:
        name = file.relative_to(path)
        split_name = _split_word(name) if wanted else None
        if split_name == wanted if split_name else any(part.startswith(split) for part in name.parts):
            chosen.append(file)
    if not chosen:
        raise UserError(f"--split {split}: no name under {path} begins with '{split}'; leave --split out")
    return chosen


def find_set(path: Path, split: str | None, known: NamedSet, layout: Layout) -> tuple[Found, str | None]:
    """The files of a split of a named set, in the order of their names, and the split.

    In a directory the names of files and folders tell the splits, and without `split` the set's default is taken; if
    no name tells, all is one split, None. Raises UserError if nothing is left.
    """
    if not path.is_dir():
        return find_files(path, None, layout), None
    visible = _visible(path)
    splits = {file: split_of(file.relative_to(path), known) for file in visible.files}
    names = {its for its in splits.values() if its is not None}
    chosen_split = None
    if not names or (known.holdout and names == {"train"}):
        if split is not None and not known.holdout and not known.spans:
            raise UserError(f"--split {split}: no name under {path} tells which files are '{split}'; leave --split out")
        chosen = [file for file in splits if suffixes(file)[0] in IN_DIRECTORIES] or list(splits)
        if not chosen:
            return find_files(path, None, layout), None
    else:
        chosen_split = split or next(iter(known.splits))
        chosen = [file for file, its in splits.items() if its == chosen_split]
    if not chosen:
        asked = f"--split {split}: " if split else "--source: "
        there = ", ".join(sorted(names))
        raise UserError(f"{asked}no file under {path} is of the split '{chosen_split}'; there is {there}")
    taken = set(chosen)
    return Found(chosen, sorted([*(file for file in splits if file not in taken), *visible.left_out])), chosen_split


def split_of(file: Path, known: NamedSet) -> str | None:
    """The split that a file's name says, or else its nearest folder's: `wiki.valid.raw`, `test/part-0.jsonl`."""
    for split, start in known.files.items():
        if file.name.startswith(start):
            return split or None
    return _split_word(file)


def _split_word(file: Path) -> str | None:
    for part in reversed(file.parts):
        words = [SPLIT_WORDS[word] for word in re.findall(r"[a-z]+", part.lower()) if word in SPLIT_WORDS]
        if words:
            return words[0]
    return None


def _visible(path: Path) -> Found:
    """The files under a directory, sorted; links to directories are followed, each of which is read once.

    Left out: what tells about the set, and links to files that are there under their own name or by an earlier link.
    """
    real, linked = _walk(path)
    seen = {_identity(file) for file in real}
    again = []
    for file in sorted(linked):
        if not file.exists():
            raise UserError(f"--source: {file} is a link to {os.readlink(file)}, which is not there; mend or remove it")
        if not file.is_file():
            continue
        if _identity(file) in seen:
            again.append(file)
        else:
            seen.add(_identity(file))
            real.append(file)
    about = [file for file in real if _ABOUT.match(file.name)]
    return Found(sorted(set(real) - set(about)), sorted([*about, *again]))


def _walk(path: Path) -> tuple[list[Path], list[Path]]:
    """Files by their own names, and links to files together with all that linked directories hold."""
    real: list[Path] = []
    linked: list[Path] = []
    visited: set[tuple[int, int]] = set()
    folders, later = [path], list[Path]()  # directories by their own names first, so that links lead to what is new
    while folders or later:
        own = bool(folders)
        folder = folders.pop() if own else later.pop(0)
        if _identity(folder) in visited:
            continue
        visited.add(_identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"--source: the directory {folder} cannot be read ({error.strerror})") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (folders if own and not entry.is_symlink() else later).append(folder / entry.name)
            elif entry.is_symlink():
                linked.append(folder / entry.name)
            elif entry.is_file():
                (real if own else linked).append(folder / entry.name)
    return real, linked


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
