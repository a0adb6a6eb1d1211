"""The interface of all tokenizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path


class Tokenizer(ABC):
    """Text <-> token ids in [0, vocab_size).

    `vocab_size` counts the mask id, which is the tokenizer's own mask token or one new id after its last; it never
    equals `bos_id`, `eos_id` or `pad_id`. `pad_id` is the tokenizer's own padding, else its EOS. `fingerprint`
    (SHA-256, hex) is equal for equal vocabularies and rules, wherever they lie.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int
    unk_id: int | None = None  # what stands for text that the vocabulary cannot write; None where it can write all
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """One list of ids a text; no special token is added, and none can come out of a text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; mask, BOS, EOS and PAD ids are left out."""

    def piece(self, token: int) -> str:
        """One token as it stands in a text, its spaces kept; special tokens by a name."""
        # One id may play several parts; the last name holds.
        names = {self.pad_id: "[PAD]", self.bos_id: "[BOS]", self.eos_id: "[EOS]", self.mask_id: "[MASK]"}
        return names.get(token) or self._piece(token)

    def _piece(self, token: int) -> str:
        return self.decode([token])

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write files from which `load_tokenizer(str(directory))` makes an equal tokenizer."""

    def _text_ids(self, ids: Iterable[int]) -> list[int]:
        special = {self.mask_id, self.bos_id, self.eos_id, self.pad_id}
        return [token for token in map(int, ids) if token not in special]
