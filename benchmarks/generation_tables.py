"""The report's tables of generated text: perplexity and cost of each model at several lengths, and how long texts get.

    python -m benchmarks.generation_tables SAMPLES.json … [--lengths SAMPLES.json …] --judge PLACE --data TEXTS
        [--data-texts N] [--json FILE]

Files are those of `run.py sample --json`, any number of each model and length; files of one model and length are put
together, and must then differ in their seed alone. --lengths: files for the table of lengths, where they are others (a
long limit, `--stop eos`); they are not judged. --data: held-out text for scale, a .jsonl file with a document a line,
or a pack, whose documents its EOS part. In the first table it is cut to each length, in the judge's tokens, as the
samples are; in the second its documents are whole, in the tokens of the models. Two Markdown tables are printed behind
the JSON. docs/quality.md says what the columns are and are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3_ds.commands.quality import with_error
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.data.tokenizer import load_tokenizer
from bd3_ds.data.tokenizer_base import Tokenizer
from bd3_ds.evaluation.options import open_device
from bd3_ds.evaluation.text.gen_ppl import open_judge
from bd3_ds.evaluation.text.quality import Quality, read_texts, sampling_figures
from bd3_ds.evaluation.text.statistics import lengths
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.samples import BY_TEXT, BY_TOKEN, read_samples
from bd3_ds.runtime.tables import markdown_table
from benchmarks.measure import finish, parser, say

ORDER = (AR, SEDD, MDLM, BD3)
SAME = ("export", "run", "step", "options")  # of files that are put together
DATA = "held-out text"

Group = dict[tuple[str, int], dict[int, dict[str, Any]]]  # (objective, block size) -> length -> samples


def main(argv: list[str]) -> int:
    asked = _parser().parse_args(argv)
    judged = grouped(asked.samples)
    counted = grouped(asked.lengths) if asked.lengths else judged
    quality = Quality(open_judge(asked.judge, open_device(None)), asked.window, asked.stride, cut=True)
    documents, tokens = [], None
    if asked.data is not None:
        documents = spread(read_documents(asked.data), asked.data_texts)
        tokens = document_lengths(documents, next(iter(next(iter(counted.values())).values())))
    results: dict[str, Any] = {"data": {}, "models": [], "lengths": [], "data_lengths": tokens}
    for length in sorted({length for by_length in judged.values() for length in by_length}):
        if documents:
            results["data"][str(length)] = quality.read(documents, length).figures
    for model, by_length in judged.items():
        for length, samples in sorted(by_length.items()):
            record, _ = quality.of_samples(samples)
            results["models"].append({"model": name(*model), "seeds": samples["seeds"], **record})
            say(f"{name(*model)}, {length} tokens")
    for model, by_length in counted.items():
        for length, samples in sorted(by_length.items()):
            figures = {"texts": len(samples["texts"]), **sampling_figures(samples)}
            results["lengths"].append({"model": name(*model), "length": length, **figures})
    finish("generation_tables", asked, results, asked.json)
    print("\n" + perplexity_table(results) + "\n\n" + length_table(results))
    return 0


def name(objective: str, block_size: int) -> str:
    """The model as the tables name it."""
    return f"BD3-LM L' = {block_size}" if objective == BD3 else objective.upper()


def grouped(paths: Sequence[Path]) -> Group:
    """Samples by model, in the tables' order, and length; raises UserError for files that do not belong together."""
    found: Group = {}
    first: dict[tuple[tuple[str, int], int], Path] = {}
    for path in dict.fromkeys(paths):
        samples = read_samples(path)
        objective, length = samples["objective"], samples["length"]
        if objective not in ORDER:
            raise UserError(f"{path} has the objective '{objective}'; known: {', '.join(ORDER)}")
        model = (objective, samples["block_size"] if objective == BD3 else 0)
        by_length = found.setdefault(model, {})
        if length not in by_length:
            by_length[length] = samples | {"seeds": [samples["seed"]]}
            first[model, length] = path
            continue
        together = by_length[length]
        for key in SAME:
            if samples.get(key) != together.get(key):
                raise UserError(
                    f"{path} and {first[model, length]} are both {name(*model)} at {length} tokens but differ in "
                    f"'{key}' ({samples.get(key)}, {together.get(key)}); give one of them"
                )
        if samples["seed"] in together["seeds"]:
            raise UserError(f"{path} and an earlier file have one seed, {samples['seed']}: their texts are the same")
        together["seeds"].append(samples["seed"])
        for key in (*BY_TEXT, *BY_TOKEN):
            together[key] = together[key] + samples[key]
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(item[0][0]), -item[0][1])))


def read_documents(place: Path) -> list[str]:
    """The documents of a .jsonl file or of a pack; those of a pack's ends may be parts."""
    if not place.is_dir():
        return read_texts(place, "--data")
    from bd3_ds.data.pack import open_pack

    pack = open_pack(place)
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    documents: list[list[int]] = [[]]
    for token in pack.all_tokens().flatten().tolist():
        if token == tokenizer.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [text for ids in documents if (text := tokenizer.decode(ids))]


def spread(values: list[str], most: int | None) -> list[str]:
    """At most `most` of the values, evenly from all of them."""
    if most is None or len(values) <= most:
        return values
    return [values[at * len(values) // most] for at in range(most)]


def document_lengths(documents: list[str], samples: dict[str, Any]) -> dict[str, Any]:
    """Tokens of whole documents in the tokenizer of the model that wrote `samples`."""
    directory = Path(samples.get("run") or "") / "exports" / samples["export"] / "tokenizer"
    if not directory.is_dir():
        raise UserError(f"--data is counted in the models' tokens, but {directory} is not there")
    tokenizer: Tokenizer = load_tokenizer(str(directory))
    return {"texts": len(documents), "tokens": lengths([len(ids) for ids in tokenizer.encode_batch(documents)])}


def perplexity_table(results: dict[str, Any]) -> str:
    """Rows are models; each length has the same columns."""
    every = sorted({row["length"] for row in results["models"]})
    names = ("gen-PPL", "mean of texts", "entropy", "NFE (with cache)", "tokens per forward")
    header = ["model", *(f"{column}, {length}" for length in every for column in names)]
    rows: list[list[str]] = []
    if results["data"]:
        rows.append([DATA, *(cell for length in every for cell in _cells(results["data"][str(length)]))])
    for model in dict.fromkeys(row["model"] for row in results["models"]):
        found = {row["length"]: row for row in results["models"] if row["model"] == model}
        rows.append([model, *(cell for length in every for cell in _cells(found.get(length)))])
    return markdown_table(header, rows)


def length_table(results: dict[str, Any]) -> str:
    """How many tokens texts have, EOS and given tokens apart, and what ended them."""
    header = ("model", "limit", "texts", "median", "mean", "maximum", "ended by EOS")
    rows: list[tuple[str, ...]] = []
    if results["data_lengths"]:
        data = results["data_lengths"]
        rows.append((DATA, "-", str(data["texts"]), *_lengths(data["tokens"]), "-"))
    for row in results["lengths"]:
        counts = _lengths(row["tokens"])
        rows.append((row["model"], str(row["length"]), str(row["texts"]), *counts, f"{row['ended']['eos']:.0%}"))
    return markdown_table(header, rows)


def _cells(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["-"] * 5
    cost = ["-", "-"]
    if "nfe" in record:
        cost = [f"{record['nfe']:.0f} ({record['nfe_with_cache']:.0f})", f"{record['tokens_per_forward']:.2f}"]
    return [
        with_error(record["ppl"], record["ppl_stderr"]),
        with_error(record["mean_ppl"], record["mean_ppl_stderr"]),
        f"{record['entropy']:.2f}",
        *cost,
    ]


def _lengths(tokens: dict[str, Any]) -> tuple[str, str, str]:
    return f"{tokens['median']:.0f}", f"{tokens['mean']:.0f}", f"{tokens['max']:,}"


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("samples", nargs="+", type=Path, metavar="SAMPLES.json", help="for the table of perplexities")
    add("--lengths", nargs="+", type=Path, metavar="SAMPLES.json", help="for the table of lengths (default: the same)")
    add("--judge", required=True, metavar="PLACE", help="as for `run.py quality`")
    add("--data", type=Path, metavar="TEXTS", help="held-out text: a .jsonl file or a pack")
    add("--data-texts", type=int, metavar="N", help="documents of it, spread evenly (default: all)")
    add("--window", type=int, default=1024, help="tokens that the judge reads at once")
    add("--stride", type=int, default=512, help="tokens from one window to the next")
    return made


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
