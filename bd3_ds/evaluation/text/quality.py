"""Quality metrics of generated texts: the record of one samples file, and that of reference text.

docs/quality.md says what each figure is and is not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from bd3_ds.evaluation.text.gen_ppl import Windows, fit_windows, score_rows, text_features
from bd3_ds.evaluation.text.judge import Judge
from bd3_ds.evaluation.text.statistics import distinct, entropy, lengths, mean_and_stderr
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.samples import ENDS
from bd3_ds.runtime.text_files import read_lines

LEAST_FOR_MAUVE = 20  # texts on either side: MAUVE makes a cluster of ten texts, and at least two clusters


@dataclass(frozen=True)
class Reading:
    """What a judge made of some texts: its token ids of each, and the figures that need no more than the texts."""

    rows: list[list[int]]
    figures: dict[str, Any]


class Quality:
    """Makes records with one judge and one way to read.

    cut: whether a text is cut to as many of the judge's tokens as a sample may have (upstream does); window and stride
    as `fit_windows` takes them; progress as `score_rows` does. Raises UserError for windows that cannot be.
    """

    def __init__(
        self,
        judge: Judge,
        window: int = 1024,
        stride: int = 512,
        cut: bool = False,
        progress: Callable[[int], object] | None = None,
    ):
        self.judge = judge
        self.windows: Windows = fit_windows(window, stride, judge.context)
        self.cut = cut
        self._asked = window, stride
        self._progress = progress

    def of_samples(self, samples: dict[str, Any]) -> tuple[dict[str, Any], Reading]:
        """The record of an object that `read_samples` returned, and what the judge made of its texts."""
        reading = self.read(samples["texts"], samples["length"] if self.cut else None)
        record = {key: samples.get(key) for key in ("export", "run", "objective", "block_size", "step", "seed")}
        return record | {"length": samples["length"]} | reading.figures | sampling_figures(samples), reading

    def read(self, texts: list[str], longest: int | None = None) -> Reading:
        """The texts, cut to `longest` of the judge's tokens where that is given."""
        rows = [row[:longest] for row in self.judge.encode(texts)]
        scores = score_rows(self.judge, rows, self.windows, self._progress)
        own = [entropy([token for token in row if token != self.judge.end]) for row in rows]
        mean, stderr = mean_and_stderr(own)
        figures = {
            "judge": self._judge_record(longest),
            "texts": len(texts),
            "empty_texts": sum(not row for row in rows),
            **scores.summary(),
            "entropy": mean,
            "entropy_stderr": stderr,
            "distinct": [distinct(texts, n) for n in (1, 2, 3, 4)],
            "words": sum(len(text.split()) for text in texts),
            "judge_tokens": lengths([len(row) for row in rows]),
            "ppl_by_text": scores.perplexities(),
            "entropy_by_text": own,
        }
        return Reading(rows, figures)

    def features(self, reading: Reading) -> Tensor:
        """[N, D], for `mauve_score`."""
        return text_features(self.judge, reading.rows, self.windows)

    def _judge_record(self, longest: int | None) -> dict[str, Any]:
        window, stride = self._asked
        return {
            "name": self.judge.name,
            "context": self.judge.context,
            "window": self.windows.size,
            "stride": self.windows.stride,
            "window_asked": window,
            "stride_asked": stride,
            "bos_first": self.judge.first is not None,
            "cut_to": longest,
        }


def sampling_figures(samples: dict[str, Any]) -> dict[str, Any]:
    """What the sampler wrote and what it took. Given tokens (order 0) count nowhere; an EOS costs but is no text."""
    wrote = [sum(step > 0 for step in order) for order in samples["order"]]
    ended = samples["ended"]
    written = [
        [token for token, step in zip(ids, order, strict=True) if step > 0]
        for ids, order in zip(samples["token_ids"], samples["order"], strict=True)
    ]
    texts = [ids[:-1] if end == "eos" else ids for ids, end in zip(written, ended, strict=True)]
    nfe, cache = samples["nfe"], samples["cache_forwards"]
    forwards = sum(nfe) + sum(cache)
    mean, stderr = mean_and_stderr([entropy(ids) for ids in texts])
    return {
        "own_entropy": mean,
        "own_entropy_stderr": stderr,
        "tokens": lengths([len(ids) for ids in texts]),
        "ended": {end: ended.count(end) / len(ended) for end in ENDS},
        "nfe": statistics.fmean(nfe),
        "nfe_with_cache": forwards / len(nfe),
        "tokens_per_evaluation": sum(wrote) / sum(nfe) if sum(nfe) else None,
        "tokens_per_forward": sum(wrote) / forwards if forwards else None,
    }


def read_texts(path: Path, option: str = "--reference") -> list[str]:
    """The "text" of each line of a JSONL file; raises UserError for a file that has none, or a line without it."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'{option} {path} cannot be read ({error}); give a .jsonl file with a text a line, {{"text": …}}'
        ) from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{option} {path}: line {number} is not JSON ({error})") from None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{option} {path}: line {number} has no "text"; each line is {{"text": …}}')
        texts.append(text)
    if not texts:
        raise UserError(f"{option} {path} holds no text")
    return texts


def require_mauve() -> None:
    """Raise UserError where the package mauve-text is missing; nothing is imported yet."""
    if find_spec("mauve") is None:
        raise UserError(
            "MAUVE is left out: the package mauve-text is missing; pip install -r requirements-extra.txt brings it"
        )


def mauve_score(generated: Tensor, reference: Tensor) -> float | None:
    """MAUVE (Pillutla et al. 2021) of features [N, D] and [M, D], in (0, 1]; None for fewer than 20 texts.

    Clusters are a tenth of the texts of the smaller side, and seeded. Raises UserError where the package is missing.
    """
    require_mauve()
    import mauve

    if min(len(generated), len(reference)) < LEAST_FOR_MAUVE:
        return None
    answer = mauve.compute_mauve(p_features=generated.numpy(), q_features=reference.numpy(), verbose=False)
    return float(answer.mauve)
