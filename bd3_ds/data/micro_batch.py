"""MicroBatch, and the collation of samples into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3_ds.data.documents import document_numbers, read_starts
from bd3_ds.runtime.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """tokens [m, L] int64 and their slots [m] in the global batch; `waited` is seconds spent getting it.

    `documents` [m, L] int64 numbers each place's document in its sequence, -1 where there is no text; None where
    nothing is padding and data.document_mask is false. `ids` [m] number the samples, those of data.train first.
    """

    tokens: Tensor
    slots: np.ndarray
    waited: float
    documents: Tensor | None = None
    ids: Sequence[int] = ()


def failure_or(collate: Any, samples: list[Any]) -> Any:
    """The first failure among samples, or `collate` of them."""
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or collate(samples)


def stack_tokens(samples: list[dict[str, Any]]) -> tuple[Tensor, None, list[int]]:
    """Token rows of samples as one int64 tensor [m, L], and their numbers; streaming's arrays are read-only: copied."""
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    return tokens, None, [int(sample["id"]) for sample in samples]


def stack_with_documents(samples: list[dict[str, Any]], apart: bool = True) -> tuple[Tensor, Tensor, list[int]]:
    """Token rows of samples and each place's document (`document_numbers`), both int64 [m, L], and their numbers."""
    tokens, _, ids = stack_tokens(samples)
    starts, pads = ([read_starts(sample[column]) for sample in samples] for column in ("doc_starts", "pad_starts"))
    documents = torch.from_numpy(document_numbers(list(starts), list(pads), tokens.shape[1], apart))
    return tokens, documents, ids
