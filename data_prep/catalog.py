"""The data sets known by name: where they come from and how their published numbers treat them.

Several sets were script-only on the hub; those are read from the hub's own Parquet conversion of them (`parquet`).
"""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.packing import BOS_EOS, NONE

PARQUET_BRANCH = "refs/convert/parquet"


@dataclass(frozen=True)
class NamedSet:
    """One named set. `splits` maps our split names to the hub's; the first is the default.

    `lines`: in a text file of it, each line is one document; `keep_newline`: the line's end belongs to it. `holdout`:
    the last so many documents of the hub's one split of `documents` documents are "valid", the rest "train".
    """

    hub: str
    config: str
    splits: dict[str, str]
    field: str = "text"
    parquet: bool = False
    detokenizer: str = "none"
    frame: str = BOS_EOS
    lines: bool = False
    keep_newline: bool = False
    holdout: int = 0
    documents: int = 0


def _splits(default: str, *others: str) -> dict[str, str]:
    hub = {"valid": "validation"}
    return {split: hub.get(split, split) for split in (default, *others)}


_EVALUATION = _splits("valid", "test", "train")


def _wikitext(config: str) -> NamedSet:
    return NamedSet("Salesforce/wikitext", config, _EVALUATION, detokenizer="wikitext", lines=True, keep_newline=True)


def _papers(config: str) -> NamedSet:
    return NamedSet(
        "armanc/scientific_papers", config, _EVALUATION, field="article", parquet=True, detokenizer="papers"
    )


NAMED_SETS: dict[str, NamedSet] = {
    "openwebtext": NamedSet(
        "Skylion007/openwebtext",
        "plain_text",
        {"train": "train", "valid": "train"},
        parquet=True,
        frame=NONE,
        holdout=100_000,
        documents=8_013_769,
    ),
    "lm1b": NamedSet(
        "billion-word-benchmark/lm1b",
        "plain_text",
        _splits("test", "train"),
        parquet=True,
        detokenizer="lm1b",
        lines=True,
    ),
    "wikitext2": _wikitext("wikitext-2-raw-v1"),
    "wikitext103": _wikitext("wikitext-103-raw-v1"),
    "lambada": NamedSet("EleutherAI/lambada_openai", "default", _splits("test"), detokenizer="lambada", lines=True),
    "ptb": NamedSet(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        _EVALUATION,
        field="sentence",
        parquet=True,
        detokenizer="ptb",
        lines=True,
    ),
    "ag_news": NamedSet("fancyzhx/ag_news", "default", _splits("test", "train")),
    "pubmed": _papers("pubmed"),
    "arxiv": _papers("arxiv"),
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
