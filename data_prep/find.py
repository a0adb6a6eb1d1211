"""Which files of a path belong to a split."""

from __future__ import annotations

import re
from pathlib import Path

from bd3_ds.runtime.errors import UserError
from data_prep.catalog import NamedSet
from data_prep.files import COMPRESSION, Layout, check_ending, suffixes

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


def find_files(path: Path, split: str | None, layout: Layout) -> list[Path]:
    """The file `path`, or the text files under the directory `path` in the order of their names.

    With a split only those of which a directory or the file name begins with it. Raises UserError if none is left.
    """
    if not path.exists():
        raise UserError(f"--source: no such file or directory: {path}")
    if not path.is_dir():
        check_ending(path, layout)
        return [path]
    found = [file for file in _visible(path) if suffixes(file)[0] in IN_DIRECTORIES]
    if not found:
        raise UserError(
            f"--source: the directory {path} holds no {', '.join(IN_DIRECTORIES)} ({', '.join(COMPRESSION)}) file"
        )
    if split is None:
        return found
    chosen = [file for file in found if any(part.startswith(split) for part in file.relative_to(path).parts)]
    if not chosen:
        raise UserError(f"--split {split}: no name under {path} begins with '{split}'; leave --split out")
    return chosen


def find_set(path: Path, split: str | None, known: NamedSet, layout: Layout) -> tuple[list[Path], str | None]:
    """The files of a split of a named set, in the order of their names, and the split.

    In a directory the names of files and folders tell the splits, and without `split` the set's default is taken; if
    no name tells, all is one split, None. Raises UserError if nothing is left.
    """
    if not path.is_dir():
        return find_files(path, None, layout), None
    splits = {file: split_of(file.relative_to(path), known) for file in _visible(path)}
    names = {its for its in splits.values() if its is not None}
    if not names or (known.holdout and names == {"train"}):
        if split is not None and not known.holdout and not known.spans:
            raise UserError(f"--split {split}: no name under {path} tells which files are '{split}'; leave --split out")
        texts = [file for file in splits if suffixes(file)[0] in IN_DIRECTORIES] or list(splits)
        return texts or find_files(path, None, layout), None
    wanted = split or next(iter(known.splits))
    chosen = [file for file, its in splits.items() if its == wanted]
    if not chosen:
        asked = f"--split {split}: " if split else "--source: "
        raise UserError(f"{asked}no file under {path} is of the split '{wanted}'; there is {', '.join(sorted(names))}")
    return chosen, wanted


def split_of(file: Path, known: NamedSet) -> str | None:
    """The split that a file's name tells, or else its nearest folder's: `wiki.valid.raw`, `test/part-0.jsonl`."""
    for split, start in known.files.items():
        if file.name.startswith(start):
            return split or None
    for part in reversed(file.parts):
        words = [SPLIT_WORDS[word] for word in re.findall(r"[a-z]+", part.lower()) if word in SPLIT_WORDS]
        if words:
            return words[0]
    return None


def _visible(path: Path) -> list[Path]:
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not _ABOUT.match(file.name)
    )
