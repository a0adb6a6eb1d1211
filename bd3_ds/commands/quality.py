"""`run.py quality SAMPLES.json …`: generated texts in figures, one row a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.evaluation.options import DEVICES, open_device
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import EXIT_INTERRUPTED, UserError
from bd3_ds.runtime.files import require_writable, write_json
from bd3_ds.runtime.samples import read_samples
from bd3_ds.runtime.tables import console_table

if TYPE_CHECKING:
    from bd3_ds.evaluation.text.quality import Quality, Reading

DEFAULT_JUDGE = "gpt2-large"


def main(argv: list[str]) -> int:
    """Check all files first, then score them one by one, print a table, and write JSON where asked."""
    options = _parser().parse(argv)
    if options.json is not None:
        require_writable(options.json.resolve().parent)
    files = {path.as_posix(): read_samples(path) for path in dict.fromkeys(options.samples)}

    from tqdm import tqdm

    from bd3_ds.evaluation.text.gen_ppl import fit_windows, open_judge
    from bd3_ds.evaluation.text.quality import Quality, read_texts

    fit_windows(options.window, options.stride, None)
    reference = read_texts(options.reference) if options.reference is not None else None
    judge = open_judge(options.judge, open_device(options.device))
    records: list[dict[str, Any]] = []
    try:
        with tqdm(desc="judged", unit="token", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
            quality = Quality(judge, options.window, options.stride, options.truncate, bar.update)
            readings = _judge_files(quality, files, records, options.json)
            if reference is not None:
                longest = max(samples["length"] for samples in files.values()) if options.truncate else None
                read = quality.read(reference, longest)
                _add_mauve(quality, records, readings, read)
                records.append({"file": options.reference.as_posix()} | read.figures)
        if options.json is not None:
            write_json(options.json, records)
    except KeyboardInterrupt:
        kept = f"; kept in {options.json}" if options.json is not None and records else ""
        print(f"stopped: {len(records)} of {len(files)} files are judged{kept}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    finally:
        if records:
            used = records[0]["judge"]
            print(
                f"judge {used['name']}, windows of {used['window']} tokens, stride {used['stride']}"
                + (f" (asked: {used['window_asked']}, {used['stride_asked']})" if _was_fitted(used) else "")
            )
            print(format_table(records))
    return 0


def _judge_files(
    quality: Quality, files: dict[str, Any], records: list[dict[str, Any]], json: Path | None
) -> list[Reading]:
    """Append the record of each file to `records`, and write them to `json` as they come; what the judge made of each.

    Raises UserError, with the file's name, for texts that cannot be judged.
    """
    readings = []
    for name, samples in files.items():
        try:
            record, reading = quality.of_samples(samples)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        records.append({"file": name} | record)
        readings.append(reading)
        if json is not None:
            write_json(json, records)
    return readings


def format_table(records: list[dict[str, Any]]) -> str:
    """Records as aligned columns; what real text does not have stays empty."""
    rows: list[tuple[str, ...]] = []
    for record in records:
        ended = record.get("ended")
        nfe = f"{record['nfe']:.0f} ({record['nfe_with_cache']:.0f})" if "nfe" in record else ""
        tokens = record.get("tokens") or record["judge_tokens"]
        rows.append(
            (
                record["file"],
                str(record["texts"]),
                with_error(record["ppl"], record["ppl_stderr"]),
                with_error(record["mean_ppl"], record["mean_ppl_stderr"]),
                f"{record['entropy']:.2f}",
                _number(record.get("own_entropy"), ".2f"),
                "/".join(_number(share, ".2f") for share in record["distinct"]),
                f"{tokens['median']:.0f}/{tokens['mean']:.0f}/{tokens['max']}",
                f"{ended['eos']:.0%}" if ended else "",
                nfe,
                _number(record.get("tokens_per_forward"), ".2f"),
                _number(record.get("mauve"), ".3f"),
            )
        )
    return console_table(_HEADER, rows)


_HEADER = (
    "file", "texts", "gen-PPL", "mean of texts", "entropy", "own", "distinct-1/2/3/4", "tokens: med/mean/max", "EOS",
    "NFE (+cache)", "tokens/forward", "MAUVE",
)  # fmt: skip


def with_error(value: float, stderr: float | None) -> str:
    """A value and its standard error, two digits after the point."""
    return f"{value:.2f}" if stderr is None else f"{value:.2f} ± {stderr:.2f}"


def _add_mauve(quality: Quality, records: list[dict[str, Any]], readings: list[Reading], reference: Reading) -> None:
    """Write "mauve" into each record, or say in one sentence why not."""
    from bd3_ds.evaluation.text.quality import LEAST_FOR_MAUVE, mauve_score, require_mauve

    try:
        require_mauve()
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
        return
    expected = quality.features(reference)
    for record, reading in zip(records, readings, strict=True):
        record["mauve"] = mauve_score(quality.features(reading), expected)
        if record["mauve"] is None:
            print(
                f"note: {record['file']}: MAUVE is left out: it needs {LEAST_FOR_MAUVE} texts or more, here and in "
                "--reference",
                file=sys.stderr,
            )


def _was_fitted(judge: dict[str, Any]) -> bool:
    return (judge["window"], judge["stride"]) != (judge["window_asked"], judge["stride_asked"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _parser() -> Parser:
    parser = Parser(
        prog="run.py quality",
        description="Generated texts in figures: perplexity under a judge, entropy, repetition, lengths, cost.",
    )
    add = parser.add_argument
    add("samples", nargs="+", type=Path, metavar="SAMPLES.json", help="files of `run.py sample --json`")
    add(
        "--judge",
        default=DEFAULT_JUDGE,
        metavar="PLACE",
        help="folder of a Hugging Face causal model, AR export or run of ours, or a hub name (default gpt2-large)",
    )
    add("--window", type=at_least_one, default=1024, metavar="W", help="tokens that the judge reads at once")
    add("--stride", type=at_least_one, default=512, metavar="S", help="tokens from one window to the next")
    add("--truncate", action="store_true", help="cut each text to as many of the judge's tokens as a sample may have")
    add("--reference", type=Path, metavar="TEXTS.jsonl", help="real texts: a row of their own, and MAUVE against them")
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write the records there, full precision")
    return parser
