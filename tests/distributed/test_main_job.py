"""What a newcomer does: `./run.sh` in a fresh copy, then every command of the README, in its order."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
MINUTES = 60


def blocks(language):
    """Contents of the README's fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked and new files of this tree in a directory of their own, sharing only the environment."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("no .venv here: run the tests through ./run.sh test")
    place = tmp_path_factory.mktemp("clone") / "bd3-ds"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(ROOT / ".venv")
    return place


def run(place: Path, script: str, timeout: int):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_main_job_then_every_command_of_the_readme(copy):
    commands = blocks("bash")
    assert commands[0].strip() == "./run.sh" and "source .venv/bin/activate" in commands[1]
    first = run(copy, commands[0], 25 * MINUTES)
    assert "reusing" not in first

    records = copy / "runs/docs/finetune/records/eval.jsonl"
    evaluations = [json.loads(line) for line in records.read_text().splitlines()]
    final = {line["set"]: line for line in evaluations if line["step"] == max(e["step"] for e in evaluations)}
    assert set(final) == {"valid", "readmes", "licences"}
    table = dict(re.findall(r"^ *(.*?): valid +\S.*? {2,}([\d.]+)(?: \+- [\d.]+)?$", first, flags=re.MULTILINE))
    assert float(table["held-out perplexity"]) < 0.7 * float(table["unigram perplexity"])
    samples = json.loads((copy / "runs/docs/samples.json").read_text())
    assert len(samples["texts"]) == 3 and all(text.strip() for text in samples["texts"])

    assert run(copy, commands[0], 5 * MINUTES).count("reusing") >= 7

    (copy / "corpus.jsonl").write_text("".join(json.dumps({"text": README}) + "\n" for _ in range(40)))
    run(copy, "gzip corpus.jsonl", MINUTES)
    (copy / "lambada.txt").write_text("\n".join(line for line in README.splitlines() if len(line) > 60) * 20)
    # The tests themselves are not started from a test: that line is only held to be a test that exists.
    rest = [block for block in commands[1:] if "./run.sh test" not in block]
    assert any(Path(word).is_file() for word in " ".join(commands).split() if word.startswith("tests/"))
    run(copy, "set -x\n" + "\n".join(rest), 15 * MINUTES)
    run(copy, ".venv/bin/python - <<'END'\n" + "\n".join(blocks("python")) + "\nEND", 5 * MINUTES)
    assert (copy / "report/report.md").is_file() and (copy / "sample.json").is_file()


def test_readme_names_only_files_that_exist():
    rooms = "bd3_ds|configs|ds_configs|data_prep|docs|tests|benchmarks"
    paths = re.findall(rf"(?:`|\()((?:{rooms})/[\w./-]+?)(?:`|\))", README)
    assert len(paths) > 15
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_commands_of_the_readme_parse(copy):
    """Quick stand-in for the slow test: shell syntax, and modes and options that the programs know."""
    script = "\n".join(blocks("bash"))
    subprocess.run(["bash", "-n", "-c", script], check=True)
    python = str(copy / ".venv/bin/python")
    known = subprocess.run([python, "run.py", "--help"], cwd=copy, capture_output=True, text=True)
    modes = set(re.findall(r"(?:run\.py|\./run\.sh) ([a-z-]+)", script)) - {"setup", "test"}
    assert modes <= set(re.findall(r"[a-z-]+", known.stdout.split("modes:")[1]))
