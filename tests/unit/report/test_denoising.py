"""`run.py denoising`: every token is on the page, in its place and block, and nothing in a token is more than text."""

import json
import re
from html.parser import HTMLParser

import pytest

from bd3_ds.commands import denoising as denoising_command
from bd3_ds.report.denoising import denoising_page, shown
from bd3_ds.runtime.errors import UserError, run_command

PIECES = ["<s>", "The", " cat", " <script>alert(1)</script>", "&amp;", "\n", "", '" onclick="x', "</span>", "@@TEXTS@@"]


def samples(block_size=4, length=16, objective="bd3", rows=2, **changes):
    """Texts of ten tokens; the second row's first two are given, and the third token of it is given as well."""
    order = [[0, 3, 1, 2, 7, 4, 6, 5, 8, 9], [0, 0, 1, 0, 2, 3, 5, 4, 6, 7]]
    probability = [[None if step == 0 else (0.005 if step == 9 else step / 10) for step in row] for row in order]
    return {
        "export": "step-00000007",
        "run": "runs/x",
        "objective": objective,
        "block_size": block_size,
        "step": 7,
        "length": length,
        "seed": 3,
        "options": {"temperature": 1.0, "nucleus": None, "<b>": "&", "stop": ["eos", "entropy"]},
        "given": [1, 2][:rows],
        "texts": ["a", "b"][:rows],
        "token_ids": [list(range(10))] * rows,
        "pieces": [PIECES] * rows,
        "ended": ["eos", "length"][:rows],
        "nfe": [9, 7][:rows],
        "cache_forwards": [2, 2][:rows],
        "order": order[:rows],
        "probability": probability[:rows],
        "seconds": 1.0,
        "tokens": 16,
        "tokens_per_second": 16.0,
    } | changes


class Page(HTMLParser):
    """What a browser would make of the page: tokens [text][token], each with its attributes, block and text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.block, self.token, self.scripts = [], [], None, None, 0
        self.words = ""
        self.feed(page)
        self.close()
        assert self.tags == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert not {"onclick", "src", "href", "srcset"} & set(found)
        self.scripts += tag == "script"
        if tag in ("meta", "input"):
            return
        self.tags.append((tag, found.get("class", "")))
        if found.get("class") == "tokens":
            self.texts.append([])
            self.block = None
        elif found.get("class") == "block":
            self.block = int(found["data-block"])
        elif tag == "span" and "data-o" in found:
            kinds = found["class"].split()
            self.token = {"order": int(found["data-o"]), "p": found.get("data-p"), "kinds": kinds, "block": self.block}
            self.token["text"] = ""
            self.texts[-1].append(self.token)

    def handle_endtag(self, tag):
        assert self.tags.pop()[0] == tag
        if tag == "span":
            self.token = None

    def handle_data(self, data):
        if self.token is not None:
            self.token["text"] += data
        elif self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words += data


def test_every_token_is_there_and_only_text():
    page = denoising_page(samples())
    parsed = Page(page)
    for tokens in parsed.texts:
        assert [token["text"] for token in tokens] == [shown(piece) for piece in PIECES]
    assert len(parsed.texts) == 2 and parsed.scripts == 1
    assert shown("\n") == "↵\n" and shown("") == "∅" and shown("a\tb\x00") == "a→\tb␀" and shown("\ud800") == "?"
    assert "<script>alert" not in page and 'onclick="x' not in page
    assert (
        "<b> & · stop eos, entropy" in parsed.words and "nucleus" not in parsed.words
    )  # an option that is off is not told


def test_orders_and_probabilities():
    given = samples()
    for row, tokens in enumerate(Page(denoising_page(given)).texts):
        assert [token["order"] for token in tokens] == given["order"][row]
        for token, step, p in zip(tokens, given["order"][row], given["probability"][row], strict=True):
            assert ("given" in token["kinds"]) == (step == 0)
            if step == 0:
                assert token["p"] is None
            else:
                assert float(token["p"]) == p
                tone = next(number for number, end in enumerate((0.01, 0.1, 0.3, 0.7, 2)) if p < end)
                assert token["kinds"] == ["t", f"b{tone}"]
    page = denoising_page(given)
    assert 'max="9" value="9"' in page
    assert 'max="7" value="7"' in denoising_page(given, [1])


def test_a_token_without_a_probability_has_no_colour():
    (tokens,) = Page(denoising_page(samples(rows=1, probability=[[None] * 10]))).texts
    assert all(token["kinds"] in (["t"], ["t", "given"]) and token["p"] is None for token in tokens)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_block_borders_lie_at_multiples_of_the_block_size(size):
    for tokens in Page(denoising_page(samples(block_size=size))).texts:
        assert [token["block"] for token in tokens] == [place // size for place in range(10)]


@pytest.mark.parametrize(("objective", "size"), [("ar", 1), ("mdlm", 16)])
def test_one_block_and_single_tokens_have_no_border(objective, size):
    page = denoising_page(samples(block_size=size, objective=objective))
    assert 'class="block"' not in page and len(Page(page).texts[0]) == 10
    assert "blocks of" not in page


def test_the_page_needs_nothing_else():
    page = denoising_page(samples())
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|@import|url\(|<link|<img|src=", page.replace("default-src", ""))
    marks = set(re.findall("@@[A-Z]+@@", page))
    assert marks == {"@@TEXTS@@"}, "the one that a token of the text is"


def test_the_command(tmp_path, capsys):
    path, out = tmp_path / "samples.json", tmp_path / "new" / "page.html"
    path.write_text(json.dumps(samples()))
    assert denoising_command.main([str(path), "--out", str(out), "--rows", "1"]) == 0
    assert str(out) in capsys.readouterr().out
    parsed = Page(out.read_text())
    assert len(parsed.texts) == 1 and "Text 1" in parsed.words and "ended by its length" in parsed.words
    assert "7 denoiser evaluations, 2 cache-writing forwards" in parsed.words


def test_the_first_four_texts_unless_others_are_asked():
    many = samples(rows=1)
    for name in ("texts", "token_ids", "pieces", "ended", "nfe", "cache_forwards", "order", "probability"):
        many[name] = many[name] * 6
    assert len(Page(denoising_page(many)).texts) == 4
    assert len(Page(denoising_page(many, range(6))).texts) == 6


def test_bad_input(tmp_path, capsys):
    path, out = tmp_path / "samples.json", tmp_path / "page.html"

    def fails(*words):
        assert run_command(denoising_command.main, list(words)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and not out.exists()
        return line

    assert "not found" in fails(str(path), "--out", str(out))
    path.write_text(json.dumps(samples())[:200])
    assert "not valid JSON" in fails(str(path), "--out", str(out))
    path.write_text(json.dumps(samples(pieces=[["a"], ["b"]])))
    assert "'pieces' and 'token_ids' of text 0" in fails(str(path), "--out", str(out))
    path.write_text(json.dumps(samples()))
    assert "--rows 2: the file has the texts 0 … 1" in fails(str(path), "--out", str(out), "--rows", "0,2")
    assert "--rows 0,x must be" in fails(str(path), "--out", str(out), "--rows", "0,x")
    assert "is a directory" in fails(str(path), "--out", str(tmp_path))
    assert "--out" in fails(str(path))
    with pytest.raises(UserError, match="--rows -1"):
        denoising_page(samples(), [-1])
