"""Each detokenizer undoes what its set's tokenisation did."""

from __future__ import annotations

import pytest

from data_prep.detokenizers import DETOKENIZERS

CASES = [
    ("wikitext", " = Robert Boulter = \n", " = Robert Boulter =\n"),
    ("wikitext", " = = Career = = \n", " == Career ==\n"),
    ("wikitext", "a guest @-@ starring role", "a guest-starring role"),
    ("wikitext", "1 @,@ 200 or 3 @.@ 5", "1,200 or 3.5"),
    ("wikitext", "he , too ; why ? no ! so : it . end", "he, too; why? no! so: it. end"),
    ("wikitext", 'as " Craig " in ( 24 in ) and [ x ]', 'as "Craig" in (24 in) and [x]'),
    ("wikitext", "Teddy 's Story", "Teddy's Story"),
    ("wikitext", "the boys ' house", "the boys' house"),
    ("wikitext", "about 20 ° C", "about 20°C"),
    ("ptb", "abc 's N N N <unk> did n't pay $ N or # N .", "abc's 1 1 1 ? didn't pay $1 or #1 ."),
    ("ptb", "viewers ' opinions", "viewers' opinions"),
    ("ptb", "either\\/or", "either/or"),
    ("lm1b", "Why ?", "Why?"),
    ("lm1b", "Wal-Mart 's founder , Sam .", "Wal-Mart's founder, Sam."),
    ("lm1b", 'He said : " We know them " / then ( he ) left !', 'He said: "We know them"/then (he) left!'),
    ("lm1b", "It cost $ 5 or £ 4 at http : / / x.org", "It cost $5 or £4 at http://x.org"),
    ("lambada", "“ why ” he said \n", '\n" why " he said'),
    ("papers", "we , as in [ 1 ] , find 3 @.@ 5 here .", "we, as in [1], find 3.5 here."),
    ("none", " a , b \n", " a , b \n"),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_case(name: str, text: str, expected: str) -> None:
    assert DETOKENIZERS[name](text) == expected


@pytest.mark.parametrize("name", ["wikitext", "lm1b", "ptb", "papers"])
def test_ordinary_text_stays(name: str) -> None:
    text = 'Ordinary text, with "quotes" and (brackets): it isn\'t changed. Is it? No!'
    assert DETOKENIZERS[name](text) == text
