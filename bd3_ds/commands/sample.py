"""`run.py sample EXPORT …`: texts from an export, and what they cost."""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.evaluation.arguments import make_options
from bd3_ds.evaluation.options import DEVICES, PRECISIONS, open_device
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import EXIT_INTERRUPTED, UserError
from bd3_ds.runtime.files import require_writable, write_json
from bd3_ds.sampling.options import EOS, Options

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.evaluation.api import LanguageModel
    from bd3_ds.sampling.sampler import Samples

RULE = "-" * 80
SMALL, FEW = 20e6, 100e6  # parameters and tokens below which no model writes sentences


def main(argv: list[str]) -> int:
    """Sample, print, and write JSON where asked."""
    asked = _parser().parse(argv)
    if asked.json is not None:
        require_writable(asked.json.resolve().parent)
    how = {name: getattr(asked, name) for name in vars(Options()) if name != "stop"}
    options = make_options(how | {"stop": _stops(asked.stop)})
    prompt = asked.prompt if asked.prompts is None else _read_prompts(asked)

    from bd3_ds.evaluation.exports import open_export

    export = open_export(asked.export)
    options.check(export.run.objective.name)

    from bd3_ds.evaluation.api import LanguageModel

    model = LanguageModel(export, open_device(asked.device), asked.precision)
    prompts = prompt if isinstance(prompt, list) else None
    num = asked.num if prompts is None else len(prompts)
    length = asked.length or model.run.data.length
    _, ids = model.check_sample(num, length, prompt, asked.seed, asked.batch, options)
    given = (ids != model.mask_id).sum(1).expand(num)  # [N]
    _announce(model, num, length, asked)
    with Interruption() as interruption, _Bar(num * length - int(given.sum())) as bar:
        start = time.perf_counter()
        how = vars(options) | {"batch": asked.batch, "progress": bar.update, "stopped": interruption.asked}
        samples = model.sample(num, length, prompt, asked.seed, **how)
        seconds = time.perf_counter() - start
    rows = samples.begun(given)
    samples, given = samples.rows(rows), given[rows]
    _show(model, samples, given, seconds)
    kept = ""
    if asked.json is not None and len(rows):
        record = _record(model, samples, given.tolist(), seconds)
        words = {"prompt": prompt if prompts is None else [prompts[row] for row in rows.tolist()], "seed": asked.seed}
        words |= {"batch": asked.batch, "precision": asked.precision, "length": length, "options": options.as_record()}
        write_json(asked.json, record | words)
        kept = f"; {asked.json} holds them"
    if interruption.asked():
        print(f"interrupted: {len(rows)} of {num} texts were begun, and are above{kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _announce(model: LanguageModel, num: int, length: int, asked: Any) -> None:
    """Say what is about to be drawn and what it takes; raises UserError where the machine's memory cannot hold it."""
    from bd3_ds.sampling.memory import free_memory, require_memory

    window = asked.window or model.run.data.length

    def needed(tokens: int) -> int:
        return model.memory_to_sample(num, tokens, asked.batch, window, asked.json is not None)

    free, takes = free_memory(model.device), needed(length)
    require_memory(needed, free, num, length)
    memory = f", in about {takes / 2**30:.1f} of {free / 2**30:.1f} GiB that are free" if takes > 2**28 else ""
    texts = f"{num:,} text{'s' if num > 1 else ''} of {length:,} tokens"
    print(f"drawing {texts} from {model.export.path}{memory}", file=sys.stderr, flush=True)


def _show(model: LanguageModel, samples: Samples, given: Tensor, seconds: float) -> None:
    """The texts, what they cost, and what can be expected of them."""
    from bd3_ds.sampling.sampler import ENDED

    for text, why in zip(model.decode(samples), samples.ended.tolist(), strict=True):
        print(RULE)
        print(text if ENDED[why] == "length" else f"{text}\n[ended: {ENDED[why]}]")
    print(RULE)
    print(_summary(samples, given, seconds, OBJECTIVES[model.run.objective.name].causal))
    note = _expectation(model)
    if note:
        print(note)


def _expectation(model: LanguageModel) -> str | None:
    """A sentence for models that cannot write yet; None for those that may, and those that others have trained."""
    run, parameters = model.run, sum(parameter.numel() for parameter in model.network.parameters())
    seen = model.export.step * run.train.global_batch * run.data.length
    if seen == 0 or (parameters >= SMALL and (seen >= FEW or run.train.init_from is not None)):
        return None
    return (
        f"{parameters / 1e6:,.1f} M parameters after {seen / 1e6:,.1f} M tokens: expect words without sense; models "
        "that write sentences have a hundred times the parameters and have read billions of tokens"
    )


def _record(model: LanguageModel, samples: Samples, given: list[int], seconds: float) -> dict[str, Any]:
    """What came out, row by row, and its cost; see docs/sampling.md for the fields."""
    from bd3_ds.sampling.sampler import ENDED
    from bd3_ds.sampling.stopping import low_entropy

    lengths = samples.lengths.tolist()

    def rows(values: Any) -> list[list[Any]]:
        return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]

    ids = rows(samples.tokens)
    written = sum(lengths) - sum(given)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    pieces = {token: tokenizer.piece(token) for token in {token for row in ids for token in row}}
    return {
        "export": model.export.name,
        "run": str(model.export.path.parent.parent),
        "objective": model.run.objective.name,
        "block_size": model.block_size,
        "step": model.export.step,
        "given": given,
        "texts": model.decode(samples),
        "token_ids": ids,
        "pieces": [[pieces[token] for token in row] for row in ids],
        "ended": [ENDED[why] for why in samples.ended.tolist()],
        "low_entropy": [bool(low_entropy(samples.tokens[i, :n][None])) for i, n in enumerate(lengths)],
        "nfe": samples.nfe.tolist(),
        "cache_forwards": samples.cache_forwards.tolist(),
        "order": rows(samples.order),
        "probability": [[None if math.isnan(p) else p for p in row] for row in rows(samples.probability)],
        "tokens": written,
        "seconds": seconds,
        "tokens_per_second": written / seconds,
        "tokens_per_forward": written / max(1, sum(samples.nfe.tolist())),
    }


def _summary(samples: Samples, given: Tensor, seconds: float, causal: bool) -> str:
    tokens = int(samples.lengths.sum()) - int(given.sum())
    nfe, writes = int(samples.nfe.sum()), int(samples.cache_forwards.sum())
    beside = "" if causal else f" and {writes} forwards that only wrote the cache"
    return (
        f"{tokens} tokens, {nfe} denoiser evaluations{beside}, {tokens / max(1, nfe):.2f} tokens an evaluation, "
        f"{seconds:.2f} s, {tokens / seconds:.1f} tokens/s"
    )


def _stops(words: str) -> tuple[str, ...]:
    return () if words == "none" else tuple(words.split(","))


def _read_prompts(asked: Any) -> list[str]:
    """One prompt a line."""
    from bd3_ds.runtime.text_files import read_lines

    if asked.prompt is not None:
        raise UserError("--prompt and --prompts cannot both be given")
    try:
        lines = read_lines(asked.prompts)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {asked.prompts} cannot be read ({error}); give a text file, one prompt a line"
        ) from None
    if not lines:
        raise UserError(f"--prompts {asked.prompts} is empty; give one prompt a line")
    return list(lines)


class Interruption:
    """While it is entered, the first Ctrl-C is noted in `asked`; the second ends the program at once."""

    def __init__(self) -> None:
        self._noted = False

    def asked(self) -> bool:
        """Whether the user asked to stop."""
        return self._noted

    def __enter__(self) -> Interruption:
        self._before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self._noted = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class _Bar:
    """A tqdm bar on stderr; where that is a file, a line now and then, once it takes long."""

    def __init__(self, total: int):
        from tqdm import tqdm

        calm = not sys.stderr.isatty()
        self._bar: Any = tqdm(
            total=total,
            unit="token",
            file=sys.stderr,
            leave=False,
            delay=10.0 if calm else 0.0,
            mininterval=10.0 if calm else 0.1,
        )
        self.update = self._bar.update

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _parser() -> Parser:
    parser = Parser(prog="run.py sample", description="Texts from an export. Counts are of all texts together.")
    add = parser.add_argument
    add("export", metavar="EXPORT", help="in RUN_DIR/exports, RUN_DIR for its newest, or a folder of convert --to hf")
    add("--num", type=at_least_one, default=4, metavar="N", help="texts (default 4)")
    add("--length", type=at_least_one, metavar="T", help="tokens of a text, prompt and BOS included (default: L)")
    add("--prompt", metavar="TEXT", help="what every text begins with")
    add("--prompts", type=Path, metavar="FILE", help="a text for each line of FILE, which it begins with")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same texts (default 0)")
    add("--batch", type=at_least_one, default=64, metavar="N", help="texts drawn side by side (default 64)")
    add("--stop", default=EOS, metavar="eos,entropy|none", help="what ends a text before its length (default eos)")
    add("--window", type=at_least_one, metavar="W", help="tokens that the network sees at most (default: L)")
    add("--overlap", type=at_least_one, metavar="O", help="tokens that stay in sight when the window moves (half)")
    tokens = parser.add_argument_group("which token")
    add = tokens.add_argument
    add("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most likely token (default 1)")
    add("--top-k", type=at_least_one, metavar="K", help="draw from the K most likely tokens")
    add("--nucleus", type=float, metavar="P", help="draw from the most likely tokens that together reach P")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="divides chances of recent tokens (1: none)")
    order = parser.add_argument_group("which order", "default: first hitting, one token an evaluation, random order")
    add = order.add_argument
    add("--steps", type=at_least_one, metavar="T", help="ancestral, T steps a block (MDLM, SEDD: a window)")
    add("--analytic", action="store_true", help="SEDD's own sampler, with --steps")
    add("--threshold", type=float, metavar="P", help="all places whose likeliest token reaches P")
    add("--entropy-bound", type=float, metavar="H", help="the most confident places, up to H nats of entropy together")
    add("--tokens-per-step", type=at_least_one, metavar="K", help="the K most confident places")
    machine = parser.add_argument_group("machine and output")
    add = machine.add_argument
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the weights (default fp32)")
    add("--json", type=Path, metavar="FILE", help="write texts, token ids, their order and counts there")
    return parser
