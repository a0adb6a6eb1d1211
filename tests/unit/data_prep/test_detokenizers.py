"""Each detokenizer undoes what its set's tokenisation did, by the published rules and their oddities."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.catalog import NAMED_SETS
from data_prep.detokenizers import DETOKENIZERS
from data_prep.sources import open_source

EVAL = Path(os.environ.get("BD3_SHARED", "../shared")) / "data" / "eval"
needs_shared = pytest.mark.skipif(not EVAL.is_dir(), reason="needs the shared data (BD3_SHARED)")

CASES = [
    ("wikitext", " = Robert Boulter = \n", " = Robert Boulter =\n"),
    ("wikitext", " = = Career = = \n", " == Career ==\n"),
    ("wikitext", " = = = 2002 = = = \n", " === 2002 ===\n"),
    ("wikitext", " = = = = Deep = = = = \n", " ==== Deep ====\n"),
    ("wikitext", "a guest @-@ starring role", "a guest-starring role"),
    ("wikitext", "1 @,@ 200 or 3 @.@ 5", "1,200 or 3.5"),
    ("wikitext", "he , too ; why ? no ! so : it . end", "he, too; why? no! so: it. end"),
    ("wikitext", 'as " Craig " in ( 24 in ) and [ x ]', 'as "Craig" in (24 in) and [x]'),
    ("wikitext", "a { set } of ( (  two ) )", "a {set} of ((  two) )"),  # the first closing bracket ends a pair
    ("wikitext", "Teddy 's Story", "Teddy's Story"),
    ("wikitext", "the boys ' house", "the boys' house"),
    ("wikitext", "about 20 ° C", "about 20°C"),
    ("wikitext", "one \n \n two \n", "one\n\ntwo\n"),
    ("wikitext", "in N or N N", "in 1 or 1 N"),
    ("wikitext", "a \"b\" c ' d ' e", "a \"b\" c 'd' e"),
    ("wikitext", "/' 9/", "/'[0-9]/"),
    ("wikitext", "two ! ! and", "two! ! and"),
    ("ptb", "abc 's N N N <unk> did n't pay $ N or # N .", "abc's 1 1 1 ? didn't pay $1 or #1 ."),
    ("ptb", "viewers ' opinions", "viewers' opinions"),
    ("ptb", "either\\/or", "either/or"),
    ("ptb", "N at both ends N", "N at both ends N"),  # no space on one side: left
    ("ptb", "a" + " N" * 40 + " b", "a" + " 1" * 40 + " b"),
    ("ptb", "one \n two", "one\ntwo"),
    ("lm1b", "Why ?", "Why?"),
    ("lm1b", "No ! Never !", "No! Never!"),
    ("lm1b", "Wal-Mart 's founder , Sam .", "Wal-Mart's founder, Sam."),
    ("lm1b", "It is so ; he said : go .", "It is so; he said: go."),
    ("lm1b", "One . Two . Three .", "One . Two. Three."),  # it wants a space before the word
    ("lm1b", 'He said : " We know them " / then ( he ) left !', 'He said: "We know them"/then (he) left!'),
    ("lm1b", "It cost $ 5 or £ 4 at http : / / x.org", "It cost $5 or £4 at http://x.org"),
    ("lm1b", "at https : / / x.org", "at https://x.org"),
    ("lm1b", "see [ the note ] here", "see [the note] here"),
    ("lm1b", "It is 50 % .", "It is 50 % ."),  # a full stop closes up to a word alone
    ("lambada", "“ why ” he said \n", '\n" why " he said'),
    ("lambada", "`` why '' he said", "\n`` why '' he said"),
    ("papers", "we , as in [ 1 ] , find 3 @.@ 5 here .", "we, as in [1], find 3.5 here."),
    ("none", " a , b \n", " a , b \n"),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_case(name: str, text: str, expected: str) -> None:
    assert DETOKENIZERS[name](text) == expected


def test_papers_are_the_rules_of_wikitext_and_then_of_lm1b() -> None:
    for _, text, _ in CASES:
        assert DETOKENIZERS["papers"](text) == DETOKENIZERS["lm1b"](DETOKENIZERS["wikitext"](text))


def test_the_sets_have_the_detokenizers_of_the_protocol() -> None:
    assert {name: known.detokenizer for name, known in NAMED_SETS.items()} == {
        "openwebtext": "none",
        "lm1b": "lm1b",
        "text8": "none",
        "wikitext2": "wikitext",
        "wikitext103": "wikitext",
        "lambada": "lambada",
        "ptb": "ptb",
        "ag_news": "none",
        "pubmed": "papers",
        "arxiv": "papers",
    }


_marks = st.sampled_from(
    [*" .,:;?!'\"()[]{}=@-/$£#°\n\\", " N ", "<unk>", " 's", " n't", " @-@ ", "http : / / ", "“", "word"]
)


@given(st.one_of(st.text(), st.lists(_marks).map("".join)))
def test_any_text(text: str) -> None:
    for name, detokenize in DETOKENIZERS.items():
        result = detokenize(text)
        assert isinstance(result, str) and result == detokenize(text), name
    assert DETOKENIZERS["none"](text) is text


@given(st.one_of(st.text(), st.lists(_marks).map("".join)))
def test_what_is_kept(text: str) -> None:
    letters = re.sub(r"[\W_]", "", text)
    for name in ("lm1b", "lambada"):  # no more than white space and quotes' form
        assert re.sub(r"[\W_]", "", DETOKENIZERS[name](text)) == letters, name


@given(st.one_of(st.text(), st.lists(_marks).map("".join)))
def test_lambada_twice_is_once(text: str) -> None:
    once = DETOKENIZERS["lambada"](text)
    assert DETOKENIZERS["lambada"](once) == once


_word = st.text("abcdefgh", min_size=1, max_size=8)
_phrase = st.tuples(_word, st.sampled_from([" ", ", ", "; ", ": ", "? ", "! ", ". ", "-", "/"])).map("".join)


@given(st.lists(_phrase, min_size=1))
def test_ordinary_text_stays(phrases: list[str]) -> None:
    text = "".join(phrases).rstrip(" ,;:-/") + "."
    for name in ("wikitext", "lm1b", "ptb", "papers"):
        assert DETOKENIZERS[name](text) == text, name


@pytest.mark.parametrize("name", ["wikitext", "lm1b", "ptb", "papers"])
def test_ordinary_quotes_and_brackets_stay(name: str) -> None:
    text = 'Ordinary text, with "quotes" and (brackets): it isn\'t changed. Is it? No!'
    assert DETOKENIZERS[name](text) == text


@needs_shared
@pytest.mark.parametrize(
    ("name", "file", "gone"),
    [
        ("wikitext2", "wikitext2/wiki.test.raw", [" @-@ ", " @,@ ", " @.@ ", " , ", " 's", " \n"]),
        ("ptb", "ptb/valid.txt", ["<unk>", " N ", " n't", " 's", "\\/"]),
        ("lm1b", "lm1b/heldout.txt", [" , ", " n't", "$ ", " ? ", "http : "]),
        ("lambada", "lambada/test.txt", ["“", "”"]),
    ],
)
def test_real_lines(name: str, file: str, gone: list[str]) -> None:
    detokenize = DETOKENIZERS[NAMED_SETS[name].detokenizer]
    lines = [piece.text for piece in open_source(f"{name}={EVAL / file}").pieces()]
    results = [detokenize(line) for line in lines]
    for sign in gone:
        assert not any(sign in result for result in results), sign
    if name in ("ptb", "lambada"):  # the others' rules meet on their own results: "! !" closes up one mark a time
        assert [detokenize(result) for result in results] == results
