"""`run.py convert --from upstream|hf|export [--to export|hf|upstream] SRC DST`: models in and out.

Every way goes through an export: what comes from elsewhere becomes one (`interop/to_export.py`), and what goes
elsewhere is made of one (`interop/from_export.py`).
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_ds.checkpoint.export import find_export
from bd3_ds.interop.from_export import write_hugging_face, write_upstream
from bd3_ds.interop.to_export import convert_hugging_face, convert_upstream, find_source
from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.runtime.files import read_json

SOURCES = ("upstream", "hf", "export")
TARGETS = ("export", "hf", "upstream")
_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
_MODEL_TYPES = {"hf": "bd3-ds", "upstream": "bd3lm"}  # by which a folder that may be replaced is known


def main(argv: list[str]) -> int:
    """Read, check that every weight has its place, write; with --push, send it to the hub."""
    options = _parser().parse(argv)
    _check(options)
    _require_free(options.dst, options.target, options.overwrite)
    if options.push is not None:
        from bd3_ds.interop.transfer import require_token

        require_token(options.push)
    with full_disks_as_user_errors(options.dst):
        _convert(options)
    print(f"wrote {options.dst}")
    if options.push is not None:
        from bd3_ds.interop.transfer import push

        print(f"pushed to {push(options.dst, options.push, options.private)}")
    return 0


def _convert(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        made = options.dst if options.target == "export" else Path(scratch) / "export"
        if options.source == "export":
            export = find_export(options.src)
        else:
            convert = convert_hugging_face if options.source == "hf" else convert_upstream
            convert(find_source(options.src, options.source), made, options.tokenizer, options.overrides)
            export = find_export(str(made))
        if options.target == "hf":
            write_hugging_face(export, options.dst)
        elif options.target == "upstream":
            write_upstream(export, options.dst)


@contextmanager
def full_disks_as_user_errors(dst: Path) -> Iterator[None]:
    """Raise UserError where a disk is full, in whatever error a library wraps what the system said."""
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in _FULL):
            raise
        scratch = tempfile.gettempdir()
        raise UserError(
            f"no room is left on the disk of {dst}, or of {scratch}, where a model lies while it is converted; nothing "
            "was written: free some, or choose another DST, or another TMPDIR"
        ) from None


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for words that do not go together."""
    for option, value, known in (("--from", options.source, SOURCES), ("--to", options.target, TARGETS)):
        if value not in known:
            raise UserError(f"{option} {value} is unknown; {did_you_mean(value, known)}")
    if options.source == options.target == "export":
        raise UserError("--from export --to export changes nothing; say --to hf or --to upstream")
    if options.source == "export" and (options.tokenizer is not None or options.overrides):
        given = "--tokenizer" if options.tokenizer is not None else "--set"
        raise UserError(f"{given} is for models of other programs; an export has its own")
    if options.push is not None and options.target != "hf":
        raise UserError(f"--push {options.push} needs --to hf: it sends that folder")
    if options.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.push):
        raise UserError(f"--push {options.push} is no name on the hub; it must be USER/NAME")
    if options.private and options.push is None:
        raise UserError("--private is for --push USER/NAME, which is missing")


def _require_free(dst: Path, target: str, overwrite: bool) -> None:
    """Refuse to replace what is there, unless it is what would be written again and the user asks for it."""
    if not dst.exists():
        return
    if not overwrite:
        raise UserError(f"{dst} already exists; choose another DST or add --overwrite")
    config = dst / "config.json"
    if target == "export":
        known = (dst / "export.json").is_file()
    else:
        content = read_json(config, "config.json") if config.is_file() else None
        known = isinstance(content, dict) and content.get("model_type") == _MODEL_TYPES[target]
    if not known:
        what = "no export" if target == "export" else f"no folder of model_type={_MODEL_TYPES[target]}"
        raise UserError(f"{dst} is {what}, so --overwrite leaves it alone; choose another DST")


def _parser() -> Parser:
    parser = Parser(prog="run.py convert", description="Models of other programs as exports of this one, and back.")
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="folder with config.json and safetensors, .ckpt file, USER/NAME on the hub; or EXPORT",
    )
    add("dst", type=Path, metavar="DST", help="the directory to write")
    add(
        "--from",
        dest="source",
        required=True,
        metavar="|".join(SOURCES),
        help="upstream: kuleshov-group/bd3lms and mdlm; hf: GPT-2 or Llama kinds, or what --to hf wrote; export: ours",
    )
    add("--to", dest="target", default="export", metavar="|".join(TARGETS), help="default: export")
    add("--tokenizer", metavar="SPEC", help="directory, .model file or hub name; it goes into the export")
    add(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what a .ckpt file does not tell, such as model.heads=12; may be given several times",
    )
    add("--push", metavar="USER/NAME", help="with --to hf: send the folder to the hub as well (token: HF_TOKEN)")
    add("--private", action="store_true", help="with --push: a new repository is private")
    add("--overwrite", action="store_true", help="replace what an earlier conversion wrote at DST")
    return parser
