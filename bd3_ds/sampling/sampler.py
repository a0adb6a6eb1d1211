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
ENDED = ("length", "eos", "entropy")  # why a row ended, as numbered in `Samples.ended`

Progress = Callable[[int], None]  # told how many tokens have just been written


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

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """Rows of several batches, one after the other."""
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
) -> Samples:
    """`num` texts along `course`.

    prompt [P] or [num, P] holds the given tokens from position 0 (BOS) on, with mask_id where one is to be written. A
    length that ends inside a block is cut out of the whole block. `timed`: the network is conditioned on the noise
    level. eos_id ends texts (with options.stop) and fills what is behind; without it [MASK] does. `first_row` numbers
    the rows when they come in parts.
    """
    size = course.block
    total = course.length if course.whole else -(-course.length // size) * size
    state = _blank(num, total, mask_id, prompt, denoiser.device)
    draws = uniform_draws(seed, first_row, state.tokens)
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
            chances = draws[alive, begin:end]  # [A, S, 2]
            rule = make_rule(options, chances[..., TIME].cpu(), denoiser.vocab_size)
            block = _Block(alive, begin, end, masked, rule, chances[..., TOKEN])
            _denoise(denoiser, state, block, mask_id, options, timed, progress)
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


def uniform_draws(seed: int, first_row: int, text: Tensor) -> Tensor:
    """Uniform numbers [N, T, 2] fp64 for the places of each row; a longer text only adds to a shorter one's."""
    num, length = text.shape
    rows = [generator(seed, Purpose.SAMPLING, first_row + row).random((length, 2)) for row in range(num)]
    return torch.from_numpy(np.stack(rows)).to(text.device)


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
) -> None:
    """Write all masks of the block. Orders that look at predictions wait for these once an evaluation, others never."""
    alive, begin, end, rule, device = part.alive, part.begin, part.end, part.rule, denoiser.device
    block, probability = state.tokens[alive, begin:end], state.probability[alive, begin:end]  # [A, S]
    uniform = part.uniform.flatten()
    masked = part.masked.clone()
    order, nfe = torch.zeros(masked.shape, dtype=torch.long), torch.zeros(len(masked), dtype=torch.long)
    while bool(masked.any()):
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
    rows = alive[over]
    state.lengths[rows], state.ended[rows] = length[over] + first, why[over]
    behind = torch.arange(state.tokens.shape[1], device=alive.device) >= state.lengths[rows, None]  # [R, T]
    state.tokens[rows] = state.tokens[rows].masked_fill(behind, mask_id if eos_id is None else eos_id)
    state.order[rows] = state.order[rows].masked_fill(behind, 0)
    state.probability[rows] = state.probability[rows].masked_fill(behind, torch.nan)
    return ~over
