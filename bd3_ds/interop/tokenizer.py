"""Our tokenizers in the form that transformers' AutoTokenizer loads, where the two are seen to give equal ids.

A sentencepiece model is rebuilt from its pieces and scores, with the normalisation that it carries itself; whether the
result splits text as the original does is not taken on trust but looked at, on prose and on awkward characters.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

from bd3_ds.data.characters import CharacterTokenizer
from bd3_ds.data.tokenizer import HF_FILE, MASK_TOKENS, SENTENCEPIECE_FILE, load_tokenizer
from bd3_ds.data.tokenizer_base import Tokenizer

_AWKWARD = (
    "Hello  world, it's 12:30!\n\tThe   naïve “test” isn't over — 数字 ½ … ﬁne.",
    " leading and trailing   ",
    "ÀÉÎõü Straße Москва 日本語 العربية 🙂👩‍👩‍👧 x²+y³≠∞ http://a.b/c?d=e_f&g=%20",
    "tabs\tand\r\nlines\n\n\nand a\u00a0no-break space\u200b, ａ ｂ",
    "",
    " ",
)
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # kinds of piece in sentencepiece's files
_SPACE = "▁"  # how sentencepiece writes a space
_UNIGRAM, _BPE = 1, 2  # kinds of model there


def write_auto_tokenizer(directory: Path, folder: Path, length: int | None = None) -> str | None:
    """Write the tokenizer in `directory` (of an export) to `folder` as AutoTokenizer loads it.

    `length`, the tokens that the model reads, becomes its model_max_length.

    None where that is done; else nothing is written, and what comes back says why not.
    """
    import tokenizers

    ours = load_tokenizer(str(directory))
    backend: Any = None
    if isinstance(ours, CharacterTokenizer):
        backend = _of_characters(ours)
    elif (directory / HF_FILE).is_file():
        backend = tokenizers.Tokenizer.from_file(str(directory / HF_FILE))
    elif (directory / SENTENCEPIECE_FILE).is_file():
        backend = _of_sentencepiece(directory / SENTENCEPIECE_FILE)
    if backend is None:
        return "its kind has no counterpart in transformers"
    theirs = _fast(backend, ours)
    if theirs is None:
        return f"its mask, id {ours.mask_id}, cannot be had there"
    unlike = first_difference(ours, theirs)
    if unlike is not None:
        return f"its counterpart in transformers splits some texts otherwise, such as that which begins {unlike[:40]!r}"
    if length is not None:
        theirs.model_max_length = length  # not before: it warns of longer texts
    theirs.save_pretrained(str(folder))
    return None


def first_difference(ours: Tokenizer, theirs: Any) -> str | None:
    """The first text of the samples that the two tokenizers give unlike ids; None where there is none."""
    texts = [*_AWKWARD, *_prose()]
    if isinstance(ours, CharacterTokenizer):
        known = set(ours.alphabet)
        texts = ["".join(letter for letter in text.lower() if letter in known) for text in texts]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        if theirs(text, add_special_tokens=False)["input_ids"] != ids:
            return text
    return None


def _prose() -> list[str]:
    """English that every Python has, some 37,000 words of it."""
    topics = pydoc_data.topics.topics
    return ["\n".join(topics[name].split("\n")[:200]) for name in sorted(topics)]


def _fast(backend: Any, ours: Tokenizer) -> Any:
    """A PreTrainedTokenizerFast with our special tokens; None where its mask has another id."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend.no_truncation()
    backend.no_padding()
    if backend.id_to_token(ours.mask_id) is None:
        mask = next(token for token in (*MASK_TOKENS, "<|bd3-mask|>") if backend.token_to_id(token) is None)
        backend.add_special_tokens([AddedToken(mask, special=True, normalized=False)])
        if backend.token_to_id(mask) != ours.mask_id:
            return None
    roles = {"bos": ours.bos_id, "eos": ours.eos_id, "pad": ours.pad_id, "mask": ours.mask_id}
    named = {f"{role}_token": backend.id_to_token(token) for role, token in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # token_type_ids say nothing to these models
        **named,
    )


def _of_characters(ours: CharacterTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    end = "</s>"
    vocabulary = {letter: i for i, letter in enumerate(ours.alphabet)} | {end: ours.eos_id}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _of_sentencepiece(path: Path) -> Any:
    """The same pieces, scores and normalisation; None for kinds of model that `tokenizers` does not have.

    Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    if trainer.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model: Any = models.Unigram(scores, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == _BPE:
        model = models.BPE(
            {piece.piece: i for i, piece in enumerate(proto.pieces)},
            _merges(proto.pieces),
            unk_token=proto.pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        return None
    backend = Tokenizer(model)
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        named = [piece.piece for piece in proto.pieces if piece.type == kind]
        add([AddedToken(piece, normalized=False, special=kind == _CONTROL) for piece in named])
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if rules.add_dummy_prefix else []
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    # A text is one word: sentencepiece does not cut it at spaces either, it only has no piece that reaches over one.
    back: list[Any] = [decoders.Replace(_SPACE, " ")]
    back += [decoders.ByteFallback()] if trainer.byte_fallback else []
    back.append(decoders.Fuse())
    back += [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(back)
    return backend


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which sentencepiece joins them: by the score of what they become."""
    rank = {
        piece.piece: -piece.score for piece in pieces if piece.type not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    }
    pairs = [
        (rank[whole], at, (whole[:at], whole[at:]))
        for whole in rank
        for at in range(1, len(whole))
        if whole[:at] in rank and whole[at:] in rank
    ]
    return [pair for *_, pair in sorted(pairs)]
