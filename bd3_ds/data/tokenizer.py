"""Tokenizers behind one interface: characters, sentencepiece models and Hugging Face tokenizers.

Hugging Face files are read with only the library `tokenizers`: it loads in a tenth of a second and runs no remote
code. Special tokens written out in a text ("[MASK]", "<|endoftext|>") are encoded as ordinary text, so that no document
can forge a mask or an end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bd3_ds.data.added_tokens import ADDED_FILE, add_tokens, read_added_tokens, require_none_added
from bd3_ds.data.tokenizer_base import Tokenizer
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json, sha256, write_json

CHARACTERS = "characters"  # the name of the tokenizer for text8
SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
HF_CONFIGS = ("config.json", "special_tokens_map.json", "tokenizer_config.json")  # the later wins

# What a tokenizer uses when its files do not say.
BOS_TOKENS = ("<s>", "[CLS]", "<|begin_of_text|>", "<|endoftext|>")
EOS_TOKENS = ("</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>")
MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>")
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
_PROBE = "Hello world, it's 12:30!\n\tThe  naïve “test” isn't over — 数字 ½ [MASK] </s>\n"


class SentencepieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file. Without a BOS piece the EOS serves as both."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"tokenizer {path} is not a sentencepiece model") from None
        self._path = path
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence piece; train it with one (eos_id >= 0)")
        bos = self._model.bos_id()
        self.bos_id = bos if bos >= 0 else self.eos_id
        pad = self._model.pad_id()
        self.pad_id = pad if pad >= 0 else self.eos_id
        self.unk_id = self._model.unk_id()
        size = self._model.vocab_size()
        ids = {token: self._model.piece_to_id(token) for token in MASK_TOKENS}
        masks = [i for token, i in ids.items() if self._model.id_to_piece(i) == token and self._model.is_control(i)]
        own = [i for i in masks if i not in (self.bos_id, self.eos_id, self.pad_id)]
        self.mask_id = own[0] if own else size
        self.vocab_size = size if own else size + 1
        self.fingerprint = sha256(path)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(self._text_ids(ids))

    def pieces(self) -> dict[int, str]:
        """The pieces of the model by their ids."""
        return {i: self._model.id_to_piece(i) for i in range(self._model.vocab_size())}

    def _piece(self, token: int) -> str:
        return self._model.id_to_piece(token).replace("▁", " ")

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path, directory / SENTENCEPIECE_FILE)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers` with the names of its special tokens.

    `named` maps "bos_token", "eos_token" and "mask_token" to tokens; what it lacks is looked up among the usual names.
    Without a BOS token the EOS serves as both.
    """

    def __init__(self, backend: Any, named: dict[str, str], origin: str):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        eos = self._first(*(named.get(key) for key in ("eos_token", "sep_token")), *EOS_TOKENS)
        if eos is None:
            raise UserError(f'tokenizer {origin} has no end token; name it as "eos_token" in its tokenizer_config.json')
        bos = self._first(*(named.get(key) for key in ("bos_token", "cls_token")), *BOS_TOKENS)
        pad = self._first(named.get("pad_token"), *PAD_TOKENS)
        self.eos_id, self.bos_id = eos, eos if bos is None else bos
        self.pad_id = eos if pad is None else pad
        unknown = self._first(named.get("unk_token"))
        self.unk_id = None if unknown in (eos, bos, pad) else unknown  # GPT-2's is its EOS, and never comes out of text
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        masks = [vocabulary[token] for token in (named.get("mask_token"), *MASK_TOKENS) if token in vocabulary]
        taken = {self.bos_id, self.eos_id, self.pad_id}
        own = [token for token in masks if token not in taken]
        self.mask_id = own[0] if own else size
        self.vocab_size = size if own else size + 1
        self.fingerprint = self._fingerprint()

    def _first(self, *tokens: str | None) -> int | None:
        ids = (self._backend.token_to_id(token) for token in tokens if token)
        return next((found for found in ids if found is not None), None)

    def _fingerprint(self) -> str:
        model = json.loads(self._backend.to_str())["model"]
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
        # The probe stands for what the vocabulary does not show: lower-casing, white space, splitting rules.
        probe = self.encode_batch([_PROBE, " " + _PROBE])
        rules = [vocabulary, merges, probe, self.bos_id, self.eos_id, self.mask_id]
        return hashlib.sha256(json.dumps(rules, ensure_ascii=True).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(self._text_ids(ids), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / HF_FILE))
        roles = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "pad_token": self.pad_id,
            "mask_token": self.mask_id,
        }
        tokens = {role: self._backend.id_to_token(token) for role, token in roles.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {role: t for role, t in tokens.items() if t}
        write_json(directory / "tokenizer_config.json", config)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    `spec` is `characters` (a-z and space, for text8), a sentencepiece `.model` file, a directory (`characters.json`;
    sentencepiece `tokenizer.model`; or Hugging Face `tokenizer.json`, `vocab.json` + `merges.txt`, or `vocab.txt`), or
    a name on the Hugging Face hub such as `gpt2`. Raises UserError where there is no such thing or the hub cannot be
    reached.
    """
    if spec == CHARACTERS:
        from bd3_ds.data.characters import CharacterTokenizer

        return CharacterTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_directory(path)
    if path.is_file():
        if path.suffix == ".model":
            return SentencepieceTokenizer(path)
        raise UserError(f"tokenizer {spec} is neither a sentencepiece .model file nor a directory")
    looks_local = path.is_absolute() or spec.startswith((".", "~")) or path.suffix == ".model" or spec.count("/") > 1
    if looks_local or not spec:
        raise UserError(
            f"tokenizer not found: '{spec}'; give a .model file, a directory, `characters` or a hub name such as gpt2"
        )
    return _load_directory(_download(spec))


def number_tokenizer(symbols: int) -> Tokenizer:
    """A tokenizer of `symbols` words "0" ... "symbols-1" with these ids, for sources that are drawn, not written.

    BOS and EOS are id `symbols`, the mask `symbols + 1`.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    end = "<end of text>"  # its spaces keep it out of reach of any text
    vocabulary = {str(i): i for i in range(symbols)} | {end: symbols}
    backend = Backend(models.WordLevel(vocabulary, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HuggingFaceTokenizer(backend, {"bos_token": end, "eos_token": end}, "numbers")


def _load_directory(directory: Path) -> Tokenizer:
    if (directory / "characters.json").is_file():
        from bd3_ds.data.characters import CharacterTokenizer

        return CharacterTokenizer.load(directory)
    if (directory / HF_FILE).is_file() or not (directory / SENTENCEPIECE_FILE).is_file():
        return _load_hugging_face(directory)
    tokenizer = SentencepieceTokenizer(directory / SENTENCEPIECE_FILE)
    require_none_added(directory, tokenizer.pieces())
    return tokenizer


def _load_hugging_face(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    files = {name: directory / name for name in (HF_FILE, "vocab.json", "merges.txt", "vocab.txt")}
    settings: dict[str, Any] = {}
    for name in HF_CONFIGS:
        if (directory / name).is_file():
            settings |= read_json(directory / name, "tokenizer settings")
    backend: Any
    try:
        if files[HF_FILE].is_file():
            backend = Backend.from_file(str(files[HF_FILE]))
        elif files["vocab.json"].is_file() and files["merges.txt"].is_file():
            backend = Backend(models.BPE.from_file(str(files["vocab.json"]), str(files["merges.txt"])))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
            backend.decoder = decoders.ByteLevel()
        elif files["vocab.txt"].is_file():
            unknown = _token(settings.get("unk_token")) or "[UNK]"
            backend = Backend(models.WordPiece.from_file(str(files["vocab.txt"]), unk_token=unknown))
            backend.normalizer = normalizers.BertNormalizer(lowercase=bool(settings.get("do_lower_case", True)))
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            backend.decoder = decoders.WordPiece()
        else:
            raise UserError(
                f"tokenizer directory {directory} holds none of tokenizer.model, tokenizer.json, characters.json, "
                "vocab.json with merges.txt, vocab.txt"
            )
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception for any damage
        raise UserError(f"the tokenizer files in {directory} cannot be read ({error})") from None
    add_tokens(backend, read_added_tokens(directory), directory)
    named = {key: token for key, value in settings.items() if key.endswith("_token") and (token := _token(value))}
    return HuggingFaceTokenizer(backend, named, str(directory))


def _token(value: Any) -> str | None:
    """A token as the settings files write it: a string, or an object with its "content"."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _download(name: str) -> Path:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [HF_FILE, SENTENCEPIECE_FILE, ADDED_FILE, "vocab.json", "merges.txt", "vocab.txt", *HF_CONFIGS[1:]]
    local = "give a local directory with tokenizer.json, vocab.json + merges.txt, vocab.txt or tokenizer.model instead"
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=5))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"tokenizer '{name}' is neither a local path nor a public name on the hub; {local}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = "the hub cannot be reached" if isinstance(error, (LocalEntryNotFoundError, ConnectionError)) else error
        raise UserError(f"tokenizer '{name}' cannot be downloaded ({reason}); {local}") from None
