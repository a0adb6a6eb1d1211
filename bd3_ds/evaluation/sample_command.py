"""`run.py sample EXPORT …`: texts from an export, and what they cost."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bd3_ds.evaluation.options import DEVICES, open_device
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.files import require_writable, write_json

RULE = "-" * 80


def main(argv: list[str]) -> int:
    """Sample, print, and write JSON where asked."""
    options = _parser().parse(argv)
    if options.json is not None:
        require_writable(options.json.resolve().parent)

    from bd3_ds.checkpoint.export import find_export

    export = find_export(options.export)

    from bd3_ds.evaluation.api import LanguageModel

    model = LanguageModel(export, open_device(options.device))
    length = options.length or model.run.data.length
    given = model.prompt_ids(options.prompt).shape[1]
    with _Bar(options.num * max(0, length - given)) as bar:
        start = time.perf_counter()
        samples = model.sample(
            options.num,
            length,
            options.prompt,
            options.seed,
            options.temperature,
            options.nucleus,
            progress=bar.update,
        )
        seconds = time.perf_counter() - start
    texts = model.decode(samples.tokens, given)
    written = options.num * (length - given)
    counts = {
        "tokens": written,
        "nfe": int(samples.nfe.sum()),
        "cache_forwards": options.num * samples.cache_forwards,
        "seconds": seconds,
        "tokens_per_second": written / seconds,
    }
    for text in texts:
        print(RULE)
        print(text)
    print(RULE)
    print(
        f"{written} tokens, {counts['nfe']} denoiser evaluations, {counts['cache_forwards']} cache-writing forwards, "
        f"{seconds:.2f} s, {written / seconds:.1f} tokens/s"
    )
    if options.json is not None:
        write_json(options.json, _record(options, model, samples, texts, length) | counts)
    return 0


def _record(options: Any, model: Any, samples: Any, texts: list[str], length: int) -> dict[str, Any]:
    from bd3_ds.sampling.stopping import low_entropy

    return {
        "export": model.export.name,
        "step": model.export.step,
        "length": length,
        "prompt": options.prompt,
        "seed": options.seed,
        "temperature": options.temperature,
        "nucleus": options.nucleus,
        "texts": texts,
        "token_ids": samples.tokens.tolist(),
        "low_entropy": low_entropy(samples.tokens).tolist(),
    }


class _Bar:
    """A tqdm bar on stderr, for people alone."""

    def __init__(self, total: int):
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, unit="token", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)
        self.update = self._bar.update

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _parser() -> Parser:
    parser = Parser(prog="run.py sample", description="Texts from an export. Counts are of all texts together.")
    add = parser.add_argument
    add("export", metavar="EXPORT", help="directory under RUN_DIR/exports, or RUN_DIR for its newest")
    add("--num", type=at_least_one, default=4, metavar="N", help="texts (default 4)")
    add(
        "--length",
        type=at_least_one,
        metavar="L",
        help="tokens of a text, prompt and BOS included (default: data.length)",
    )
    add("--prompt", metavar="TEXT", help="what every text begins with")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same texts (default 0)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most likely token (default 1)")
    add(
        "--nucleus",
        type=float,
        metavar="P",
        help="draw from the most likely tokens that together reach P (default: all)",
    )
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write texts, token ids and counts there")
    return parser
