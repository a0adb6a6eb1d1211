"""The catalog of named data sets: where they come from, and the processing that published results use.

On the hub all are read as Parquet, at one commit: from the hub's own conversion of the set, because several sets were
published as a script, which no library runs any more. That conversion ends after 5 GB of a split. OpenWebText is
larger, so that it is read from a complete copy whose number of documents is that of the script. The number of
documents of each split is checked wherever it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from bd3_ds.runtime.errors import UserError, did_you_mean
from data_prep.packing import BOS_EOS, NONE

PARQUET_BRANCH = "refs/convert/parquet"


@dataclass(frozen=True)
class NamedSet:
    """One named set. `splits` maps our split names to the hub's; the first is the default.

    On the hub: `branch`, and `folder`, with which the names of the split's files begin; `documents` of each of the
    hub's splits. `lines`: in a text file of it, each line is one document; `keep_newline`: the line's end belongs to
    it. `holdout`: the last so many documents of the one split are "valid", the rest "train". `spans`: the characters of
    each split in the one file. `files`: what the names of a split's published files begin with, "" for none's.
    """

    hub: str
    config: str
    splits: dict[str, str]
    documents: dict[str, int]
    field: str = "text"
    branch: str = PARQUET_BRANCH
    folder: str = "{config}/{split}/"
    detokenizer: str = "none"
    frame: str = BOS_EOS
    lines: bool = False
    keep_newline: bool = False
    holdout: int = 0
    spans: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def _splits(default: str, *others: str) -> dict[str, str]:
    hub = {"valid": "validation"}
    return {split: hub.get(split, split) for split in (default, *others)}


def _counts(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


_EVALUATION = _splits("valid", "test", "train")


def _wikitext(config: str, train: int) -> NamedSet:
    counts = _counts(train, 3_760, 4_358)
    return NamedSet(
        "Salesforce/wikitext", config, _EVALUATION, counts, detokenizer="wikitext", lines=True, keep_newline=True
    )


def _papers(config: str, documents: dict[str, int]) -> NamedSet:
    return NamedSet("armanc/scientific_papers", config, _EVALUATION, documents, field="article", detokenizer="papers")


NAMED_SETS: dict[str, NamedSet] = {
    "openwebtext": NamedSet(
        "dvruette/openwebtext",
        "default",
        {"train": "train", "valid": "train"},
        {"train": 8_013_769},
        branch="main",
        folder="data/{split}-",
        frame=NONE,
        holdout=100_000,
    ),
    "lm1b": NamedSet(
        "billion-word-benchmark/lm1b",
        "plain_text",
        _splits("test", "train"),
        {"train": 30_301_028, "test": 306_688},
        detokenizer="lm1b",
        lines=True,
        # The hub's test split is all 50 held-out shards; news.en-00000-of-00100 is the same sentences in one file.
        files={"": "news.en-00000-of-00100", "train": "news.en-", "test": "news.en.heldout-"},
    ),
    "text8": NamedSet(
        "afmck/text8",
        "default",
        _splits("train", "valid", "test"),
        _counts(1, 1, 1),
        frame=NONE,
        spans={
            "train": (0, 90_000_000),
            "valid": (90_000_000, 95_000_000),
            "test": (95_000_000, 100_000_000),
        },
    ),
    "wikitext2": _wikitext("wikitext-2-raw-v1", 36_718),
    "wikitext103": _wikitext("wikitext-103-raw-v1", 1_801_350),
    "lambada": NamedSet(
        "EleutherAI/lambada_openai", "default", _splits("test"), {"test": 5_153}, detokenizer="lambada", lines=True
    ),
    "ptb": NamedSet(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        _EVALUATION,
        _counts(42_068, 3_370, 3_761),
        field="sentence",
        detokenizer="ptb",
        lines=True,
    ),
    "ag_news": NamedSet("fancyzhx/ag_news", "default", _splits("test", "train"), {"train": 120_000, "test": 7_600}),
    "pubmed": _papers("pubmed", _counts(119_924, 6_633, 6_658)),
    "arxiv": _papers("arxiv", _counts(203_037, 6_436, 6_440)),
}


@dataclass(frozen=True)
class EmbeddedSet:
    """A set taken from the Python installation itself, without a download; the first split is the default."""

    splits: tuple[str, ...]
    frame: str


EMBEDDED_SETS: dict[str, EmbeddedSet] = {
    "python-docs": EmbeddedSet(("train", "valid"), NONE),
    "python-readmes": EmbeddedSet(("test",), BOS_EOS),
    "python-licences": EmbeddedSet(("test",), BOS_EOS),
}


def check_split(name: str, split: str | None, known: Iterable[str]) -> str:
    """`split`, or the first of those that the set `name` has; UserError where it has no such split."""
    splits = list(known)
    if split is not None and split not in splits:
        raise UserError(f"--split {split}: {name} has no such split; {did_you_mean(split, splits)}")
    return split or splits[0]
