"""Zero-shot packs are those of the published protocol, whatever the number of workers.

A chunk is BOS, length - 2 tokens, EOS; no EOS stands between documents; a remainder is dropped; all but the BOS is
scored. Small made-up copies of each set in its published form are always there; real ones come with the shared data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bd3_ds.data.pack import Pack, open_pack
from data_prep import parts, prepare, train_tokenizer
from data_prep.catalog import NAMED_SETS
from data_prep.detokenizers import DETOKENIZERS
from data_prep.sources import open_source

SHARED = Path(os.environ.get("BD3_SHARED", "../shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data (BD3_SHARED)")
LENGTH = 64  # of the made-up sets

WIKI = (
    ' = Title {0} = \n \n The first @-@ born , {0} @,@ 000 of them , said : " It is so . " \n'
    " \n = = Part = = \n \n More . \n"
)
PAPER = "we , as in [ {0} ] , find 3 @.@ 5 in the cells ( see table {0} ) .\nthey do not grow ."
MADE_UP = {
    "lambada": ("test.txt", "she said , “ go {0} ” , and he knew that he would have to go\n"),
    "wikitext2": ("wiki.valid.raw", WIKI),
    "wikitext103": ("wiki.valid.raw", WIKI),
    "ptb": ("ptb.valid.txt", " mr. <unk> said the {0} shares did n't rise N N to $ N in N \n"),
    "lm1b": ("news.en.heldout-00000-of-00050", 'The owner , Mr. Smith , said : " We \'re at number {0} . "\n'),
    "ag_news": ("test.csv", '"3","Title {0}","Oil rose, with ""gains"" of {0} percent."\n'),
    "pubmed": ("test.jsonl", PAPER),
    "arxiv": ("valid.jsonl", PAPER),
}
DOCUMENTS = {"wikitext2": 4 * 80, "wikitext103": 4 * 80}  # else 80; blank lines are no documents

GPT2 = [  # set, file, documents, tokens, beginning of the pack hash; GPT-2's tokenizer, length 1024
    ("lambada", "lambada/test.txt", 5153, 424559, "82c29f01eeb1acd8"),
    ("wikitext2", "wikitext2/valid.txt", 2461, 242248, "6d4f20563f8adfa8"),
    ("wikitext2", "wikitext2/wiki.test.raw", 2891, 270438, "8515cf8325878a31"),
    ("ptb", "ptb/valid.txt", 3370, 78403, "73c780fec324525f"),
    ("ptb", "ptb/test.txt", 3761, 87374, "b007c69aa4910ecc"),
    ("lm1b", "lm1b/heldout.txt", 6075, 170192, "74928b9cbfd14c62"),
    ("ag_news", "ag_news", 7600, 392508, "10d9db67a87a6916"),
    ("pubmed", "pubmed/sumpubmed_sample.jsonl", 53, 339861, "b11ca182658482c6"),
]
FIELDS = {"pubmed": "text"}  # of the shared sample


def packed(spec: str, tokenizer: str, length: int, out: Path, *more: str) -> Pack:
    arguments = ["--source", spec, "--tokenizer", tokenizer, "--length", str(length), "--out", str(out), *more]
    assert prepare.main(arguments) == 0
    return open_pack(out)


def check_protocol(pack: Pack, spec: str, name: str, field: str | None, documents: int) -> None:
    """The pack's chunks are exactly the set's documents by the protocol."""
    known, manifest = NAMED_SETS[name], pack.manifest
    body = manifest.length - 2
    assert (manifest.name, manifest.frame, manifest.detokenizer) == (name, "bos-eos", known.detokenizer)
    assert (manifest.packing, manifest.documents) == ("wrap", documents)
    texts = [DETOKENIZERS[known.detokenizer](piece.text) for piece in open_source(spec, None, field).pieces()]
    assert len(texts) == documents and manifest.bytes == sum(len(text.encode()) for text in texts)
    encoded = pack.tokenizer.encode_batch(texts)
    stream = [token for ids in encoded for token in ids]
    assert manifest.tokens == len(stream)
    assert manifest.chunks == len(stream) // body and manifest.dropped_tokens == len(stream) % body

    tokens = pack.all_tokens()
    assert tokens.shape == (manifest.chunks, manifest.length)
    assert (tokens[:, 0] == pack.tokenizer.bos_id).all() and (tokens[:, -1] == pack.tokenizer.eos_id).all()
    assert tokens[:, 1:-1].ravel().tolist() == stream[: manifest.chunks * body]
    assert not (tokens[:, 1:-1] == pack.tokenizer.eos_id).any()
    assert tokens[:, 1:].size == manifest.chunks * (manifest.length - 1)  # scored: all but the BOS

    begins = np.cumsum([0, *map(len, encoded)])[:-1]
    found = [i * body + start - 1 for i in range(len(pack)) for start in pack.doc_starts(i).tolist()]
    assert found == begins[begins < manifest.chunks * body].tolist()


def write(folder: Path, name: str) -> Path:
    """A made-up directory of a set, with files of other splits beside those that count."""
    file, form = MADE_UP[name]
    folder.mkdir()
    numbers = range(80)
    if file.endswith(".jsonl"):
        text = "".join(json.dumps({"article": form.format(i), "abstract": "short"}) + "\n" for i in numbers)
        if name == "pubmed":
            file = "valid.jsonl"
    else:
        text = "".join(form.format(i) for i in numbers)
    (folder / file).write_text(text)
    (folder / "train.txt").write_text("never to be read\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "".join(form.format(i) + "\n" for _, form in MADE_UP.values() for i in range(40))
    (folder / "text.txt").write_text(text + "“quotes” 0123456789\n")
    source = str(folder / "text.txt")
    assert train_tokenizer.main(["--source", source, "--vocab-size", "400", "--out", str(folder / "sp")]) == 0
    return str(folder / "sp")


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_sets(name: str, tokenizer: str, tmp_path: Path) -> None:
    spec = f"{name}={write(tmp_path / 'set', name)}"
    pack = packed(spec, tokenizer, LENGTH, tmp_path / "pack", "--workers", "1")
    check_protocol(pack, spec, name, None, DOCUMENTS.get(name, 80))


def test_workers_do_not_matter(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"wikitext2={write(tmp_path / 'set', 'wikitext2')}"
    one = packed(spec, tokenizer, LENGTH, tmp_path / "1", "--workers", "1").manifest
    monkeypatch.setattr(parts, "PART_CHARACTERS", 1000)
    two = packed(spec, tokenizer, LENGTH, tmp_path / "2", "--workers", "2").manifest
    assert two == one


@needs_shared
@pytest.mark.parametrize(("name", "file", "documents", "tokens", "start"), GPT2)
def test_real_sets(name: str, file: str, documents: int, tokens: int, start: str, tmp_path: Path) -> None:
    spec, field = f"{name}={SHARED / 'eval' / file}", FIELDS.get(name)
    more = ["--text-field", field] if field else []
    pack = packed(spec, str(SHARED / "tokenizers" / "gpt2"), 1024, tmp_path / "pack", "--workers", "1", *more)
    check_protocol(pack, spec, name, field, documents)
    assert (pack.manifest.tokens, pack.manifest.chunks) == (tokens, tokens // 1022)
    assert pack.tokenizer.bos_id == pack.tokenizer.eos_id == 50256
    assert pack.manifest.content_hash.startswith(start)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "file", "documents", "tokens", "start"), GPT2)
def test_real_sets_by_two_workers(
    name: str, file: str, documents: int, tokens: int, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_CHARACTERS", 1 << 17)
    more = ["--text-field", FIELDS[name]] if name in FIELDS else []
    spec, gpt2 = f"{name}={SHARED / 'eval' / file}", str(SHARED / "tokenizers" / "gpt2")
    manifest = packed(spec, gpt2, 1024, tmp_path / "pack", "--workers", "2", *more).manifest
    assert (manifest.documents, manifest.tokens) == (documents, tokens) and manifest.content_hash.startswith(start)
