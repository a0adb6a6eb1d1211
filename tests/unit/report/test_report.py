"""Reports: what is read, what is written, and what is said about runs that hold nothing."""

import csv
import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest

from bd3_ds.commands import report as report_command
from bd3_ds.report import curves
from bd3_ds.report.collect import collect
from bd3_ds.report.curves import smooth
from bd3_ds.runtime import records
from bd3_ds.runtime.errors import run_command


def make_run(path, steps=40, sets=("valid", "lm1b"), offset=0.0, pack_hash="c0ffee" * 8, more="", bound=True):
    path.mkdir(parents=True)
    (path / "run.yaml").write_text(f"run_dir: {path}\nobjective: {{name: bd3, block_size: 4}}\nseed: 1\n{more}")
    for step in range(1, steps + 1):
        nelbo = 3 + 2 / step + offset
        line = {"step": step, "samples": 8 * step, "tokens": 128 * step, "loss": nelbo, "nelbo": nelbo}
        line["nelbo_is_bound"] = bound
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


def cell(table, run, column):
    """A cell of a Markdown table by the name of its row and column."""
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    (row,) = [line for line in lines if line[0] == run and len(line) == len(lines[0])]
    return row[lines[0].index(column)]


def test_what_differs_between_runs(tmp_path, capsys):
    for name, more in (
        ("a", "optim: {lr: 0.001, clip: 1.0}\ndata: {mix: {}}\n"),
        ("b", "optim: {lr: 0.002, clip: 1.0}\n"),
    ):
        make_run(tmp_path / name, more=more)
    make_run(tmp_path / "c", more="optim: {lr: 0.001, clip: null}\ndata: {mix: {data/code: 0.2}}\n")
    report_command.main([*(str(tmp_path / name) for name in "abc"), "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert cell(table, "a", "differs in") == "optim.lr=0.001 optim.clip=1.0 data.mix={}"
    assert cell(table, "b", "differs in") == "optim.lr=0.002 optim.clip=1.0"
    assert cell(table, "c", "differs in") == "optim.lr=0.001 optim.clip=null data.mix.data/code=0.2"
    assert [row["differs"] for row in rows(tmp_path / "out" / "runs.csv")][1] == "optim.lr=0.002 optim.clip=1.0"


def test_one_run_differs_from_none(tmp_path, capsys):
    report_command.main([str(make_run(tmp_path / "run"))])
    assert "differs in" not in capsys.readouterr().out


def test_many_differences_are_cut_in_the_table_alone(tmp_path, capsys):
    for name in "ab":
        make_run(tmp_path / name, more="model: {" + ", ".join(f"k{i}: {name}{i}" for i in range(11)) + "}\n")
    report_command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert cell(capsys.readouterr().out, "a", "differs in").endswith("model.k7=a7 and 3 more")
    assert rows(tmp_path / "out" / "runs.csv")[0]["differs"].endswith("model.k10=a10")


def test_runs_without_a_bound_say_so_and_have_no_curve_on_its_axis(tmp_path, capsys, monkeypatch):
    clipped = make_run(tmp_path / "clipped", bound=False)
    plain = make_run(tmp_path / "plain")
    drawn = []
    monkeypatch.setattr(curves, "_save", lambda figure, axes, path: drawn.append((path.name, labels(axes))))
    report_command.main([str(clipped), str(plain), "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert cell(table, "clipped", "train NELBO") == "no bound" and cell(table, "plain", "train NELBO") == "3.0520"
    assert "nan" not in table
    assert ("loss.png", ["plain"]) in drawn and ("no_bound.png", ["clipped"]) in drawn


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_a_clipped_run_alone_has_no_plot_of_the_bound(tmp_path):
    run = make_run(tmp_path / "run", bound=False)
    report_command.main([str(run)])
    assert not (run / "report/loss.png").exists() and png_size(run / "report/no_bound.png") > (400, 300)


def test_last_steps_that_were_not_finite(tmp_path, capsys):
    run = make_run(tmp_path / "diverged", steps=9, sets=())
    last = records.read(run / "records/train.jsonl")[-1]
    records.append(run / "records/train.jsonl", last | {"step": 10, "nelbo": None, "loss": None})
    assert report_command.main([str(run)]) == 0
    assert cell(capsys.readouterr().out, "diverged", "train NELBO") == "not finite"


@pytest.mark.parametrize("axis, expected", [("steps", [10, 40]), ("tokens", [1280, 5120]), ("seconds", [5.0, 20.0])])
def test_axes(tmp_path, axis, expected):
    (run,) = collect([str(make_run(tmp_path / "run"))])
    assert run.at([10, 40], axis) == expected
    assert report_command.main([str(run.path), "--x", axis]) == 0


def test_steps_that_have_no_record_of_their_own(tmp_path):
    (run,) = collect([str(make_run(tmp_path / "run"))])
    run = replace(run, train=run.train[4:9])  # steps 5 to 9
    assert run.at([7, 20], "tokens") == [7 * 128, 9 * 128] and math.isnan(run.at([4], "tokens")[0])


def test_reports_among_the_runs_are_left_out(tmp_path, capsys):
    for name in "ab":
        make_run(tmp_path / "runs" / name)
    for _ in range(2):  # the second time, the pattern runs/* names the report too
        places = sorted(map(str, (tmp_path / "runs").iterdir()))
        assert run_command(report_command.main, [*places, "--out", str(tmp_path / "runs" / "report")]) == 0
    assert {row["run"] for row in rows(tmp_path / "runs" / "report" / "runs.csv")} == {"a", "b"}
    places = sorted(map(str, (tmp_path / "runs").iterdir()))
    assert run_command(report_command.main, [*places, "--out", str(tmp_path / "elsewhere")]) == 0
    assert run_command(report_command.main, [str(tmp_path / "runs" / "report")]) == 2
    assert "holds reports alone" in capsys.readouterr().err
