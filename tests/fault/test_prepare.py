"""Preparations that are killed, run out of disk or lose their storage: the next start finishes them, to the byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bd3_ds.data.manifest import read_manifest
from bd3_ds.data.pack import open_pack
from bd3_ds.runtime.errors import UserError
from data_prep import pack_writer, parts, prepare, train_tokenizer, verify
from data_prep.sources import open_source
from tests.helpers.s3_server import object_server

ROOT = Path(__file__).parents[2]
# Small parts and groups, so that a small text has many of them.
DRIVER = """
import sys
from bd3_ds.runtime.errors import run_command
from data_prep import pack_writer, parts, prepare
parts.PART_CHARACTERS, pack_writer.GROUP_TOKENS = 20_000, 4_000
if __name__ == "__main__":
    sys.exit(run_command(prepare.main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl, a tokenizer and the driver."""
    folder = tmp_path_factory.mktemp("killed")
    draw = random.Random(0)
    words = ["the", "of", "model", "block", "text", "mask", "token", "noise", "rate", "order", "shard", "sample"]
    words += ["kernel", "cache", "score"]
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(400):
            document = " ".join(draw.choice(words) for _ in range(draw.randrange(5, 400)))
            file.write(json.dumps({"text": document}) + "\n")
    arguments = ["--source", str(folder / "text.jsonl"), "--vocab-size", "330", "--out", str(folder / "tokenizer")]
    assert train_tokenizer.main(arguments) == 0
    (folder / "driver.py").write_text(DRIVER)
    return folder


def arguments(text: Path, out: Path | str, workers: int = 2) -> list[str]:
    source = ["--source", str(text / "text.jsonl"), "--tokenizer", str(text / "tokenizer"), "--length", "32"]
    return [*source, "--out", str(out), "--workers", str(workers)]


def start(text: Path, out: Path, workers: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(text / "driver.py"), *arguments(text, out, workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a directory with its content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def finished(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("rounds", "kills"), [(1, 3), pytest.param(4, 5, marks=pytest.mark.slow)], ids=["3 kills", "20 kills"]
)
def test_killed_preparations_give_the_undisturbed_pack(text: Path, tmp_path: Path, rounds: int, kills: int) -> None:
    begun = time.monotonic()
    finished(start(text, tmp_path / "undisturbed"))
    took = time.monotonic() - begun
    wanted = tree(tmp_path / "undisturbed")
    assert len([name for name in wanted if name.endswith(".zstd")]) > 10
    draw = random.Random(7)
    for turn in range(rounds):
        out = tmp_path / f"killed-{turn}"
        for kill in range(kills):
            process = start(text, out)
            time.sleep(draw.uniform(0.2, 1.0) * took)
            if kill % 2:  # the reader alone: its workers must go by themselves
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # ends when the last process that holds its output has ended
            assert not out.exists() or tree(out) == wanted
        finished(start(text, out))
        assert tree(out) == wanted
        assert [path.name for path in tmp_path.glob(f".{out.name}*")] == []
    verify.verify(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_is_one_line_and_goes_on(text: Path, tmp_path: Path, workers: int) -> None:
    """As a terminal sends it: to the reader and its workers, whatever they are doing, from their first moment on."""
    finished(start(text, tmp_path / "undisturbed"))
    work = tmp_path / ".out.partial" / "parts"
    for wanted in (0, 1, 2, 6):
        there = len(list(work.glob("*.npz")))
        process = start(text, tmp_path / "out", workers)
        while len(list(work.glob("*.npz"))) < there + wanted and process.poll() is None:
            time.sleep(0.005)
        if wanted == 0:  # while the workers are being started
            while not work.exists() and process.poll() is None:
                time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()  # ends when the last process that holds its output has ended
        assert process.returncode == 130, output
        (said,) = [line for line in output.splitlines() if not line.startswith("reads ")]
        kept = "what is finished is kept: the same command goes on from there"
        assert said == f"stopped; {kept if work.exists() else 'nothing was finished yet'}", output
        assert not (tmp_path / "out").exists() and work.exists() >= (wanted > 0)
    finished(start(text, tmp_path / "out", workers))
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_finished_parts_and_groups_are_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_CHARACTERS", 20_000)
    monkeypatch.setattr(pack_writer, "GROUP_TOKENS", 4_000)
    encode, write = parts.encode_part, pack_writer.write_group
    assert prepare.main(arguments(text, tmp_path / "whole", 1)) == 0
    done: list[str] = []

    def encode_some(part, file, digest):
        if len(done) == 5:
            raise KeyboardInterrupt
        encode(part, file, digest)
        done.append(file.name)

    monkeypatch.setattr(parts, "encode_part", encode_some)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(arguments(text, tmp_path / "out", 1))
    assert done == [f"{i:06d}.npz" for i in range(5)]
    work = tmp_path / ".out.partial"
    groups = sorted(path.name for path in (work / "pack").iterdir())
    (work / "parts" / "000003.npz").write_bytes(b"cut off")  # as a full disk or a power cut might leave it
    again: list[str] = []
    written: list[str] = []
    monkeypatch.setattr(
        parts, "encode_part", lambda part, file, digest: (again.append(file.name), encode(part, file, digest))
    )

    def write_counted(tokens, marks, place, note):
        before = place.stat().st_ino if place.exists() else None
        write(tokens, marks, place, note)
        if place.stat().st_ino != before:
            written.append(place.name)

    monkeypatch.setattr(pack_writer, "write_group", write_counted)
    assert prepare.main(arguments(text, tmp_path / "out", 1)) == 0
    assert again[0] == "000003.npz" and again[1] == "000005.npz"
    assert groups and not set(groups) & set(written)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The revisions that sources are opened at; their newest one is another each time."""
    revisions: list[str | None] = []

    def open_at(spec, split, field, revision):
        revisions.append(revision)
        return replace(open_source(spec, split, field), find_revision=lambda: revision or f"newest-{len(revisions)}")

    monkeypatch.setattr("data_prep.sources.open_source", open_at)
    return revisions


def stopped(words: list[str]) -> None:
    """A preparation that is stopped at its first group."""
    with pytest.MonkeyPatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(pack_writer, "write_group", _stop)
        prepare.main(words)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_later_start_reads_the_revision_of_the_first(text: Path, tmp_path: Path, asked: list[str | None]) -> None:
    stopped(arguments(text, tmp_path / "out", 1))
    assert prepare.main(arguments(text, tmp_path / "out", 1)) == 0
    assert asked == [None, "newest-1"] and read_manifest(tmp_path / "out").revision == "newest-1"


def test_a_revision_is_of_its_source_alone(text: Path, tmp_path: Path, asked: list[str | None]) -> None:
    other = tmp_path / "other.jsonl"
    shutil.copyfile(text / "text.jsonl", other)
    words = arguments(text, tmp_path / "out", 1)
    stopped(words)
    stopped([words[0], str(other), *words[2:], "--revision", "given"])
    assert prepare.main(words) == 0
    assert asked == [None, "given", None]


@pytest.mark.parametrize("differs", ["text", "tokenizer"])
def test_what_does_not_fit_is_made_again(text: Path, tmp_path: Path, differs: str) -> None:
    """Of what an earlier start left, a part of other text or tokens is not taken for this one's."""
    assert prepare.main(arguments(text, tmp_path / "whole", 1)) == 0
    work = tmp_path / ".out.partial" / "parts"
    work.mkdir(parents=True)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "something else entirely " * 200}) + "\n")
    source, made_by = open_source(str(text / "text.jsonl")), read_manifest(tmp_path / "whole").settings
    if differs == "text":
        source, name = open_source(str(other)), f"{made_by['tokenizer']} none"
    else:
        name = "another tokenizer none"
    part = next(parts.cut(source.pieces()))
    parts.start_worker(str(text / "tokenizer"), "none")
    wrong = [piece._replace(text="something else") for piece in part] if differs == "tokenizer" else part
    parts.encode_part(wrong, work / "000000.npz", parts._digest(part, name))
    assert prepare.main(arguments(text, tmp_path / "out", 1)) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_group_of_other_chunks_is_written_again(text: Path, tmp_path: Path) -> None:
    """As many chunks of the same length, other tokens."""
    assert prepare.main(arguments(text, tmp_path / "whole", 1)) == 0
    pack = open_pack(tmp_path / "whole")
    tokens = pack.all_tokens()[:, ::-1].astype(pack.manifest.dtype)
    marks = [(pack.doc_starts(i).astype("<u4").tobytes(), b"") for i in range(len(pack))]
    work = tmp_path / ".out.partial"
    for folder in ("pack", "groups"):
        (work / folder).mkdir(parents=True)
    pack_writer.write_group(tokens, marks, work / "pack" / "00000", work / "groups" / "00000.json")
    assert prepare.main(arguments(text, tmp_path / "out", 1)) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_kill_while_a_pack_takes_anothers_place(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames there is no pack; the next start has the old one back before anything can go wrong."""
    out, move = tmp_path / "out", os.replace
    assert prepare.main(arguments(text, out, 1)) == 0
    old = tree(out)

    def killed(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        move(source, target)

    longer = [*arguments(text, out, 1), "--length", "64", "--overwrite"]
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr("data_prep.work_directory.os.replace", killed)
        prepare.main(longer)
    assert not out.exists()
    hidden = text / "text.jsonl.hidden"
    (text / "text.jsonl").rename(hidden)
    (text / "text.jsonl").write_text("not JSON\n")
    try:
        with pytest.raises(UserError, match="not valid JSON"):
            prepare.main(longer)
    finally:
        hidden.rename(text / "text.jsonl")
    assert tree(out) == old
    assert prepare.main(longer) == 0 and read_manifest(out).length == 64
    assert not list(tmp_path.glob(".out*"))


def test_kill_after_the_last_rename(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def killed(path, **options):
        if path == tmp_path / ".out.partial":
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr("data_prep.work_directory.shutil.rmtree", killed)
        prepare.main(arguments(text, tmp_path / "out", 1))
    assert (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    assert prepare.main(arguments(text, tmp_path / "out", 1)) == 0
    assert not (tmp_path / ".out.partial").exists()


def test_one_pack_is_made_by_one_process(text: Path, tmp_path: Path) -> None:
    process = start(text, tmp_path / "out")
    work = tmp_path / ".out.partial" / "parts"
    while not work.exists() and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is making this pack"):
        prepare.main(arguments(text, tmp_path / "out", 1))
    finished(process)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk(text: Path, tmp_path: Path, small_disk: Path) -> None:
    assert prepare.main(arguments(text, tmp_path / "whole", 1)) == 0
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 1_900_000)
    for workers in (2, 1):
        process = start(text, small_disk / "out", workers)
        output, _ = process.communicate()
        assert process.returncode == 2 and "no room is left" in output and "Traceback" not in output, output
        assert not (small_disk / "out").exists()
    kept = list((small_disk / ".out.partial" / "parts").iterdir())
    assert kept
    ballast.unlink()
    process = start(text, small_disk / "out")
    finished(process)
    assert read_manifest(small_disk / "out").pack_hash == read_manifest(tmp_path / "whole").pack_hash


def test_limit_on_file_sizes(text: Path, tmp_path: Path) -> None:
    """The same sentence where no disk can be mounted: a limit stops the writing of a group."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))"
    driver = tmp_path / "driver.py"
    driver.write_text(
        DRIVER.replace("parts.PART_CHARACTERS", f"{limit}\nparts.PART_CHARACTERS").replace("20_000", "2_000_000")
    )
    command = [sys.executable, str(driver), *arguments(text, tmp_path / "out", 1)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --out") and "no room is left" in done.stderr
    assert not (tmp_path / "out").exists() and done.stderr.count("\n") == 1


def test_killed_worker(text: Path, tmp_path: Path) -> None:
    process = start(text, tmp_path / "out")
    work = tmp_path / ".out.partial" / "parts"
    while not list(work.glob("*.npz")) and process.poll() is None:
        time.sleep(0.005)
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 2 and "a worker process was killed" in output and "Traceback" not in output, output
    finished(start(text, tmp_path / "out"))
    verify.verify(tmp_path / "out")


def test_object_storage(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(arguments(text, tmp_path / "local", 1)) == 0
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    remote = [*arguments(text, "s3://bucket/sets/mine", 1), "--scratch", str(tmp_path / "scratch")]
    with object_server(tmp_path / "served") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("data_prep.upload.TRIES", 1)
        sent = tmp_path / "served" / "bucket" / "sets" / "mine"
        keep = _fail_after(server, 2, monkeypatch)
        with pytest.raises(UserError, match="what has arrived is not sent again"):
            prepare.main(remote)
        assert not (sent / "manifest.json").exists()  # so that nobody takes it for a pack
        keep()
        before = len(server.requests)
        assert prepare.main(remote) == 0
        puts = [line for line in server.requests[before:] if line.startswith("PUT")]
        assert puts[-1].endswith("manifest.json") and len(puts) == len(tree(tmp_path / "local")) - 2
        assert tree(sent) == tree(tmp_path / "local")
        assert list((tmp_path / "scratch").iterdir()) == []
        assert prepare.main(remote) == 0 and "nothing to do" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"another length.*--overwrite"):
            prepare.main([*remote, "--length", "64"])
        longer = [*remote, "--length", "64", "--overwrite"]
        keep = _fail_after(server, 3, monkeypatch)
        with pytest.raises(UserError, match="what has arrived is not sent again"):
            prepare.main(longer)
        keep()
        with pytest.raises(UserError, match="unfinished"):  # half of one, half of the other
            read_manifest(sent)
        assert prepare.main(longer) == 0
        assert open_pack(sent).manifest.length == 64
        assert (
            open_pack(sent).all_tokens().ravel().tolist()[:64]
            == open_pack(tmp_path / "local").all_tokens(2).ravel().tolist()
        )
        with pytest.raises(UserError, match="cannot be reached or refuses"):
            prepare.main([*arguments(text, "s3://nobody/sets", 1), "--scratch", str(tmp_path / "scratch")])


def _fail_after(server, files: int, monkeypatch: pytest.MonkeyPatch):
    """Let so many files be put, and have the storage refuse all others; returns what ends that."""
    from streaming.base.storage import S3Uploader

    put = S3Uploader.upload_file
    arrived: list[str] = []

    def upload(self, name):
        if len(arrived) == files:
            server.fail_next(1_000_000)
        put(self, name)
        arrived.append(name)

    monkeypatch.setattr(S3Uploader, "upload_file", upload)

    def end() -> None:
        server.fail_next(0)
        monkeypatch.setattr(S3Uploader, "upload_file", put)

    return end
