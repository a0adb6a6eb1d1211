"""The sampling loop, block by block: every objective and unmasking policy, early stopping of rows, sliding windows.

Block diffusion writes blocks of L' tokens after clean ones, AR blocks of one, MDLM and SEDD one block that is the whole
window. Past the window, all continue from its last tokens (semi-autoregressive).

SEDD: its network gives log p_t(y) / p_t([MASK]). With the absorbing process this ratio is the posterior p(x0 = y | x_t)
times a factor that depends only on time, so the scores over all tokens but [MASK], normalised, are that posterior, and
the same unmasking policies apply.

Every random number is a function of (seed, row, position): a text does not depend on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bd3_ds.diffusion.score_entropy import sigma_of
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.host_to_device import send
from bd3_ds.runtime.rng import Purpose, generator
from bd3_ds.sampling.denoiser import CachedDenoiser, CausalDenoiser, SamplingDenoiser
from bd3_ds.sampling.draw import SampledTokens, draw
from bd3_ds.sampling.options import Options, WindowPlan
from bd3_ds.sampling.stopping import WINDOW, find_ends
from bd3_ds.sampling.unmasking import Predictions, UnmaskingPolicy, make_policy

TIME, TOKEN = range(2)  # what the two uniform numbers of a position are for
ENDED = ("length", "eos", "entropy", "interrupted")  # why a row ended, as numbered in `Samples.ended`
AHEAD = 256  # positions; uniform numbers are drawn for so many at once

TokenProgress = Callable[[int], None]  # called with the number of tokens just written
ShouldStop = Callable[[], bool]  # polled; True ends the sampling early


@dataclass(frozen=True)
class Samples:
    """N texts of T tokens and their cost.

    tokens [N, T]: the filler after a row's end. lengths [N] up to the end, EOS included; ended [N] indexes ENDED.
    nfe [N]: evaluations of the network in which the row had candidates. cache_forwards [N]: passes that only filled the
    cache with clean tokens (AR's evaluations fill it themselves). order [N, T]: the number, from 1, of the
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
        """Only these rows [R]."""
        return Samples(*(getattr(self, field.name)[rows] for field in fields(Samples)))

    def begun(self, given: Tensor) -> Tensor:
        """Numbers of the rows that were not interrupted, or hold more than their given [N] tokens."""
        whole = self.ended != ENDED.index("interrupted")
        return (whole | (self.lengths > given[: len(self.lengths)])).nonzero()[:, 0]

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """The rows of several batches concatenated."""
        if len(parts) == 1:
            return parts[0]
        return Samples(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


@torch.no_grad()  # not inference_mode: masks made here are kept and may serve a training pass later
def sample(
    denoiser: SamplingDenoiser,
    plan: WindowPlan,
    prompt: Tensor,
    *,
    num: int,
    mask_id: int,
    options: Options = Options(),  # noqa: B008 (frozen)
    eos_id: int | None = None,
    timed: bool = False,
    seed: int = 0,
    first_row: int = 0,
    progress: TokenProgress | None = None,
    stopped: ShouldStop | None = None,
) -> Samples:
    """`num` texts by `plan`.

    prompt [P] or [num, P] holds the given tokens from position 0 (BOS) on, with mask_id where one is to be written. A
    length that ends inside a block is cut out of the whole block. `timed`: the network is conditioned on the noise
    level. eos_id ends texts (with options.stop) and fills what follows; without it [MASK] does. `first_row` numbers the
    rows of a part. Once `stopped` is true, the rows that have not ended are cut before the block that they are in.
    """
    size = plan.block
    total = plan.length if plan.whole else -(-plan.length // size) * size
    state = _blank(num, total, mask_id, prompt, denoiser.device)
    draws = UniformDraws(seed, first_row, num, denoiser.device)
    # EOS ends a text only after all given tokens.
    position_ids = torch.arange(total, device=denoiser.device)
    given = (position_ids + 1).where(state.tokens != mask_id, 0).max(1).values  # [N]
    alive = torch.arange(num, device=denoiser.device)  # rows that have not ended
    denoiser.restart()
    origin = position = 0  # where the window begins, and where its next tokens stand
    while position < total and len(alive):
        if position + size - origin > plan.window:
            origin = position - plan.overlap
            denoiser.restart()
        begin = origin if plan.whole else position
        end = min(begin + size, total)
        masked = (state.tokens[alive, begin:end] == mask_id).cpu()
        if bool(masked.any()):
            cached = origin + len(denoiser)
            if cached < begin:
                denoiser.extend(state.tokens[alive, cached:begin])
                state.cache_forwards[alive] += denoiser.cache_forwards
            uniform = draws.between(begin, end)[alive]  # [A, S, 2]
            policy = make_policy(options, uniform[..., TIME].cpu(), denoiser.vocab_size)
            block = _Block(alive, begin, end, masked, policy, uniform[..., TOKEN])
            if not _denoise(denoiser, state, block, mask_id, options, timed, progress, stopped):
                _cut(state, alive, torch.full_like(alive, position), ENDED.index("interrupted"), eos_id, mask_id)
                break
        position = end
        if options.stop:
            goes_on = _end_rows(state, alive, begin, end, given, options, eos_id, mask_id)
            if not bool(goes_on.all()):
                alive = alive[goes_on]
                denoiser.select(goes_on.nonzero()[:, 0])
    cut = slice(0, plan.length)
    return Samples(
        state.tokens[:, cut],
        state.lengths.clamp(max=plan.length),
        state.ended.where(state.lengths <= plan.length, 0),
        state.nfe,
        state.cache_forwards,
        state.order[:, cut],
        state.probability[:, cut],
    )


def denoiser_of(model: DiT, block_size: int) -> CachedDenoiser:
    """The network with a KV cache, as `sample` takes it."""
    return CausalDenoiser(model) if model.network.causal else CachedDenoiser(model, block_size)


class UniformDraws:
    """Uniform numbers for the positions of N rows, drawn when the window reaches them.

    A longer text begins with the numbers of a shorter one.
    """

    def __init__(self, seed: int, first_row: int, rows: int, device: torch.device):
        self._generators = [generator(seed, Purpose.SAMPLING, first_row + row) for row in range(rows)]
        self._start = 0
        self._kept = torch.empty((rows, 0, 2), dtype=torch.float64, device=device)  # of the positions from _start on

    def between(self, begin: int, end: int) -> Tensor:
        """Those of the positions [begin, end), [N, end - begin, 2] fp64; `begin` never goes back."""
        known = self._start + self._kept.shape[1]
        if end > known:
            count = max(end - known, AHEAD)
            fresh = torch.from_numpy(np.stack([rng.random((count, 2)) for rng in self._generators]))
            self._kept = torch.cat([self._kept, fresh.to(self._kept.device)], dim=1)[:, begin - self._start :]
            self._start = begin
        return self._kept[:, begin - self._start : end - self._start]


def _blank(num: int, total: int, mask_id: int, prompt: Tensor, device: torch.device) -> Samples:
    """The prompt, then masks; all else is filled in while sampling."""
    tokens = torch.full((num, total), mask_id, device=device)
    tokens[:, : prompt.shape[-1]] = prompt
    lengths = torch.full((num,), total, device=device)
    ended, nfe, cache_forwards = (torch.zeros_like(lengths) for _ in range(3))
    order = torch.zeros((num, total), dtype=torch.long, device=device)
    unknown = torch.full((num, total), torch.nan, dtype=torch.float64, device=device)
    return Samples(tokens, lengths, ended, nfe, cache_forwards, order, unknown)


@dataclass(frozen=True)
class _Block:
    """The part [begin, end) of the rows `alive` [A], on the device. On the host: which positions are `masked` [A, S],
    and the unmasking policy. uniform [A, S]: the numbers that tokens are sampled by.

    Masks are kept on the host, where the counts that depend on them are known without waiting for a GPU.
    """

    alive: Tensor
    begin: int
    end: int
    masked: Tensor
    policy: UnmaskingPolicy
    uniform: Tensor


def _denoise(
    denoiser: SamplingDenoiser,
    state: Samples,
    part: _Block,
    mask_id: int,
    options: Options,
    timed: bool,
    progress: TokenProgress | None,
    stopped: ShouldStop | None = None,
) -> bool:
    """Unmask the block. Policies that need predictions wait for the device once per evaluation, others never.

    False, with nothing written, where it was `stopped` before the end.
    """
    alive, begin, end, policy, device = part.alive, part.begin, part.end, part.policy, denoiser.device
    block, probability = state.tokens[alive, begin:end], state.probability[alive, begin:end]  # [A, S]
    uniform = part.uniform.flatten()
    masked = part.masked.clone()
    order, nfe = torch.zeros(masked.shape, dtype=torch.long), torch.zeros(len(masked), dtype=torch.long)
    needs_predictions = policy.needs_predictions
    while bool(masked.any()):
        if stopped is not None and stopped():
            return False
        candidates, t = policy.candidates(masked)
        at = candidates.flatten().nonzero()[:, 0]  # [M]
        at_device = send(at, device)
        u = uniform[at_device]
        seen = None
        if options.repetition_penalty > 1:
            recent = torch.cat([state.tokens[alive, max(0, begin - WINDOW) : begin], block], dim=1)
            seen = recent[at_device // (end - begin)]  # [M, R]

        def read(logits: Tensor, first: int, u: Tensor = u, seen: Tensor | None = seen) -> SampledTokens:
            rows = slice(first, first + len(logits))
            return draw(logits, u[rows], mask_id, options, None if seen is None else seen[rows], needs_predictions)

        drawn = denoiser.predict(block, at, send(sigma_of(t), device) if timed else None, read)
        nfe += candidates.any(1)
        revealed = policy.reveal(candidates, _predictions(candidates, drawn)) if needs_predictions else candidates
        now = revealed.flatten()[at].nonzero()[:, 0]
        written, chosen = send(at[now], device), send(now, device)
        block.view(-1)[written], probability.view(-1)[written] = drawn.tokens[chosen], drawn.probability[chosen]
        order[revealed] = nfe[:, None].expand_as(order)[revealed]
        masked &= ~revealed
        if progress:
            progress(int(revealed.sum()))
    state.tokens[alive, begin:end], state.probability[alive, begin:end] = block, probability
    before, order = state.nfe[alive], send(order, device)
    state.order[alive, begin:end] = torch.where(order > 0, order + before[:, None], state.order[alive, begin:end])
    state.nfe[alive] = before + send(nfe, device)
    return True


def _predictions(candidates: Tensor, drawn: SampledTokens) -> Predictions:
    """The predictions at the candidates, scattered to [A, S] on the host, which waits for the device."""
    blank = torch.zeros(candidates.shape, dtype=torch.float64)
    values = torch.stack([drawn.confidence, drawn.entropy, drawn.log_mass]).cpu()
    return Predictions(*(blank.masked_scatter(candidates, part) for part in values))


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
    """Which of the rows `alive` go on after the block [begin, end), boolean [A]; the others are cut and filled up."""
    first = max(0, min(begin, end - WINDOW))  # what lies before was checked when it was written
    length, why = find_ends(state.tokens[alive, first:end], given[alive] - first, options.stop, eos_id)  # [A], [A]
    over = why > 0
    _cut(state, alive[over], length[over] + first, why[over], eos_id, mask_id)
    return ~over


def _cut(state: Samples, rows: Tensor, lengths: Tensor, why: Tensor | int, eos_id: int | None, mask_id: int) -> None:
    """End these rows [R] after `lengths` [R] tokens, and fill up the rest."""
    state.lengths[rows], state.ended[rows] = lengths, why
    first = int(lengths.min()) if len(rows) else 0
    after = torch.arange(first, state.tokens.shape[1], device=rows.device) >= lengths[:, None]  # [R, T - first]
    for tensor, filler in (
        (state.tokens, mask_id if eos_id is None else eos_id),
        (state.order, 0),
        (state.probability, torch.nan),
    ):
        tensor[rows, first:] = tensor[rows, first:].masked_fill(after, filler)
