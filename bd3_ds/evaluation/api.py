"""The Python API: load a trained model, its logits, scores and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_ds.checkpoint.export import Export
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.data.tokenizer import load_tokenizer
from bd3_ds.data.tokenizer_base import Tokenizer
from bd3_ds.evaluation.arguments import (
    Ids,
    Prompt,
    are_texts,
    check_rows,
    make_options,
    noise_levels,
    number_and_prompt,
    token_ids,
    usable_device,
)
from bd3_ds.evaluation.exports import open_export
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.options import PRECISIONS
from bd3_ds.evaluation.score import Score
from bd3_ds.evaluation.text_scores import score_texts
from bd3_ds.evaluation.token_scores import score_tokens
from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.sampling.memory import free_memory, memory_needed, require_memory
from bd3_ds.sampling.options import EOS, Options, WindowPlan, plan_windows
from bd3_ds.sampling.sampler import Samples, ShouldStop, TokenProgress, denoiser_of, sample

ROWS_AT_ONCE = 64  # texts sampled together

__all__ = ["LanguageModel", "Prompt", "Score", "load"]


def load(place: str, device: str | torch.device = "cpu", precision: str = "fp32") -> LanguageModel:
    """Open the export at `place`, the newest export of the run at `place`, or a folder of `convert --to hf`.

    precision: of weights and arithmetic, fp32, or bf16 to draw texts faster; scores want fp32. Raises UserError where
    there is no such model, for a device that is not there and for another precision.
    """
    return LanguageModel(open_export(str(place)), usable_device(device), precision)


class LanguageModel:
    """An export, ready to use: evaluation mode, no gradients. Mistakes in arguments raise UserError.

    run: the configuration it was trained with. block_size: tokens denoised together (1 for AR, L for MDLM and SEDD).
    tokenizer: None where the export has none. mask_id, vocab_size: the latter counts the former.
    """

    def __init__(self, export: Export, device: torch.device, precision: str = "fp32"):
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision} is unknown; {did_you_mean(str(precision), PRECISIONS)}")
        self.export = export
        self.device = device
        self.run: RunConfig = export.run
        self.block_size: int = block_size(export.run)
        self.tokenizer: Tokenizer | None = load_tokenizer(str(export.tokenizer)) if export.tokenizer else None
        self.network = load_model(export, device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        assert export.run.model.mask_id is not None and export.run.model.vocab_size is not None
        self.mask_id: int = export.run.model.mask_id
        self.vocab_size: int = export.run.model.vocab_size
        if self.tokenizer and (self.tokenizer.vocab_size, self.tokenizer.mask_id) != (self.vocab_size, self.mask_id):
            raise UserError(
                f"{export.tokenizer} is not the tokenizer that the model was trained with: it has "
                f"{self.tokenizer.vocab_size} tokens and [MASK] at {self.tokenizer.mask_id}, the model "
                f"{self.vocab_size} and {self.mask_id}; put the right one there"
            )

    # no_grad, not inference_mode: attention masks made here are kept and may serve a training pass of the same process.
    @torch.no_grad()
    def logits(self, x_t: Ids, x0: Ids | None = None, sigma: Tensor | Sequence[float] | None = None) -> Tensor:
        """Raw network output [B, L, V] for noisy tokens x_t [B, L].

        BD3 sees the earlier blocks of the clean tokens x0 [B, L]; the others do not look at x0. AR takes clean tokens
        as x_t, and its logits at i are for token i + 1. Only SEDD takes the noise levels sigma [B].
        """
        objective = OBJECTIVES[self.run.objective.name]
        noisy = self._ids("x_t", x_t)
        clean = None
        if objective.has_blocks and self.block_size < noisy.shape[1]:
            if x0 is None:
                raise UserError(
                    f"x0 is missing: in blocks of {self.block_size}, tokens depend on the clean text before"
                )
            clean = self._ids("x0", x0)
            if clean.shape != noisy.shape:
                raise UserError(f"x0 is {list(clean.shape)}, x_t {list(noisy.shape)}; the two must have one shape")
        if not objective.timed and sigma is not None:
            name = self.run.objective.name
            raise UserError(f"sigma is for SEDD; this model is {name} and does not look at the noise level")
        levels = noise_levels(sigma, len(noisy), self.device) if objective.timed else None
        logits: Tensor = self.network(noisy, clean, block_size=self.block_size, sigma=levels)
        return logits

    @torch.no_grad()
    def score(
        self,
        tokens: Ids | str | Sequence[str],
        estimator: str | None = None,
        views: int = 8,
        seed: int = 0,
        scored: Any = None,
        first_row: int = 0,
    ) -> Score:
        """The bound of a text or several, or of clean tokens [B, L]; the likelihood for AR and block size 1.

        Texts: strings of any length, as `text_scores.score_texts` takes them; `.nats`, `.by_row` (tokens scored) and
        `.ppl` have one number a text. Of tokens, all but position 0 are scored, or some given the others:

        estimator: exact (where no block has more than 8 tokens to score, 16 for few tokens; AR is always exact),
        stratified or mc, both with `views` noisy views a sequence, drawn by (seed, row); the first row has number
        `first_row`. SEDD takes mc only. None: exact where it can be had, else stratified, for SEDD mc; `.estimator`
        tells.

        scored: boolean [B, L], the tokens to score; None: all but position 0, which is never scored. The mask id stands
        for a token that is neither scored nor known: no view shows it. It may stand in a row's last scored block and
        after it, and a last block that is not whole is filled with it. A block's bound is that of writing its scored
        tokens before its unknown ones, beside its given ones (`diffusion/likelihood.py`).
        """
        if isinstance(tokens, str) or are_texts(tokens):
            if scored is not None or first_row:
                raise UserError("scored and first_row are for token ids; give the tokens of these texts instead")
            return score_texts(self, [tokens] if isinstance(tokens, str) else tokens, estimator, views, seed)
        return score_tokens(self, self._ids("tokens", tokens), scored, estimator, views, seed, first_row)

    def generate(
        self,
        start: int | Prompt = None,
        /,
        length: int | None = None,
        prompt: Prompt = None,
        seed: int = 0,
        **how: Any,
    ) -> list[str]:
        """Texts, the prompt included, each cut where it first ends (EOS); arguments as for `sample`.

        generate("Returns", num=2), generate(["Returns", "Raises"]), generate(num=4, length=256, prompt=None, seed=0)
        """
        self.require_tokenizer()
        how.setdefault("stop", (EOS,))
        return self.decode(self.sample(start, length, prompt, seed, **how))

    @torch.no_grad()
    def sample(
        self,
        start: int | Prompt = None,
        /,
        length: int | None = None,
        prompt: Prompt = None,
        seed: int = 0,
        progress: TokenProgress | None = None,
        batch: int = ROWS_AT_ONCE,
        stopped: ShouldStop | None = None,
        num: int | None = None,
        **how: Any,
    ) -> Samples:
        """`num` token rows of `length` (default L; beyond L the window slides), with their counts.

        The first word is `num`, or the prompt. num: default 4, or one for each text of a list of prompts.

        prompt: a text, a list of `num` texts, or ids [P] or [num, P] from position 0 (BOS) on, in which the mask id
        stands for a token to write; given tokens stay as they are. `how` are fields of `sampling.options.Options`:
        temperature (0 takes the most likely token), nucleus (the smallest set of tokens that reaches this probability),
        and further ones such as steps=64, threshold=0.9, top_k=50, stop=("eos", "entropy"). Rows are drawn `batch` at a
        time; row r depends on (seed, r), not on `num` or `batch`. `progress` is called with how many tokens were just
        written. Once `stopped()` is true, no more is drawn: rows that were not begun are missing, those that
        had not ended are cut ("interrupted"). Texts that the machine's memory cannot hold are refused.
        """
        num, prompt = number_and_prompt(start, num, prompt)
        options = make_options(how)
        length = self.run.data.length if length is None else length
        plan, given = self.check_sample(num, length, prompt, seed, batch, options)
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        require_memory(
            lambda tokens: self.memory_to_sample(num, tokens, batch, plan.window),
            free_memory(self.device),
            num,
            length,
        )
        denoiser = denoiser_of(self.network, plan.block)
        parts: list[Samples] = []
        for first in range(0, num, batch):
            if parts and stopped is not None and stopped():
                break
            parts.append(
                sample(
                    denoiser,
                    plan,
                    given.expand(num, -1)[first : first + batch],
                    num=min(batch, num - first),
                    mask_id=self.mask_id,
                    options=options,
                    eos_id=eos_id,
                    timed=OBJECTIVES[self.run.objective.name].timed,
                    seed=seed,
                    first_row=first,
                    progress=progress,
                    stopped=stopped,
                )
            )
        return Samples.joined(parts)

    def check_sample(
        self, num: int, length: int, prompt: Prompt, seed: int, batch: int, options: Options
    ) -> tuple[WindowPlan, Tensor]:
        """The windows of `sample`, and the given ids [1 or num, P]; raises UserError for what does not go together."""
        options.check(self.run.objective.name)
        plan = self._window_plan(length, options)
        check_rows(num, batch, seed)
        given = self.prompt_ids(prompt, plan.window)
        if len(given) not in (1, num):
            raise UserError(f"prompt has {len(given)} rows for num={num} texts; give one row, or one a text")
        if given.shape[1] > length:
            raise UserError(f"prompt takes {given.shape[1]} tokens, BOS included, but length={length}; shorten it")
        if EOS in options.stop and (self.tokenizer is None or self.tokenizer.eos_id is None):
            raise UserError(f"stop=eos needs a tokenizer, and {self.export.path} has none; convert it with --tokenizer")
        return plan, given

    def memory_to_sample(
        self, num: int, length: int, batch: int = ROWS_AT_ONCE, window: int | None = None, as_json: bool = False
    ) -> int:
        """Bytes that `sample` takes beside the model; `as_json`: and the record of `run.py sample --json`."""
        window = self.run.data.length if window is None else window
        width = next(self.network.parameters()).element_size()
        return memory_needed(self.network.network, num, length, batch, window, width, as_json)

    def decode(self, samples: Samples) -> list[str]:
        """The texts of token rows, each up to its end; special tokens are left out."""
        tokenizer = self.require_tokenizer()
        rows = zip(samples.tokens.tolist(), samples.lengths.tolist(), strict=True)
        return [tokenizer.decode(row[:length]) for row, length in rows]

    def prompt_ids(self, prompt: Prompt = None, longest: int | None = None) -> Tensor:
        """Given ids [1 or num, P] of a prompt as `sample` takes it; only BOS for None.

        Texts of unequal length are filled up with the mask id. `longest`: tokens that the network sees at once (None:
        L); a longer prompt is refused.
        """
        if prompt is None or isinstance(prompt, str) or are_texts(prompt):
            tokenizer = self.require_tokenizer("; or give prompt=[id, …] from the first token on")
            texts = list(prompt) if prompt is not None and not isinstance(prompt, str) else [prompt or ""]
            rows = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(texts)]
            for text, row in zip(texts, rows, strict=True):
                if tokenizer.unk_id is not None and tokenizer.unk_id in row:
                    raise UserError(f"prompt {text!r} has a character that the tokenizer of {self.export.path} lacks")
            most = max(map(len, rows))
            prompt = [row + [self.mask_id] * (most - len(row)) for row in rows]
        ids = token_ids("prompt", prompt, self.vocab_size, None, self.device, one_row=True)
        longest = self.run.data.length if longest is None else longest
        if ids.shape[1] > longest:
            raise UserError(
                f"prompt takes {ids.shape[1]} tokens, BOS included; the model sees {longest} at once (data.length, or "
                "window), so shorten it"
            )
        if bool((ids[:, 0] == self.mask_id).any()):
            raise UserError("prompt begins with the mask id; position 0 is given, usually BOS")
        return ids

    def _window_plan(self, length: int, options: Options) -> WindowPlan:
        positions = self.run.model.max_positions if self.run.model.positions == "learned" else None
        return plan_windows(length, self.block_size, self.run.data.length, options, positions)

    def _ids(self, name: str, value: Any, one_row: bool = False) -> Tensor:
        return token_ids(name, value, self.vocab_size, self.run.data.length, self.device, one_row)

    def require_tokenizer(self, otherwise: str = "") -> Tokenizer:
        """The tokenizer; raises UserError where there is none, with what would do `otherwise`."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.export.path} has no tokenizer and knows no texts; convert it with --tokenizer{otherwise}"
            )
        return self.tokenizer
