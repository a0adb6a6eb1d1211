"""English prose of every installation: the documentation of Python and its packages.

`python-docs` is the text of docstrings of Python's own library and of the packages that this project needs, one
document a module; about 3 % of the modules are held out, by name. `python-readmes` and `python-licences` are the
descriptions and licence texts of the installed packages. All depend only on the installed versions.

python -m data_prep.python_docs DIR       writes all of them, so that several packs need one look through the packages
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from tqdm import tqdm

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import run_command
from bd3_ds.runtime.files import new_directory

PACKAGES = (
    "datasets",
    "deepspeed",
    "einops",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "mpmath",
    "networkx",
    "numpy",
    "omegaconf",
    "pandas",
    "PIL",
    "pyarrow",
    "scipy",
    "setuptools",
    "streaming",
    "sympy",
    "tensorboard",
    "torch",
    "transformers",
)
SKIPPED = {"test", "tests", "testing", "_vendor", "site-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
HELD_OUT_PERCENT = 3
MODULE_DEPTH = 3  # modules alike in their first so many names are held out together: they share text
LEAST_WORDS = 8
LEAST_PLAIN = 0.78  # share of the words that are nothing but letters, with ordinary punctuation around them

_PLAIN_WORD = re.compile(r"(?<!\S)[(\"'*]*(?:[A-Za-z]?[a-z]+(?:['-][a-z]+)*|I|A)[.,;:!?)\"'*]*(?!\S)")
_CODE_LINE = re.compile(r"^\s*(>>>|\.\.\.|\$ |@|#!|import |from \w[\w.]* import|def |class |\.\. |[-=~^*+|`#_]{3,})")
_ENTRY = re.compile(
    r"^\s*(?:[-*+•]\s+|\d+[.)]\s+|[A-Z]\w+:\s*$|:\w+[^:]*:\s*|[\w, *]+ : .*$|\*{0,2}`?\w+`?(?:\s*\(.*?\))?:(?:\s+|$))"
)
_NAME = re.compile(r"\S*[A-Z0-9_`/]\S*")
_MARKUP = re.compile(r":[a-z:]+:`~?([^`<]+?)(?: <[^>]*>)?`|``([^`]+)``|\[`~?([^`\]]+)`\](?:\([^)]*\))?|`([^`]+)`_*")


def documents(name: str, split: str) -> Iterator[str]:
    """The documents of an embedded set, in an order that does not change between runs."""
    if name == "python-docs":
        return iter(_python_docs()[split])
    paragraphs = _readmes() if name == "python-readmes" else _licences()
    return _unique(paragraphs, set())


def _python_docs() -> dict[str, list[str]]:
    """Both splits from one look through the packages; what training has seen is not held out."""
    seen: set[bytes] = set()
    kept: dict[bool, list[list[str]]] = {False: [], True: []}
    for module, paragraphs in _modules():
        kept[_is_held_out(module)].append(paragraphs)
    train = list(_unique(kept[False], seen))
    return {"train": train, "valid": list(_unique(kept[True], seen))}


def _is_held_out(module: str) -> bool:
    family = ".".join(module.split(".")[:MODULE_DEPTH])
    return int(hashlib.sha256(family.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def _unique(groups: Iterable[list[str]], seen: set[bytes]) -> Iterator[str]:
    """Join each group's paragraphs, without those seen before; near-copies that differ in names only count as seen."""
    for paragraphs in groups:
        fresh = []
        for paragraph in paragraphs:
            key = hashlib.sha256(_NAME.sub("#", " ".join(paragraph.split())).encode()).digest()[:12]
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh) + "\n"


def _modules() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    library, packages = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    files = [(file, file.relative_to(library)) for file in _python_files(library)]
    for package in PACKAGES:
        if (packages / package).is_dir():
            files += [(file, file.relative_to(packages)) for file in _python_files(packages / package)]
    read: set[str] = set()  # many docstrings are copies; looking at each once halves the time
    for file, relative in tqdm(files, desc="reading docstrings", unit="module", disable=None):
        texts = [text for text in _docstrings(file) if text not in read]
        read.update(texts)
        paragraphs = [paragraph for text in texts for paragraph in prose(inspect.cleandoc(text))]
        if paragraphs:
            yield ".".join(relative.with_suffix("").parts), paragraphs
    for topic, text in sorted(topics.items()):
        yield f"pydoc_data.topics.{topic}", list(prose(text))


def _python_files(root: Path) -> list[Path]:
    return sorted(file for file in root.rglob("*.py") if not SKIPPED.intersection(file.relative_to(root).parts))


def _docstrings(file: Path) -> Iterator[str]:
    source = file.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    collecting = gc.isenabled()
    gc.disable()  # a tree is many small objects and no cycle: the collector's walks would double the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            yield from list(_texts(ast.parse(source)))
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return
    finally:
        if collecting:
            gc.enable()


def _texts(node: ast.AST) -> Iterator[str]:
    """Docstrings of `node` and below, and texts handed to a call such as add_docstr; expressions are not entered."""
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.With)):
            yield from _texts(child)
        elif isinstance(child, ast.Expr):
            values = child.value.args if isinstance(child.value, ast.Call) else [child.value]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def prose(text: str) -> Iterator[str]:
    """The paragraphs of `text` that read like English, each on one line; code, tables and headings are left out."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if not _CODE_LINE.match(line)]
        if len(lines) < block.count("\n") + 1 and (">>>" in block or len(lines) == 0):
            continue
        for paragraph in _items(lines):
            plain = _MARKUP.sub(lambda match: next(group for group in match.groups() if group), paragraph)
            plain = " ".join(plain.replace("**", "").split())
            if _is_prose(plain):
                yield plain


def _items(lines: list[str]) -> Iterator[str]:
    """Split a block before list items and dedented lines, so that the entries of an argument list stand apart.

    What names an entry ("size (int):", "size : int", a bullet) is taken off; its description stays.
    """
    item: list[str] = []
    previous = 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        description = _ENTRY.sub("", line, count=1)
        if item and (indent < previous or description != line):
            yield " ".join(item)
            item = []
        item.append(description)
        previous = indent
    yield " ".join(item)


def _is_prose(text: str) -> bool:
    words, plain = text.count(" ") + 1, len(_PLAIN_WORD.findall(text))
    return plain >= LEAST_WORDS and plain >= LEAST_PLAIN * words


def _sorted_distributions() -> list[Distribution]:
    return sorted(distributions(), key=lambda found: (found.metadata["Name"] or "").lower())


def _readmes() -> Iterator[list[str]]:
    for found in _sorted_distributions():
        text = found.metadata.get("Description") or found.metadata.get_payload()  # type: ignore[attr-defined]
        yield list(prose(re.sub(r"!?\[([^\]]*)\]\([^)]*\)|<[^>]+>", r"\1", str(text))))


def _licences() -> Iterator[list[str]]:
    for found in _sorted_distributions():
        names = [
            path
            for path in found.files or []
            if re.search(r"licen[cs]e|copying|notice", path.name, re.I)
            and path.suffix in ("", ".txt", ".md", ".rst")
            and ".dist-info" in str(path)
        ]
        for path in sorted(names, key=str):
            file = Path(str(found.locate_file(path)))
            if file.is_file():
                yield list(prose(file.read_text(encoding="utf-8", errors="replace")))


def write(directory: Path) -> None:
    """Write every embedded set as JSON lines into a new directory, which appears whole."""
    with new_directory(directory) as aside:
        sets = {
            **_python_docs(),
            "readmes": documents("python-readmes", "test"),
            "licences": documents("python-licences", "test"),
        }
        for name, texts in sets.items():
            with open(aside / f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError."""
    parser = Parser(prog="data_prep.python_docs", description="Write the embedded corpus as JSON lines.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to make")
    write(parser.parse(argv).directory)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
