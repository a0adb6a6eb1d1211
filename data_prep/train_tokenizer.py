"""Train a sentencepiece tokenizer on a source.

python -m data_prep.train_tokenizer --source python-docs --split train --vocab-size 2048 --out DIR
"""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, did_you_mean, run_command
from bd3_ds.runtime.files import new_directory
from data_prep.options import add_sources, local_directory, say_files, whole_number

MODEL_TYPES = ("bpe", "unigram")
LEAST_VOCABULARY = 300  # 256 bytes, unknown, end, newline, and room for letters
SENTENCE_CHARACTERS = 4000
SAMPLE_CHARACTERS = 12_000_000  # enough for the statistics of a vocabulary of tens of thousands


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError."""
    parse = Parser("data_prep.train_tokenizer", "Train a sentencepiece tokenizer; writes DIR/tokenizer.model.")
    add_sources(parse)
    parse.add_argument("--split", help="as in data_prep.prepare")
    parse.add_argument("--text-field", help="as in data_prep.prepare")
    parse.add_argument("--vocab-size", required=True, help="pieces, the 256 bytes included, the mask not")
    parse.add_argument("--out", required=True, help="directory to make")
    parse.add_argument("--model-type", default="bpe", help="bpe or unigram (default: bpe)")
    parse.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")
    options = parse.parse(argv)
    size = whole_number("--vocab-size", options.vocab_size, LEAST_VOCABULARY, "pieces")
    out = local_directory("--out", options.out)
    if options.model_type not in MODEL_TYPES:
        raise UserError(f"--model-type {options.model_type}: {did_you_mean(options.model_type, MODEL_TYPES)}")
    from bd3_ds.data.tokenizer import SENTENCEPIECE_FILE, load_tokenizer
    from data_prep.sources import open_sources

    source = open_sources(options.source, options.split, options.text_field, given=("detokenizer", "frame"))
    if out.exists():
        others = [file for file in out.iterdir() if file.name != SENTENCEPIECE_FILE]
        if others:
            raise UserError(f"--out {out}: exists and is not a tokenizer directory; choose another")
        if any(out.iterdir()) and not options.overwrite:
            raise UserError(f"--out {out}: already holds a tokenizer; use it, choose another, or give --overwrite")
    say_files(source)
    try:
        with new_directory(out, replace=True) as directory:
            model = train((piece.text for piece in source.pieces()), size, options.model_type)
            (directory / SENTENCEPIECE_FILE).write_bytes(model)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; no tokenizer was written, and one that was there is as it was") from None
    tokenizer = load_tokenizer(str(out))
    print(f"{out / SENTENCEPIECE_FILE}: {size} pieces, fingerprint {tokenizer.fingerprint}")
    return 0


def train(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """A sentencepiece model of `vocab_size` pieces: text unchanged, bytes for rare characters, EOS, no BOS, no pad.

    Equal texts give equal bytes. Looks at the first 12 million characters. Raises UserError if there is too little
    text for so many pieces.
    """
    import sentencepiece

    sentences = _sentences(texts)
    first = next(sentences, None)
    if first is None:
        raise UserError("--source: holds no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        most = re.search(r"<= (\d+)", str(error))
        fewer = f"at most {most[1]}" if most and int(most[1]) >= LEAST_VOCABULARY else "fewer"
        raise UserError(
            f"--vocab-size {vocab_size}: the source has too little text for so many pieces; give more text or {fewer}"
        ) from None
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_CHARACTERS
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), SENTENCE_CHARACTERS):
                sentence = line[begin : begin + SENTENCE_CHARACTERS]
                left -= len(sentence)
                if sentence.strip():
                    yield sentence
        if left <= 0:
            return


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
