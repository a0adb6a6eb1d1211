"""Tables: what is aligned with what, how wide they are, and what must not break a cell."""

from __future__ import annotations

from bd3_ds.runtime.tables import WIDTH, console_table, labelled, markdown_table


def test_columns_are_aligned_by_their_side() -> None:
    table = console_table(("set", "ppl", "note"), [("  a", "1.5 ± 0.1", None), ("long name", 100.25, "of all")], (0, 2))
    assert table.splitlines() == [
        "set              ppl  note",
        "  a        1.5 ± 0.1",
        "long name     100.25  of all",
    ]
    assert console_table((), [("a", "1")]) == "a  1" and console_table((), []) == ""


def test_numbers_that_are_text_keep_their_digits() -> None:
    assert console_table(("hash",), [("12345e67",), ("0010",)]).splitlines() == ["hash", "12345e67", "0010"]


def test_markdown_puts_numbers_to_the_right_and_keeps_its_columns() -> None:
    table = markdown_table(("name", "n|m"), [("a|b", "1,000"), ("c", "7.5 ± 0.2")])
    head, rule, first, last = table.splitlines()
    assert rule.endswith("-:|") and rule.startswith("|:-") and "a\\|b" in first and "n\\|m" in head
    assert len({len(line) for line in (head, rule, first, last)}) == 1
    assert first.index("1,000") > first.index("a") + 4 and first.endswith("1,000 |")


def test_labelled_paragraphs_are_wrapped_and_tables_in_them_are_not() -> None:
    text = labelled([("ranks", "word " * 60), ("", "below"), ("stages", "stage    none\n    1     2.0")])
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH and len(lines) == 4 + 1 + 2
    start = lines[0].index("word")
    assert lines[0].startswith("  ranks") and all(line[:start].strip() == "" for line in lines[1:4])
    assert lines[-2].startswith("  stages") and lines[-1][start:] == "    1     2.0"
