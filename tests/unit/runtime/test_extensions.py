"""What a start says of operators that DeepSpeed compiles."""

import sys
from pathlib import Path

from bd3_ds.runtime.extensions import build_announcement

PACKAGES = Path(sys.prefix) / "torch"


def test_a_start_says_what_it_waits_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiling = "compiling DeepSpeed's operator some_op, once, about a minute"
    assert build_announcement("some_op", PACKAGES) == compiling
    place = tmp_path / "py311_cpu" / "some_op"
    place.mkdir(parents=True)
    (place / "lock").touch()
    assert build_announcement("some_op", PACKAGES).startswith("waiting for another process that compiles")
    (place / "lock").unlink()
    (place / "some_op.so").touch()
    (place / "build.ninja").write_text("-isystem /elsewhere/torch/include")
    assert build_announcement("some_op", PACKAGES) == compiling  # against another torch
    (place / "build.ninja").write_text(f"-isystem {PACKAGES}/include")
    assert build_announcement("some_op", PACKAGES) is None
