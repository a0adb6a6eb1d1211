"""Every mistake at the data commands ends with exit code 2 and one sentence that helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_ds.data.manifest import read_manifest
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.runtime.errors import UserError, run_command
from data_prep import prepare, synthetic, train_tokenizer, verify

COMMANDS = {
    "prepare": prepare.main,
    "synthetic": synthetic.main,
    "train_tokenizer": train_tokenizer.main,
    "verify": verify.main,
}
CHAIN = "--symbols 8 --length 16 --chunks 4 --out {0}/out"
GOOD = "--source {0}/good.txt --tokenizer {0}/tok --length 8 --workers 1 --out {0}/out"

CASES = [
    ("prepare", "", ["--source", "--tokenizer"]),
    ("prepare", GOOD + " --lenght 8", ["--lenght", "did you mean '--length'"]),
    ("prepare", GOOD.replace("8", "3"), ["--length 3", "at least 4"]),
    ("prepare", GOOD.replace("8", "long"), ["--length long", "whole number"]),
    ("prepare", GOOD.replace("8", "1e3"), ["--length 1e3", "whole number"]),
    ("prepare", GOOD.replace("--workers 1", "--workers 0"), ["--workers 0", "at least 1"]),
    ("prepare", GOOD + " --limit-documents 0", ["--limit-documents 0"]),
    ("prepare", GOOD + " --frame bos_eos", ["--frame bos_eos", "did you mean 'bos-eos'"]),
    ("prepare", GOOD + " --detokenizer wikitxt", ["did you mean 'wikitext'"]),
    ("prepare", GOOD + " --split train", ["--split train", "one file"]),
    ("prepare", GOOD.replace("good.txt", "none.txt"), ["none.txt", "is no file"]),
    ("prepare", GOOD.replace("{0}/good.txt", "lambda"), ["did you mean 'lambada'"]),
    ("prepare", GOOD.replace("{0}/good.txt", "lambda={0}/good.txt"), ["did you mean 'lambada'"]),
    ("prepare", GOOD.replace("{0}/good.txt", "lambada={0}/none.txt"), ["no such file", "none.txt"]),
    ("prepare", GOOD.replace("{0}/good.txt", "python-docs") + " --split tset", ["--split tset", "train, valid"]),
    ("prepare", GOOD.replace("good.txt", "empty.txt"), ["empty.txt", "holds no text"]),
    ("prepare", GOOD.replace("good.txt", "blank.jsonl"), ["holds no text"]),
    ("prepare", GOOD.replace("good.txt", "short.txt"), ["do not fill one chunk of 8"]),
    ("prepare", GOOD.replace("good.txt", "bad.jsonl"), ["bad.jsonl line 2", "not valid JSON"]),
    ("prepare", GOOD.replace("good.txt", "field.jsonl"), ["--text-field text", "line 1", "body"]),
    ("prepare", GOOD.replace("good.txt", "number.jsonl"), ["holds no string"]),
    ("prepare", GOOD.replace("good.txt", "head.csv"), ["--text-field text", "title, body"]),
    ("prepare", GOOD.replace("good.txt", "latin.txt"), ["latin.txt", "not UTF-8"]),
    ("prepare", GOOD.replace("good.txt", "broken.txt.gz"), ["broken.txt.gz", "cannot be read"]),
    ("prepare", GOOD.replace("good.txt", "broken.jsonl.zst"), ["broken.jsonl.zst", "cannot be read"]),
    ("prepare", GOOD.replace("good.txt", "broken.parquet"), ["broken.parquet", "not a Parquet file"]),
    ("prepare", GOOD.replace("good.txt", "what.pdf"), ["what.pdf", ".jsonl"]),
    ("prepare", GOOD.replace("{0}/good.txt", "{0}/tok"), ["holds no .txt"]),
    ("prepare", GOOD.replace("{0}/tok", "{0}/none"), ["tokenizer not found", "none"]),
    ("prepare", GOOD.replace("{0}/tok", "{0}/good.txt"), ["neither a sentencepiece"]),
    ("prepare", GOOD.replace("{0}/tok", "{0}/folder"), ["holds none of tokenizer.model"]),
    ("prepare", GOOD.replace("{0}/out", "ftp://host/pack"), ["--out ftp://host/pack", "s3://"]),
    ("prepare", GOOD + " --packing wrapped", ["--packing wrapped", "did you mean 'wrap'"]),
    ("prepare", GOOD + " --packing aligned", ["--packing aligned", "--block-size"]),
    ("prepare", GOOD + " --packing aligned --block-size 3", ["--block-size 3", "must divide --length 8"]),
    ("prepare", GOOD + " --packing aligned --block-size 4 --frame bos-eos", ["--frame bos-eos", "leave it out"]),
    ("prepare", GOOD + " --block-size 4", ["--block-size 4", "--packing aligned alone"]),
    ("prepare", GOOD.replace("{0}/out", "."), ["--out .", "name one inside it"]),
    ("prepare", GOOD.replace("{0}/out", "/proc"), ["--out /proc", "name one inside it"]),
    ("prepare", GOOD + " --scratch {0}", ["--scratch", "remote --out alone"]),
    ("prepare", GOOD.replace("{0}/out", "{0}/good.txt"), ["--out", "is a file"]),
    ("prepare", GOOD.replace("{0}/out", "{0}/good.txt/x"), ["cannot write to"]),
    ("prepare", GOOD.replace("{0}/out", "{0}/folder") + " --overwrite", ["not a data pack", "never overwritten"]),
    ("prepare", GOOD.replace("--source", "--sorce"), ["--sorce", "did you mean '--source'?"]),
    ("prepare", GOOD + " more", ["unrecognized arguments: more"]),
    ("verify", "", ["directory"]),
    ("verify", "{0}/tok --quick", ["unknown option --quick"]),
    ("verify", "{0}/none", ["data pack not found", "data_prep.prepare"]),
    ("verify", "{0}/folder", ["is not a data pack"]),
    ("train_tokenizer", "--source {0}/good.txt --vocab-size 100 --out {0}/sp", ["--vocab-size 100", "at least 300"]),
    ("train_tokenizer", "--source {0}/good.txt --vocab-size 9000 --out {0}/sp", ["too little text"]),
    ("train_tokenizer", "--source {0}/good.txt --vocab_size 400 --out {0}/sp", ["did you mean '--vocab-size'?"]),
    (
        "train_tokenizer",
        "--source {0}/good.txt --vocab-size 400 --model-type bpee --out {0}/sp",
        ["--model-type bpee", "did you mean 'bpe'?"],
    ),
    ("train_tokenizer", "--source {0}/empty.txt --vocab-size 400 --out {0}/sp", ["holds no text"]),
    ("train_tokenizer", "--source {0}/good.txt --vocab-size 400 --out {0}/folder", ["not a tokenizer directory"]),
    ("synthetic", "", ["--length", "--chunks", "--out"]),
    ("synthetic", CHAIN + " --sead 2", ["--sead", "did you mean '--seed'?"]),
    ("synthetic", CHAIN.replace("--symbols 8", "--symbols 1"), ["--symbols 1", "at least 2"]),
    ("synthetic", CHAIN.replace("--symbols 8", "--symbols 5000"), ["--symbols 5000", "at most 1024"]),
    ("synthetic", CHAIN.replace("--length 16", "--length 3"), ["--length 3", "at least 4"]),
    ("synthetic", CHAIN.replace("--chunks 4", "--chunks many"), ["--chunks many", "whole number"]),
    ("synthetic", CHAIN + " --seed -1", ["--seed -1", "at least 0"]),
    ("synthetic", CHAIN + " --part 99999999999999999999", ["--part 99999999999999999999", "at most"]),
    ("synthetic", CHAIN.replace("{0}/out", "{0}/folder"), ["not a data pack", "never overwritten"]),
    ("synthetic", CHAIN.replace("{0}/out", "gs://bucket/pack"), ["gs://bucket/pack", "on this machine"]),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad-input")
    files: dict[str, bytes] = {
        "good.txt": b"1 2 3 4 5 6 7 8 9 10 11 12",
        "empty.txt": b"",
        "short.txt": b"1 2",
        "blank.jsonl": b'{"text": " "}\n',
        "bad.jsonl": b'{"text": "1"}\n{"text": \n',
        "field.jsonl": b'{"body": "1"}\n',
        "number.jsonl": b'{"text": 1}\n',
        "head.csv": b"title,body\na,b\n",
        "latin.txt": "naïve".encode("latin-1"),
        "broken.txt.gz": b"not gzip",
        "broken.jsonl.zst": b"not zstd",
        "broken.parquet": b"not parquet",
        "what.pdf": b"%PDF",
        "folder/note.md": b"hello",
    }
    (root / "folder").mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    number_tokenizer(16).save(root / "tok")
    return root


@pytest.mark.parametrize(("command", "arguments", "parts"), CASES)
def test_sentence(
    command: str, arguments: str, parts: list[str], work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(COMMANDS[command], arguments.format(work).split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for part in parts:
        assert part in error
    assert not (work / "out").exists() and not list(work.glob(".*partial"))


def test_as_a_process(work: Path) -> None:
    command = [sys.executable, "-m", "data_prep.prepare", *GOOD.replace("8", "two").format(work).split()]
    root = Path(prepare.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --length two: must be a whole number of at least 4 tokens\n"


def test_damaged_manifests(tmp_path: Path) -> None:
    for text, sentence in [
        ("{", "not valid JSON"),
        ("{}", "has the format None"),
        (json.dumps({"format": "bd3-ds pack 1"}), "damaged"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_manifest(tmp_path)
    with pytest.raises(UserError, match="remote"):
        read_manifest("s3://bucket/pack")
