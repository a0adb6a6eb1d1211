"""Texts from a denoiser, block after block: every objective, every order of unmasking, rows that end by themselves.

Block diffusion writes blocks of L' tokens behind clean ones, AR blocks of one, MDLM and SEDD one block that is the
whole window. Past the window, all go on with the tokens that stay in sight (semi-autoregressive).

SEDD: its network gives log p_t(y) / p_t([MASK]). With the absorbing process this ratio is the posterior p(x0 = y | x_t)
times a factor that depends on time alone, so the scores over all tokens but [MASK], normalised, are that posterior, and
the same orders of unmasking apply.

Every random number is a function of (seed, row, place in the row): a text does not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bd3_ds.diffusion.score_entropy import sigma_of
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.rng import Purpose, generator
from bd3_ds.runtime.transfer import send
from bd3_ds.sampling.denoiser import Cached, Causal, Denoiser
from bd3_ds.sampling.draw import Drawn, draw
from bd3_ds.sampling.options import Course, Options
from bd3_ds.sampling.stopping import WINDOW, find_ends
from bd3_ds.sampling.unmasking import Outlook, Rule, make_rule

TIME, TOKEN = range(2)  # what the two uniform numbers of a place are for
ENDED = ("length", "eos", "entropy", "interrupted")  # why a row ended, as numbered in `Samples.ended`
AHEAD = 256  # places; uniform numbers are made for so many at once

Progress = Callable[[int], None]  # told how many tokens have just been written
Stopped = Callable[[], bool]  # whether to end before the texts do


@dataclass(frozen=True)
class Samples:
    """N texts of T tokens and what they cost.

    tokens [N, T]: behind a row's end, the filler. lengths [N] up to the end, EOS included; ended [N] indexes ENDED.
    nfe [N]: evaluations of the network in which a mask of the row could fall. cache_forwards [N]: passes that only
    filled the cache with clean tokens (AR's evaluations fill it themselves). order [N, T]: the number, from 1, of the
    row's evaluation that wrote the token, 0 for given ones and filler. probability [N, T] fp64: the model's own, of the
    token when it was written, nan for given ones and filler.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    nfe: Tensor
    cache_forwards: Tensor
    order: Tensor
    probability: Tensor

    def rows(self, rows: Tensor) -> Samples:
        """These rows [R] alone."""
        return Samples(*(getattr(self, field.name)[rows] for field in fields(Samples)))

    def begun(self, given: Tensor) -> Tensor:
        """Numbers of the rows that ended by themselves, or hold more than their given [N] tokens."""
        whole = self.ended != ENDED.index("interrupted")
        return (whole | (self.lengths > given[: len(self.lengths)])).nonzero()[:, 0]

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """Rows of several batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Samples(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


@torch.no_grad()  # not inference_mode: masks made here are kept and may serve a training pass later
def sample(
    denoiser: Denoiser,
    course: Course,
    prompt: Tensor,
    *,
    num: int,
    mask_id: int,
    options: Options = Options(),  # noqa: B008 (frozen)
    eos_id: int | None = None,
    timed: bool = False,
    seed: int = 0,
    first_row: int = 0,
    progress: Progress | None = None,
    stopped: Stopped | None = None,
) -> Samples:
    """`num` texts along `course`.

    prompt [P] or [num, P] holds the given tokens from position 0 (BOS) on, with mask_id where one is to be written. A
    length that ends inside a block is cut out of the whole block. `timed`: the network is conditioned on the noise
    level. eos_id ends texts (with options.stop) and fills what is behind; without it [MASK] does. `first_row` numbers
    the rows when they come in parts. Once `stopped` says so, the rows that have not ended are cut before the block that
    they are in.
    """
    size = course.block
    total = course.length if course.whole else -(-course.length // size) * size
    state = _blank(num, total, mask_id, prompt, denoiser.device)
    draws = UniformDraws(seed, first_row, num, denoiser.device)
    # EOS ends a text only behind all that is given.
    place = torch.arange(total, device=denoiser.device)
    given = (place + 1).where(state.tokens != mask_id, 0).max(1).values  # [N]
    alive = torch.arange(num, device=denoiser.device)  # rows that have not ended
    denoiser.restart()
    origin = position = 0  # where the window begins, and where its next tokens stand
    while position < total and len(alive):
        if position + size - origin > course.window:
            origin = position - course.overlap
            denoiser.restart()
        begin = origin if course.whole else position
        end = min(begin + size, total)
        masked = (state.tokens[alive, begin:end] == mask_id).cpu()
        if bool(masked.any()):
            known = origin + len(denoiser)
            if known < begin:
                denoiser.extend(state.tokens[alive, known:begin])
                state.cache_forwards[alive] += denoiser.cache_forwards
            chances = draws.between(begin, end)[alive]  # [A, S, 2]
            rule = make_rule(options, chances[..., TIME].cpu(), denoiser.vocab_size)
            block = _Block(alive, begin, end, masked, rule, chances[..., TOKEN])
            if not _denoise(denoiser, state, block, mask_id, options, timed, progress, stopped):
                _cut(state, alive, torch.full_like(alive, position), ENDED.index("interrupted"), eos_id, mask_id)
                break
        position = end
        if options.stop:
            stands = _end_rows(state, alive, begin, end, given, options, eos_id, mask_id)
            if not bool(stands.all()):
                alive = alive[stands]
                denoiser.select(stands.nonzero()[:, 0])
    cut = slice(0, course.length)
    return Samples(
        state.tokens[:, cut],
        state.lengths.clamp(max=course.length),
        state.ended.where(state.lengths <= course.length, 0),
        state.nfe,
        state.cache_forwards,
        state.order[:, cut],
        state.probability[:, cut],
    )


def denoiser_of(model: DiT, block_size: int) -> Cached:
    """The network behind a cache, as `sample` wants it."""
    return Causal(model) if model.network.causal else Cached(model, block_size)


class UniformDraws:
    """Uniform numbers for the places of N rows, made when the window comes to them.

    A longer text only adds to a shorter one's.
    """

    def __init__(self, seed: int, first_row: int, rows: int, device: torch.device):
        self._generators = [generator(seed, Purpose.SAMPLING, first_row + row) for row in range(rows)]
        self._start = 0
        self._kept = torch.empty((rows, 0, 2), dtype=torch.float64, device=device)  # of the places from _start on

    def between(self, begin: int, end: int) -> Tensor:
        """Those of the places [begin, end), [N, end - begin, 2] fp64; `begin` never goes back."""
        known = self._start + self._kept.shape[1]
        if end > known:
            count = max(end - known, AHEAD)
            fresh = torch.from_numpy(np.stack([rng.random((count, 2)) for rng in self._generators]))
            self._kept = torch.cat([self._kept, fresh.to(self._kept.device)], dim=1)[:, begin - self._start :]
            self._start = begin
        return self._kept[:, begin - self._start : end - self._start]


def _blank(num: int, total: int, mask_id: int, prompt: Tensor, device: torch.device) -> Samples:
    """The prompt, then masks; all else is written to as the texts come."""
    tokens = torch.full((num, total), mask_id, device=device)
    tokens[:, : prompt.shape[-1]] = prompt
    lengths = torch.full((num,), total, device=device)
    ended, nfe, cache_forwards = (torch.zeros_like(lengths) for _ in range(3))
    order = torch.zeros((num, total), dtype=torch.long, device=device)
    unknown = torch.full((num, total), torch.nan, dtype=torch.float64, device=device)
    return Samples(tokens, lengths, ended, nfe, cache_forwards, order, unknown)


@dataclass(frozen=True)
class _Block:
    """The part [begin, end) of the rows `alive` [A], on the device. On the host: which places are `masked` [A, S], and
    the rule by which they fall. uniform [A, S]: what tokens are drawn by.

    Masks are kept on the host, where the numbers of places that depend on them are known without waiting for a GPU.
    """

    alive: Tensor
    begin: int
    end: int
    masked: Tensor
    rule: Rule
    uniform: Tensor


def _denoise(
    denoiser: Denoiser,
    state: Samples,
    part: _Block,
    mask_id: int,
    options: Options,
    timed: bool,
    progress: Progress | None,
    stopped: Stopped | None,
) -> bool:
    """Write all masks of the block. Orders that look at predictions wait for these once an evaluation, others never.

    False, and nothing is written, where it was `stopped` before the end.
    """
    alive, begin, end, rule, device = part.alive, part.begin, part.end, part.rule, denoiser.device
    block, probability = state.tokens[alive, begin:end], state.probability[alive, begin:end]  # [A, S]
    uniform = part.uniform.flatten()
    masked = part.masked.clone()
    order, nfe = torch.zeros(masked.shape, dtype=torch.long), torch.zeros(len(masked), dtype=torch.long)
    while bool(masked.any()):
        if stopped is not None and stopped():
            return False
        asked, t = rule.ask(masked)
        at = asked.flatten().nonzero()[:, 0]  # [M]
        places = send(at, device)
        u = uniform[places]
        seen = None
        if options.repetition_penalty > 1:
            recent = torch.cat([state.tokens[alive, max(0, begin - WINDOW) : begin], block], dim=1)
            seen = recent[places // (end - begin)]  # [M, R]

        def read(logits: Tensor, first: int, u: Tensor = u, seen: Tensor | None = seen) -> Drawn:
            rows = slice(first, first + len(logits))
            return draw(logits, u[rows], mask_id, options, None if seen is None else seen[rows], rule.looks)

        drawn = denoiser.predict(block, at, send(sigma_of(t), device) if timed else None, read)
        nfe += asked.any(1)
        falls = rule.fall(asked, _outlook(asked, drawn)) if rule.looks else asked
        now = falls.flatten()[at].nonzero()[:, 0]
        written, chosen = send(at[now], device), send(now, device)
        block.view(-1)[written], probability.view(-1)[written] = drawn.tokens[chosen], drawn.probability[chosen]
        order[falls] = nfe[:, None].expand_as(order)[falls]
        masked &= ~falls
        if progress:
            progress(int(falls.sum()))
    state.tokens[alive, begin:end], state.probability[alive, begin:end] = block, probability
    before, order = state.nfe[alive], send(order, device)
    state.order[alive, begin:end] = torch.where(order > 0, order + before[:, None], state.order[alive, begin:end])
    state.nfe[alive] = before + send(nfe, device)
    return True


def _outlook(asked: Tensor, drawn: Drawn) -> Outlook:
    """What was said of the asked places, in their places on the host, which waits for it."""
    blank = torch.zeros(asked.shape, dtype=torch.float64)
    said = torch.stack([drawn.surest, drawn.entropy, drawn.log_mass]).cpu()
    return Outlook(*(blank.masked_scatter(asked, part) for part in said))


def _end_rows(
    state: Samples,
    alive: Tensor,
    begin: int,
    end: int,
    given: Tensor,
    options: Options,
    eos_id: int | None,
    mask_id: int,
) -> Tensor:
    """Which of the rows `alive` go on behind the block [begin, end), boolean [A]; the others are cut and filled up."""
    first = max(0, min(begin, end - WINDOW))  # what lies before was looked at when it was written
    length, why = find_ends(state.tokens[alive, first:end], given[alive] - first, options.stop, eos_id)  # [A], [A]
    over = why > 0
    _cut(state, alive[over], length[over] + first, why[over], eos_id, mask_id)
    return ~over


def _cut(state: Samples, rows: Tensor, lengths: Tensor, why: Tensor | int, eos_id: int | None, mask_id: int) -> None:
    """End these rows [R] after `lengths` [R] tokens, and fill up what is behind."""
    state.lengths[rows], state.ended[rows] = lengths, why
    first = int(lengths.min()) if len(rows) else 0
    behind = torch.arange(first, state.tokens.shape[1], device=rows.device) >= lengths[:, None]  # [R, T - first]
    for tensor, filler in (
        (state.tokens, mask_id if eos_id is None else eos_id),
        (state.order, 0),
        (state.probability, torch.nan),
    ):
        tensor[rows, first:] = tensor[rows, first:].masked_fill(behind, filler)
