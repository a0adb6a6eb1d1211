"""Judges: causal models with their tokenizers that score texts."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bd3_ds.checkpoint.export import Export
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.data.tokenizer import load_tokenizer
from bd3_ds.diffusion.subs import subs_nll
from bd3_ds.evaluation.network import load_model
from bd3_ds.runtime.errors import UserError


class Judge(ABC):
    """name: as the user gave it. context: the most tokens that it reads at once, None where it knows no limit.

    first: the id that stands before every text (BOS), which is given and not scored; None where nothing does.
    end: the id (EOS) that is not scored where it is a target; None where there is none.
    """

    name: str
    context: int | None
    first: int | None
    end: int | None
    device: torch.device

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """The judge's own token ids of each text, without `first`."""

    @abstractmethod
    def nats(self, tokens: Tensor) -> Tensor:
        """-log p [B, T - 1] of tokens 1 … T - 1 of tokens [B, T], each given those before it."""

    @abstractmethod
    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden states [B, T, D] of tokens [B, T], after the last norm."""


class ExportJudge(Judge):
    """One of our own autoregressive exports; it reads BOS first. Raises UserError for an export that cannot judge."""

    def __init__(self, name: str, export: Export, device: torch.device):
        objective = export.run.objective.name
        if not OBJECTIVES[objective].causal:
            raise UserError(
                f"--judge {name} is a model of objective.name={objective}; a judge must be causal: give an export of "
                "objective.name=ar or a Hugging Face causal model"
            )
        if export.tokenizer is None:
            raise UserError(f"--judge {name} has no tokenizer and reads no texts; convert it with --tokenizer")
        assert export.run.model.mask_id is not None
        self.name = name
        self.context = export.run.data.length
        self.device = device
        self._mask_id = export.run.model.mask_id
        self._tokenizer = load_tokenizer(str(export.tokenizer))
        self.first, self.end = self._tokenizer.bos_id, self._tokenizer.eos_id
        self._network = load_model(export, device)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts)

    @torch.no_grad()
    def nats(self, tokens: Tensor) -> Tensor:
        logits = self._network(tokens, block_size=1)[:, :-1]  # [B, T - 1, V]
        targets = tokens[:, 1:]
        return subs_nll(logits.flatten(0, 1), targets.flatten(), self._mask_id).view(targets.shape)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self._network(tokens, block_size=1, read=lambda x, _weight, _bias: x)
        return hidden
