"""A trained model in a few lines of Python: logits, scores, texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd3_ds.checkpoint.export import Export, find_export
from bd3_ds.config.check import estimator_used
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, RunConfig, block_size
from bd3_ds.data.tokenizer import Tokenizer, load_tokenizer
from bd3_ds.evaluation.arguments import Ids, check_sampling, check_seed, noise_levels, token_ids, usable_device
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import bound_of
from bd3_ds.runtime.errors import UserError
from bd3_ds.sampling.sampler import Progress, Samples, sample_autoregressive, sample_blocks
from bd3_ds.sampling.stopping import truncate_at_eos

TOKENS_AT_ONCE = 2**16  # noisy tokens that one pass of `score` may take in,
VIEWS_AT_ONCE = 256  # and noisy sequences
ROWS_AT_ONCE = 64  # texts sampled together


@dataclass(frozen=True)
class Score:
    """The one bound, in nats.

    nelbo [B, L] fp64 by token: position 0 is given and 0; a block's bound is spread over its tokens, so only sums over
    whole blocks have meaning. stderr [B]: what the estimator adds to each row's sum, 0 when exact. forwards: passes of
    the network over a sequence. tokens: scored ones, all but each row's first.
    """

    nelbo: Tensor
    stderr: Tensor
    forwards: int
    tokens: int


def load(place: str, device: str | torch.device = "cpu") -> LanguageModel:
    """Open the export at `place`, or the newest export of the run at `place`; raises UserError where there is none."""
    return LanguageModel(find_export(str(place)), usable_device(device))


class LanguageModel:
    """An export, ready to use: fp32, evaluation mode, no gradients. Mistakes in arguments raise UserError.

    run: the configuration it was trained with. block_size: tokens denoised together (1 for AR, L for MDLM and SEDD).
    tokenizer: None where the export has none. mask_id, vocab_size: the latter counts the former.
    """

    def __init__(self, export: Export, device: torch.device):
        self.export = export
        self.device = device
        self.run: RunConfig = export.run
        self.block_size: int = block_size(export.run)
        self.tokenizer: Tokenizer | None = load_tokenizer(str(export.tokenizer)) if export.tokenizer else None
        self.network = load_model(export, device)
        assert export.run.model.mask_id is not None and export.run.model.vocab_size is not None
        self.mask_id: int = export.run.model.mask_id
        self.vocab_size: int = export.run.model.vocab_size

    # no_grad, not inference_mode: attention masks made here are kept and may serve a training pass of the same process.
    @torch.no_grad()
    def logits(self, x_t: Ids, x0: Ids | None = None, sigma: Tensor | Sequence[float] | None = None) -> Tensor:
        """Raw network output [B, L, V] for noisy tokens x_t [B, L].

        BD3 sees the earlier blocks of the clean tokens x0 [B, L]; the others do not look at x0. AR takes clean tokens
        as x_t, and its logits at i are for token i + 1. SEDD, and it alone, takes the noise levels sigma [B].
        """
        objective = self.run.objective.name
        noisy = self._ids("x_t", x_t)
        clean = None
        if objective == BD3 and self.block_size < noisy.shape[1]:
            if x0 is None:
                raise UserError(
                    f"x0 is missing: in blocks of {self.block_size}, tokens depend on the clean text before"
                )
            clean = self._ids("x0", x0)
            if clean.shape != noisy.shape:
                raise UserError(f"x0 is {list(clean.shape)}, x_t {list(noisy.shape)}; the two must have one shape")
        if objective != SEDD and sigma is not None:
            raise UserError(f"sigma is for SEDD; this model is {objective} and does not look at the noise level")
        levels = noise_levels(sigma, len(noisy), self.device) if objective == SEDD else None
        logits: Tensor = self.network(noisy, clean, block_size=self.block_size, sigma=levels)
        return logits

    @torch.no_grad()
    def score(self, tokens: Ids, estimator: str | None = None, views: int = 8, seed: int = 0) -> Score:
        """The bound of clean tokens [B, L]; the likelihood itself for AR and for block size 1.

        estimator: exact (block sizes up to 8, up to 16 for few tokens; AR is always exact), stratified or mc, both with
        `views` noisy views a sequence, drawn by (seed, row). SEDD takes mc alone. None: exact, for SEDD mc. BD3 takes
        whole blocks.
        """
        x0 = self._ids("tokens", tokens)
        length = x0.shape[1]
        if length < 2:
            raise UserError("tokens of length 1 have nothing to score: position 0 is given")
        if self.run.objective.name == BD3 and length % self.block_size:
            raise UserError(f"tokens of length {length} are not whole blocks of {self.block_size}; cut or extend them")
        if bool((x0 == self.mask_id).any()):
            raise UserError(f"tokens hold the mask id {self.mask_id}; only clean text has a score")
        if views < 1:
            raise UserError(f"views={views} must be at least 1")
        check_seed(seed)
        run = self._run_at(length)
        asked = estimator or ("mc" if run.objective.name == SEDD else "exact")
        used = estimator_used(run, asked, "estimator", x0.shape[0] * (length - 1))
        if used == "report":
            raise UserError("estimator=report is no bound; `run.py evaluate --estimator report` prints it beside one")
        at_once = max(1, min(VIEWS_AT_ONCE, TOKENS_AT_ONCE // length))
        rows = max(1, at_once // (1 if used == "exact" else views))
        bounds = [
            bound_of(self.network, run, part, used, views=views, seed=seed, first_sequence=i * rows, at_once=at_once)
            for i, part in enumerate(x0.split(rows))
        ]
        return Score(
            torch.cat([bound.nelbo.double() for bound in bounds]),
            torch.cat([bound.stderr.double() for bound in bounds]),
            sum(bound.forwards for bound in bounds),
            sum(bound.tokens for bound in bounds),
        )

    def generate(
        self,
        num: int = 4,
        length: int | None = None,
        prompt: str | Ids | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        nucleus: float | None = None,
    ) -> list[str]:
        """`num` texts, the prompt included, each cut where it first ends (EOS); arguments as for `sample`."""
        self._require_tokenizer()
        tokens = self.sample(num, length, prompt, seed, temperature, nucleus).tokens
        return self.decode(tokens, given=self.prompt_ids(prompt).shape[1])

    @torch.no_grad()
    def sample(
        self,
        num: int = 4,
        length: int | None = None,
        prompt: str | Ids | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        nucleus: float | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """`num` token rows of `length` (default L, at most L), with their counts.

        prompt: a text, or ids [P] or [num, P] from position 0 (BOS) on, in which the mask id stands for a token to
        write; given tokens stay as they are. temperature 0 takes the most likely token; `nucleus` keeps the smallest
        set of tokens that reaches this probability. Row r depends on (seed, r), not on `num`. `progress` is told how
        many tokens have just been written.
        """
        length = self.run.data.length if length is None else length
        check_sampling(num, length, self.run.data.length, seed, temperature, nucleus)
        given = self.prompt_ids(prompt)
        if len(given) not in (1, num):
            raise UserError(f"prompt has {len(given)} rows for num={num} texts; give one row, or one a text")
        if given.shape[1] > length:
            raise UserError(f"prompt takes {given.shape[1]} tokens, BOS included, but length={length}; shorten it")
        parts = []
        for first in range(0, num, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, num - first)
            common: dict[str, Any] = {
                "num": rows,
                "length": length,
                "mask_id": self.mask_id,
                "prompt": given.expand(num, -1)[first : first + rows],
                "seed": seed,
                "temperature": temperature,
                "nucleus": nucleus,
                "first_row": first,
                "progress": progress,
            }
            if self.run.objective.name == AR:
                parts.append(sample_autoregressive(self.network, **common))
            else:
                size = block_size(self._run_at(length))
                by_sigma = self.run.objective.name == SEDD
                parts.append(sample_blocks(self.network, block_size=size, sigma_from_rate=by_sigma, **common))
        return Samples(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.nfe for part in parts]),
            max(part.cache_forwards for part in parts),
        )

    def decode(self, tokens: Tensor, given: int = 1) -> list[str]:
        """Token rows [N, T] as texts, each up to its first EOS behind the `given` leading tokens."""
        tokenizer = self._require_tokenizer()
        return [tokenizer.decode(truncate_at_eos(row, tokenizer.eos_id, given).tolist()) for row in tokens]

    def prompt_ids(self, prompt: str | Ids | None) -> Tensor:
        """Given ids [1 or num, P] of a prompt as `sample` takes it; BOS alone for None."""
        if prompt is None or isinstance(prompt, str):
            tokenizer = self._require_tokenizer("; or give prompt=[id, …] from the first token on")
            prompt = [tokenizer.bos_id, *(tokenizer.encode_batch([prompt])[0] if prompt else [])]
        ids = self._ids("prompt", prompt, one_row=True)
        if bool((ids[:, 0] == self.mask_id).any()):
            raise UserError("prompt begins with the mask id; position 0 is given, usually BOS")
        return ids

    def _ids(self, name: str, value: Any, one_row: bool = False) -> Tensor:
        return token_ids(name, value, self.vocab_size, self.run.data.length, self.device, one_row)

    def _run_at(self, length: int) -> RunConfig:
        """The run as if its sequences were `length` long: MDLM and SEDD take a shorter text as one shorter block."""
        if self.run.objective.name not in (MDLM, SEDD):
            return self.run
        return dataclasses.replace(self.run, data=dataclasses.replace(self.run.data, length=length))

    def _require_tokenizer(self, otherwise: str = "") -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self.export.path} has no tokenizer and knows no texts; convert it with --tokenizer{otherwise}"
            )
        return self.tokenizer
