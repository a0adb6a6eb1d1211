"""The package as others install it: what is in the wheel, and that it works from another folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bd3_ds
from bd3_ds.cli import MODES, usage
from bd3_ds.config.load import load_recipe
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.resources import find_shipped, shipped
from bd3_ds.runtime.run_dir import finished_step
from tests.helpers.launch import ROOT
from tests.helpers.tiny import tiny_export, tiny_run


def test_every_mode_has_a_module_and_a_line() -> None:
    assert all(importlib.util.find_spec(mode.module) for mode in MODES.values())
    lines = usage().splitlines()
    assert all(any(re.match(rf"  {name}  +\S", line) for line in lines) for name in MODES)
    assert all(len(line) <= 120 for line in lines)


def test_the_version_has_one_source() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text and bd3_ds.__version__ not in re.findall(r'^version = "(.*)"', text, re.M)
    assert f"version: {bd3_ds.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", ["docs_pretrain", "docs_pretrain.yaml", "configs/recipes/docs_pretrain.yaml"])
def test_a_shipped_recipe_is_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name, []) == load_recipe(str(ROOT / "configs/recipes/docs_pretrain.yaml"), [])
    (tmp_path / "docs_pretrain").write_text("seed: 7\n")  # a file of the user's goes before it
    with pytest.raises(UserError):  # it is read, and lacks what a recipe must say
        load_recipe("docs_pretrain", [])
    assert find_shipped("other/docs_pretrain.yaml", "configs/recipes", ".yaml") == Path("other/docs_pretrain.yaml")
    assert find_shipped("zero3", "ds_configs", ".json") == shipped("ds_configs") / "zero3.json"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", place, str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = place.glob("*.whl")
    return found


def test_the_wheel_holds_the_code_its_configurations_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ("bd3_ds", "data_prep"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*.py")} <= names
    for folder, kind in (("configs", "*.yaml"), ("ds_configs", "*.json")):
        assert {f"bd3_ds/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob(kind)} <= names
    assert "bd3_ds/report/denoising.html" in names and any(name.endswith("licenses/LICENSE") for name in names)
    facts = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"bd3_ds", "data_prep", facts}


@pytest.mark.slow
def test_an_installed_package_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """The wheel in a directory of its own, the environment's packages behind it; the checkout is not on the path."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    export = tiny_export(tiny_run(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = str(site / "bin" / "bd3-ds")
    assert run(script, "--version") == f"bd3-ds {bd3_ds.__version__}\n"
    assert run(sys.executable, "-m", "bd3_ds", "--version") == f"bd3-ds {bd3_ds.__version__}\n"
    said = run(script, "--help")
    assert said.startswith("usage: bd3-ds MODE") and all(f"  {name} " in said for name in MODES)
    assert "usage: bd3-ds check" in run(script, "check", "--help")
    assert "memory" in run(script, "check", "docs_pretrain", "--gpu", "h100-80g").lower()
    code = (
        f"import bd3_ds; print(bd3_ds.__file__); model = bd3_ds.load({str(export)!r}); "
        "print(model.score(['a text']).ppl.item() > 1)"
    )
    where, better = run(sys.executable, "-c", code).split()
    assert where.startswith(str(site)) and better == "True"
    trained = tmp_path / "trained"  # under the launcher, whose ranks must find the package as well
    run(script, "launch", str(tmp_path / "recipe.yaml"), f"run_dir={trained}", "train.total_steps=2", "--ranks", "2")
    assert finished_step(trained) == 2
