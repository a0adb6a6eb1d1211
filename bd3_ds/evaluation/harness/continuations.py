"""Log-likelihoods of continuations, and generation from prompts: the requests of lm-evaluation-harness.

A text is BOS and its tokens. A diffusion model's log-likelihood is minus its bound (`diffusion/likelihood.py`); AR's,
and that of block size 1, is the likelihood itself.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.evaluation.api import LanguageModel
from bd3_ds.evaluation.arguments import check_seed, make_options
from bd3_ds.evaluation.harness.greedy import is_greedy
from bd3_ds.evaluation.text_windows import Piece, TextWindows, filled, grouped, places
from bd3_ds.evaluation.token_scores import TOKENS_AT_ONCE
from bd3_ds.runtime.errors import UserError
from bd3_ds.sampling.options import EOS, POLICIES

ROWS_AT_ONCE = 64  # texts between two steps of a progress bar
NEW_TOKENS = 256  # written after a prompt, where the request does not say
VIEWS = 128  # more than the masks of 7 tokens: shorter continuations are exact

# The names that benchmarks give to the sampler's options.
NAMES = {"top_p": "nucleus", "max_new_tokens": "max_gen_toks", "max_tokens": "max_gen_toks"}

TextsDone = Callable[[int], None]  # called with the number of texts just answered


class Continuations:
    """A model with a tokenizer, as benchmarks use it; what it answers depends on the seed and not on batching.

    estimator, views: as for `LanguageModel.score`; None: exact where no block has more masks than `views` (a few
    tokens to score), else stratified, for SEDD mc. `how` are options of the sampler (`sampling/options.py`) for
    continuing prompts, where the request sets none. Raises UserError for values that cannot be.
    """

    def __init__(
        self, model: LanguageModel, estimator: str | None = None, views: int = VIEWS, seed: int = 0, **how: Any
    ):
        if model.tokenizer is None:
            raise UserError(f"{model.export.path} has no tokenizer and knows no texts; convert it with --tokenizer")
        if not isinstance(views, int) or views < 1:
            raise UserError(f"views={views} must be a whole number above 0")
        check_seed(seed)
        make_options(how).check(model.run.objective.name)
        self.model = model
        self.tokenizer = model.tokenizer
        self.estimator = estimator
        self.views = views
        self.seed = seed
        self.how = how
        self.length: int = model.run.data.length
        self.windows = TextWindows(self.length, model.block_size)

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: TextsDone | None = None
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether greedy decoding
        reproduces it.

        Of what exceeds the model's length the left is cut, by whole blocks.
        """
        encoded = [self.encode_pair(*pair) for pair in pairs]
        pieces = [piece for i, (tokens, given) in enumerate(encoded) for piece in self.pieces(tokens, given, i)]
        values, greedy = self._scored(pieces, len(pairs), progress, with_greedy=True)
        return list(zip(values, greedy, strict=True))

    def loglikelihood_rolling(self, texts: Sequence[str], progress: TextsDone | None = None) -> list[float]:
        """log p of each text in nats, every token scored once, in windows of the model's length."""
        encoded = [[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(list(texts))]
        pieces = [piece for i, tokens in enumerate(encoded) for piece in self.pieces(tokens, 1, i)]
        return self._scored(pieces, len(texts), progress)[0]

    def generate_until(
        self, requests: Sequence[tuple[str, dict[str, Any]]], progress: TextsDone | None = None
    ) -> list[str]:
        """What the model writes after each context, up to the first text of the request's `until`, or its end.

        A request's options are `until`, `max_gen_toks` (256), `do_sample`, `temperature` and those of the sampler. At
        temperature 0, the default, a diffusion model writes the token that it is most confident of first. A context
        keeps at most L - max_gen_toks tokens, and at least L / 2, by whole blocks; the window slides past L.
        """
        texts = [""] * len(requests)
        groups: dict[tuple[str, int], list[tuple[int, list[int]]]] = defaultdict(list)
        contexts = self.tokenizer.encode_batch([context for context, _ in requests])
        for index, (ids, (_, request)) in enumerate(zip(contexts, requests, strict=True)):
            count = _request(request)[1]
            room = max(self.length - count, self.length // 2)
            tokens = [self.tokenizer.bos_id, *ids]
            tokens = tokens[self.windows.on_grid(len(tokens) - room) :]
            groups[json.dumps(request, sort_keys=True), self.windows.width(len(tokens))].append((index, tokens))
        for (options, _), rows in groups.items():
            until, count, how = _request(json.loads(options))
            prompts = filled([tokens for _, tokens in rows], self.model.mask_id)
            samples = self.model.sample(len(rows), prompts.shape[1] + count, prompts, self.seed, **self._sampler(how))
            for (index, tokens), row, length in zip(
                rows, samples.tokens.tolist(), samples.lengths.tolist(), strict=True
            ):
                texts[index] = _cut(self._after(tokens, row[: min(length, len(tokens) + count)]), until)
            if progress:
                progress(len(rows))
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The tokens of the two together, from BOS on, and how many of them are given, BOS included.

        White space between them belongs to the continuation. Where a token spans both, what is left of it after the
        context's own tokens is the continuation; where nothing is left, the two are encoded apart.
        """
        head = context.rstrip()
        tail = context[len(head) :] + continuation
        whole, given, apart = self.tokenizer.encode_batch([head + tail, head, tail])
        rest = whole[len(given) :] or apart
        return [self.tokenizer.bos_id, *given, *rest], 1 + len(given)

    def pieces(self, tokens: list[int], given: int, text: int = 0) -> Iterator[Piece]:
        """Windows over `tokens`, in which each token after the `given` first is scored once (`text_windows.py`)."""
        return self.windows.pieces(tokens, given, text)

    def _scored(
        self, pieces: list[Piece], texts: int, progress: TextsDone | None, with_greedy: bool = False
    ) -> tuple[list[float], list[bool]]:
        """Sums over the pieces of each text: log-likelihoods, and whether all that is scored would be written."""
        values, greedy = [0.0] * texts, [True] * texts
        left = [0] * texts
        for piece in pieces:
            left[piece.text] += 1
        groups = grouped(pieces, self.windows, [self._estimator(piece) for piece in pieces])
        number = 0  # of the first piece of a pass: each has its own random numbers
        for (width, estimator), group in groups.items():
            for first in range(0, len(group), ROWS_AT_ONCE):
                part = group[first : first + ROWS_AT_ONCE]
                x0 = filled([piece.tokens for piece in part], self.model.mask_id, width)
                scored = places(part, width)
                score = self.model.score(x0, estimator, self.views, self.seed, scored, first_row=number)
                number += len(part)
                written = self._greedy(x0, scored) if with_greedy else [True] * len(part)
                for piece, nats, right in zip(part, score.nelbo.sum(1).tolist(), written, strict=True):
                    values[piece.text] -= nats
                    greedy[piece.text] &= right
                    left[piece.text] -= 1
                if progress:
                    progress(len({piece.text for piece in part if left[piece.text] == 0}))
        return values, greedy

    def _greedy(self, x0: Tensor, scored: Tensor) -> list[bool]:
        model, width = self.model, x0.shape[1]
        size = width if self.windows.one_block else self.windows.grid
        rows = max(1, TOKENS_AT_ONCE // (2 * width))  # noisy tokens beside clean ones
        parts = zip(x0.to(model.device).split(rows), scored.to(model.device).split(rows), strict=True)
        right = [is_greedy(model.network, model.run.objective.name, *part, size, model.mask_id) for part in parts]
        return [bool(one) for one in torch.cat(right)]

    def _estimator(self, piece: Piece) -> str:
        """What scores the piece, by its own tokens only."""
        objective = self.model.run.objective.name
        if self.estimator is not None:
            return self.estimator
        return self.windows.estimator(piece, objective, masks=(self.views + 1).bit_length() - 1)

    def _sampler(self, how: dict[str, Any]) -> dict[str, Any]:
        """The sampler's options for a request's own."""
        how = {"temperature": 0.0, "stop": (EOS,)} | self.how | how
        diffusion = not OBJECTIVES[self.model.run.objective.name].causal
        if diffusion and how["temperature"] == 0 and not any(how.get(name) is not None for name in POLICIES):
            how["tokens_per_step"] = 1
        return how

    def _after(self, given: list[int], tokens: list[int]) -> str:
        """The text of tokens after the given ones, with the space that may stand before it."""
        before, all_of_it = self.tokenizer.decode(given), self.tokenizer.decode(tokens)
        return all_of_it[len(before) :] if all_of_it.startswith(before) else self.tokenizer.decode(tokens[len(given) :])


def _request(options: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """A request's options apart: `until`, `max_gen_toks` and the sampler's; raises UserError for what cannot be."""
    named = {NAMES.get(name, name): value for name, value in options.items()}
    until = named.pop("until", None) or []
    count = named.pop("max_gen_toks", NEW_TOKENS)
    sampled = named.pop("do_sample", None)
    if named.pop("num_beams", 1) != 1:
        raise UserError(f"num_beams={options['num_beams']}: there is no search by beams; leave it out")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"max_gen_toks={count} must be a whole number above 0")
    if sampled is False:
        named["temperature"] = 0.0
    elif sampled:
        named.setdefault("temperature", 1.0)
    return [until] if isinstance(until, str) else list(until), count, named


def _cut(text: str, until: list[str]) -> str:
    """The text up to the first of these in it."""
    return text[: min((found for stop in until if stop and (found := text.find(stop)) >= 0), default=len(text))]
