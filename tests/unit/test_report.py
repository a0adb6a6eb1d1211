"""Reports: what is read, what is written, and what is said about runs that hold nothing."""

import csv
import json
import math
import struct

import numpy as np
import pytest

from bd3_ds.report import report_command
from bd3_ds.report.curves import smooth
from bd3_ds.report.tables import markdown_table
from bd3_ds.runtime import records
from bd3_ds.runtime.errors import run_command


def make_run(path, steps=40, sets=("valid", "lm1b"), offset=0.0, pack_hash="c0ffee" * 8):
    path.mkdir(parents=True)
    (path / "run.yaml").write_text("objective: {name: bd3, block_size: 4}\nseed: 1\n")
    for step in range(1, steps + 1):
        nelbo = 3 + 2 / step + offset
        line = {"step": step, "samples": 8 * step, "tokens": 128 * step, "loss": nelbo, "nelbo": nelbo}
        records.append(path / "records/train.jsonl", line | {"grad_norm": 1.0, "lr": 1e-3, "seconds": 0.5})
    for step in range(10, steps + 1, 10):
        for name in sets:
            nelbo = 3 + 1 / step + offset
            line = {"export": f"step-{step:08d}", "step": step, "set": name, "estimator": "exact", "nelbo": nelbo}
            line |= {"stderr": 0.01, "ppl": math.exp(nelbo), "tokens": 1000, "pack_hash": pack_hash}
            records.append(path / "records/eval.jsonl", line | {"forwards": 5, "seconds": 0.1})
    return path


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_one_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert report_command.main([str(run)]) == 0
    out = run / "report"
    markdown = (out / "report.md").read_text()
    assert markdown in capsys.readouterr().out
    ppl = math.exp(3 + 1 / 40)
    assert f"{ppl:.2f} ± {ppl * 0.01:.2f}" in markdown
    (summary,) = rows(out / "runs.csv")
    assert summary["run"] == "run" and summary["objective"] == "bd3" and summary["block_size"] == "4"
    assert (summary["steps"], summary["tokens"], float(summary["seconds"])) == ("40", str(40 * 128), 20.0)
    assert float(summary["tokens_per_second"]) == 256
    assert float(summary["train_nelbo"]) == pytest.approx(np.mean([3 + 2 / step for step in (37, 38, 39, 40)]))
    evaluations = rows(out / "evaluations.csv")
    assert len(evaluations) == 8
    assert float(evaluations[-1]["ppl"]) == ppl and float(evaluations[-1]["ppl_stderr"]) == ppl * 0.01
    for plot in ("loss.png", "ppl-valid.png", "ppl-lm1b.png"):
        assert f"({plot})" in markdown and png_size(out / plot) > (400, 300)


def test_runs_side_by_side(tmp_path, capsys):
    worse = make_run(tmp_path / "worse", offset=0.5)
    better = make_run(tmp_path / "better", sets=("valid",))
    assert report_command.main([str(worse), str(better), "--out", str(tmp_path / "both")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| valid")]
    assert [line.split("|")[2].strip() for line in lines] == ["better", "worse"]
    assert {row["run"] for row in rows(tmp_path / "both" / "runs.csv")} == {"better", "worse"}
    assert not (worse / "report").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    places = [str(make_run(tmp_path / parent / "run")) for parent in ("a", "b")]
    report_command.main([*places, "--out", str(tmp_path / "out")])
    assert [row["run"] for row in rows(tmp_path / "out" / "runs.csv")] == places


def test_different_text_is_warned_of(tmp_path, capsys):
    places = [make_run(tmp_path / name, pack_hash=name * 64) for name in "ab"]
    report_command.main([*map(str, places), "--out", str(tmp_path / "out")])
    assert "Warning: valid: the runs were scored on different text" in capsys.readouterr().out


def test_text_is_known_by_either_hash(tmp_path, capsys):
    """Records of before there were two hashes have that of the tokens alone under the name pack_hash."""
    before = make_run(tmp_path / "before", pack_hash="a" * 64)
    now, other = (make_run(tmp_path / name, pack_hash=name * 8) for name in ("now", "other"))
    for run, content in ((now, "a" * 64), (other, "a" * 64)):
        lines = records.read(run / "records/eval.jsonl")
        text = "".join(json.dumps(line | {"content_hash": content}) + "\n" for line in lines)
        (run / "records/eval.jsonl").write_text(text)
    report_command.main([str(before), str(now), "--out", str(tmp_path / "out")])
    assert "Warning" not in capsys.readouterr().out
    report_command.main([str(now), str(other), "--out", str(tmp_path / "out")])  # two protocols on one text
    assert "Warning: valid: the runs were scored on different text" in capsys.readouterr().out


def test_training_alone_and_torn_lines(tmp_path):
    run = make_run(tmp_path / "run", sets=())
    with open(run / "records/train.jsonl", "a") as file:
        file.write('{"step": 41, "samp')
    (run / "run.yaml").write_text("objective: [")
    assert report_command.main([str(run)]) == 0
    (summary,) = rows(run / "report" / "runs.csv")
    assert summary["steps"] == "40" and summary["objective"] == ""


def test_values_that_are_not_finite(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    with open(run / "records/train.jsonl", "a") as file:
        file.write(json.dumps(records.read(run / "records/train.jsonl")[-1] | {"step": 11, "nelbo": math.nan}) + "\n")
    assert report_command.main([str(run)]) == 0


@pytest.mark.parametrize("make, sentence", [(False, "not found"), (True, "holds no records")])
def test_no_run(tmp_path, capsys, make, sentence):
    place = tmp_path / "run"
    if make:
        place.mkdir()
    assert run_command(report_command.main, [str(place)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (place / "report").exists()


def test_smoothing():
    values = np.array([1.0, 1.0, math.nan, 1.0, 2.0])
    np.testing.assert_allclose(smooth(values, 10)[:4], 1.0)
    np.testing.assert_array_equal(smooth(values[:2], 1), values[:2])
    assert 1 < smooth(values, 10)[-1] < 2


def test_markdown_table_is_aligned():
    table = markdown_table(("name", "n"), [("a|b", "1,000"), ("c", "7.5")])
    assert table.splitlines()[1:3] == ["| ---- | ----: |", "| a\\|b | 1,000 |"]
    assert len({len(line) for line in table.splitlines()}) == 1
