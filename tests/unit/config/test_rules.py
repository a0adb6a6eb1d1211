"""The rules of single values: what they let through, what their sentences say, and that the schema uses them."""

from __future__ import annotations

import math
import re
from typing import Annotated, List, Optional

import pytest

from bd3_ds.config.keys import schema_keys
from bd3_ds.config.merge import CONFIGS
from bd3_ds.config.rules import Choice, PathText, choice, number, path, rule_of


@pytest.mark.parametrize(
    ("rule", "good", "bad", "must"),
    [
        (number(above=0), [1e-300, 1, 1e300], [0, -1, math.inf, math.nan], "be finite and above 0"),
        (number(at_least=0), [0, 5], [-1, math.inf, math.nan], "be finite and not negative"),
        (number(at_least=2), [2, 3], [1, math.nan], "be at least 2"),
        (number(at_least=0, below=1), [0, 0.5], [1, -0.1, math.nan], "lie in [0, 1)"),
        (number(above=0, at_most=1), [1, 0.5], [0, 1.1, math.inf], "lie in (0, 1]"),
        (number(at_least=0, below=8, shown="0 … 7"), [0, 7], [8], "lie in 0 … 7"),
        (number(above=0, words={"auto": -1}), [1, -1], [0, -2], "be finite and above 0, or auto"),
    ],
)
def test_ranges(rule: object, good: list[float], bad: list[float], must: str) -> None:
    assert not [value for value in good if rule.problems("a.key", value)]
    for value in bad:
        assert rule.problems("a.key", value) == [f"a.key={value} must {must}"]
    assert rule.problems("a.key", [*good, bad[0]]) == [f"a.key holds {bad[0]}, and each must {must}"]


def test_sentences_say_why_and_what_is_known() -> None:
    assert number(at_most=1, why="it is a share").problems("k", 2) == ["k=2 must lie in (-inf, 1]: it is a share"]
    assert choice("mlp", "head").problems("k", ["mlp", "hed"]) == ["k=hed is unknown; did you mean 'head'?"]
    assert not choice("mlp").problems("k", "mlp")
    assert path("a directory").problems("k", " ") == ["k is empty; name a directory"] and not path().problems("k", "")


def test_a_rule_is_found_behind_null_and_in_lists() -> None:
    count = Annotated[int, number(above=0)]
    assert rule_of(count) == rule_of(Optional[count]) == rule_of(List[count]) == number(above=0)
    assert rule_of(int) is rule_of(Optional[int]) is rule_of(List[int]) is None


def test_every_number_of_the_schema_has_a_rule() -> None:
    """But for those that rules between keys hold."""
    free = {
        key for key, one in schema_keys().items() if one.rule is None and re.search("int|float", str(one.annotation))
    }
    assert free == {
        "model.mask_id",
        "objective.block_schedule",
        "objective.schedule.parameters",
        "objective.schedule.t_min",
        "objective.schedule.t_max",
        "optim.parameters",
    }


def test_base_names_every_choice() -> None:
    """The line of a key with a choice, with the comment lines under it, holds each of its words."""
    text = (CONFIGS / "base.yaml").read_text()
    for key, one in schema_keys().items():
        if isinstance(one.rule, Choice):
            name = key.rpartition(".")[2]
            lines = re.findall(rf"^ +{name}: .*(?:\n +#.*)*", text, flags=re.MULTILINE)
            assert any(all(re.search(rf"\b{word}\b", line) for word in one.rule.known) for line in lines), key


def test_a_leading_tilde_is_expanded_where_a_path_is() -> None:
    paths = {key for key, one in schema_keys().items() if isinstance(one.rule, PathText)}
    assert paths >= {"run_dir", "data.train", "data.mix", "data.cache", "train.init_from", "eval.sets"}
