"""Half-sentences after unknown names."""

from __future__ import annotations

import pytest

from bd3_ds.runtime.errors import did_you_mean

SETS = ["openwebtext", "lm1b", "text8", "wikitext2", "wikitext103", "lambada", "ptb", "ag_news"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("wikitext", "did you mean 'wikitext103' or 'wikitext2'?"),
        ("Lambada", "did you mean 'lambada'?"),
        ("lambda", "did you mean 'lambada'?"),
        ("webtext", "did you mean 'openwebtext'?"),
        ("news", "did you mean 'ag_news'?"),
        ("c4", "known: ag_news, lambada, lm1b, openwebtext, ptb, text8, wikitext103, wikitext2"),
    ],
)
def test_names_that_are_alike(value: str, said: str) -> None:
    assert did_you_mean(value, SETS) == said


def test_no_wall_of_names() -> None:
    many = [f"section.key_{number:03}" for number in range(110)]
    assert did_you_mean("zzz", many).endswith("section.key_015 and 94 more")
    assert did_you_mean("section", many).endswith("'section.key_003' (or 106 more)?")
    assert did_you_mean("zzz", many, otherwise="see there") == "see there"
