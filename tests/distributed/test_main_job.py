"""What a newcomer does: `./run.sh` in a fresh copy, then every command of the README, in its order."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.conftest import ROOT
from tests.helpers.tiny import tiny_run

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
    """What the script prints. DeepSpeed's operators are built anew for each environment's path, and go to a folder of
    their own: in the common one runs of other tests, beside this one, would build over them."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": "", "TORCH_EXTENSIONS_DIR": str(place.parent / "extensions")},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def suggestions(copy: Path, said: str) -> None:
    """What the main job suggests at its end works as it is printed."""
    lines = [re.split(r" {3,}", line)[0] for line in said.partition("; next, in ")[2].splitlines()[1:]]
    board, *others = [line.strip() for line in lines if line.strip()]
    assert board.startswith(".venv/bin/tensorboard ") and len(others) == 4
    with subprocess.Popen(board.split(), cwd=copy, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(found[0] for line in process.stderr if (found := re.search(r"http://localhost:\d+/", line)))
            assert b"TensorBoard" in urlopen(address, timeout=MINUTES).read()
        finally:
            process.terminate()
    for line in others:
        assert line.startswith("./run.sh ")
        run(copy, line, 10 * MINUTES)
    records = (copy / "runs/docs/l4/records/train.jsonl").read_text().splitlines()
    assert len(records) == 200 and json.loads(records[-1])["block_size"] == 4


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
    suggestions(copy, first)

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
    assert modes <= set(re.findall(r"^  ([a-z-]+) ", known.stdout, flags=re.MULTILINE))


@pytest.mark.slow
def test_relative_paths_are_the_callers(tmp_path):
    """From another directory than the project's: a plan, a launched run, and its figures in files named there."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("no .venv here: run the tests through ./run.sh test")
    tiny_run(tmp_path)
    script = os.path.relpath(ROOT / "run.sh", tmp_path)
    assert "dry step" not in run(tmp_path, f"{script} check recipe.yaml --no-dry-step --json plan.json", MINUTES)
    run(tmp_path, f"{script} train recipe.yaml run_dir=out train.global_batch=4 2>log", 5 * MINUTES)
    run(tmp_path, f"{script} report out --out figures", MINUTES)
    assert (tmp_path / "plan.json").is_file() and (tmp_path / "figures/report.md").is_file()
    assert len((tmp_path / "out/records/train.jsonl").read_text().splitlines()) == 4
    log = (tmp_path / "log").read_text()
    assert "[WARNING]" not in log and "[ERROR]" not in log
    assert f"next: {script} evaluate out" in log
    done = subprocess.run([ROOT / "run.sh", "check", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "recipe mine.yaml not found; did you mean 'recipe.yaml'?" in done.stderr
