"""The vocabulary that a plan takes where no pack is there to say it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bd3_ds.config.schema import RunConfig
from bd3_ds.data.manifest import Manifest


@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens, [MASK] with id `mask_id` among them; `origin` says in words where they come from."""

    origin: str
    size: int
    mask_id: int


GPT2 = Vocabulary("GPT-2's 50,257 tokens and [MASK]", 50_258, 50_257)

# What the commands in configs/data/*.yaml tokenize with, by a pattern of data.train.
KNOWN = (
    (r"(^|/)runs/docs/", Vocabulary("1,024 tokens of ./run.sh's tokenizer and [MASK]", 1_025, 1_024)),
    (r"(^|[/_-])lm1b([/_-]|$)", Vocabulary("the 30,522 tokens of bert-base-uncased", 30_522, 103)),
    (r"(^|[/_-])openwebtext([/_-]|$)", GPT2),
)


def assumed_vocabulary(run: RunConfig, other: Manifest | None) -> Vocabulary:
    """Without the pack of data.train: the recipe's own, that of an `other` pack of the run, else the data set's.

    The last resort is GPT-2's; model.vocab_size in the recipe overrides every assumption.
    """
    size, mask_id = run.model.vocab_size, run.model.mask_id
    if size is not None:
        return Vocabulary(f"model.vocab_size={size}", size, size - 1 if mask_id is None else mask_id)
    if other is not None:
        facts = other.tokenizer
        return Vocabulary(
            f"the {facts.vocab_size:,} tokens of the pack '{other.name}'", facts.vocab_size, facts.mask_id
        )
    for pattern, known in KNOWN:
        if re.search(pattern, run.data.train):
            return known
    return Vocabulary(f"{GPT2.origin} (a guess; model.vocab_size=… says it)", GPT2.size, GPT2.mask_id)
