"""A character tokenizer for a small alphabet, as for text8."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bd3_ds.data.tokenizer_base import Tokenizer
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json, write_json

CHARACTERS_FILE = "characters.json"
TEXT8 = "abcdefghijklmnopqrstuvwxyz "


class CharacterTokenizer(Tokenizer):
    """Character i of `alphabet` is id i; then come EOS, which is BOS and PAD as well, and [MASK]."""

    def __init__(self, alphabet: str = TEXT8):
        self.alphabet = alphabet
        self.bos_id = self.eos_id = self.pad_id = len(alphabet)
        self.mask_id = len(alphabet) + 1
        self.vocab_size = len(alphabet) + 2
        self.fingerprint = hashlib.sha256(json.dumps({"characters": alphabet}).encode()).hexdigest()
        self._codes = _codes(alphabet)
        self._ids = np.full(int(self._codes.max()) + 2, -1, np.int64)  # by code; the last stands for all above
        self._ids[self._codes] = np.arange(len(alphabet))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer`; raises UserError for a character that is not in the alphabet."""
        return [self._encode(text).tolist() for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_codes(text), len(self._ids) - 1)]
        if ids.min(initial=0) < 0:
            place = int(np.argmin(ids))
            raise UserError(
                f"the character tokenizer has no {text[place]!r} (place {place} of a text), only '{self.alphabet}'; "
                "replace such characters, or take another tokenizer"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i] for i in self._text_ids(ids))

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / CHARACTERS_FILE, {"characters": self.alphabet})

    @classmethod
    def load(cls, directory: Path) -> CharacterTokenizer:
        """What `save` wrote; raises UserError where it is not an alphabet."""
        path = directory / CHARACTERS_FILE
        value = read_json(path, "character tokenizer")
        alphabet = value.get("characters") if isinstance(value, dict) else None
        if not isinstance(alphabet, str) or not alphabet or len(set(alphabet)) < len(alphabet):
            raise UserError(
                f'{path} is not a character tokenizer; it must hold {{"characters": "…"}} with each character once'
            )
        return cls(alphabet)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
