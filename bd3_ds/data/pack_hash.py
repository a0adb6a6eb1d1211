"""The hashes of a pack: of its tokens only, and of tokens with length, frame and padding."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NO_PADDING = "none"


def hash_of_pack(content: str, length: int, frame: str, padding: str) -> str:
    """The identity of a protocol: the hash of the tokens, how they are cut and framed, and a hash of padding."""
    facts = {"content": content, "length": length, "frame": frame, "padding": padding}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class PackHash:
    """SHA-256 over chunks of tokens, and one over the places of padding in them, independent of how they are stored."""

    def __init__(self) -> None:
        self._content, self._padding = hashlib.sha256(), hashlib.sha256()
        self._chunks, self._padded = 0, False

    def add(self, tokens: np.ndarray, padded: np.ndarray | None = None) -> None:
        """Append chunks; tokens [N, L], and bool [N, L] of which places are padding, None where none is."""
        import numpy as np

        self._content.update(tokens.astype("<u4").tobytes())
        if padded is not None:
            for row in np.flatnonzero(padded.any(axis=1)):
                number = int(self._chunks + row).to_bytes(8, "little")
                self._padding.update(number + np.packbits(padded[row]).tobytes())
                self._padded = True
        self._chunks += len(tokens)

    def content(self) -> str:
        """The hash of all tokens so far: `Manifest.content_hash`."""
        return self._content.hexdigest()

    def pack(self, length: int, frame: str) -> str:
        """The hash of the protocol: `Manifest.pack_hash`."""
        padding = self._padding.hexdigest() if self._padded else NO_PADDING
        return hash_of_pack(self.content(), length, frame, padding)
