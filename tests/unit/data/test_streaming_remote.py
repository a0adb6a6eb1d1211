"""What a run makes of addresses, sizes and shares, which failures it waits out, and what it counts as left behind."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import urllib.error
from email.message import Message
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import run as entry
from bd3_ds.config.check_data import size_in_bytes
from bd3_ds.config.load import to_yaml
from bd3_ds.data import shared_memory
from bd3_ds.data.mixture import samples_of_epoch
from bd3_ds.data.remote import Missing, Refused, pack_directory, patiently
from bd3_ds.data.share import Share
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.train.preflight import preflight
from tests.helpers.readers import data_config, numbered_pack, open_loader
from tests.helpers.s3_server import object_server
from tests.helpers.tiny import LENGTH, tiny_run

DATA = data_config("prose")


def test_sizes():
    assert [size_in_bytes(text) for text in ("100gb", "1.5 MB", "77b", "12")] == [100 * 2**30, 1.5 * 2**20, 77, 12]
    assert [size_in_bytes(text) for text in ("", "gb", "-1gb", "1xb", "1 2gb")] == [None] * 5


@settings(deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 0.3), max_size=3),
    chunks=st.lists(st.integers(100, 10**7), min_size=4, max_size=4),
)
def test_shares_of_an_epoch(shares, chunks):
    data = dataclasses.replace(DATA, mix={f"pack-{i}": share for i, share in enumerate(shares)})
    counts = samples_of_epoch(data, chunks)
    assert counts[0] == chunks[0]
    for count, share in zip(counts[1:], shares, strict=True):
        assert abs(count / sum(counts) - share) < 2 / sum(counts) + 1e-9


def test_every_address_has_a_directory_of_its_own():
    places = [pack_directory(pack, "/c") for pack in ("s3://a/train", "s3://b/train", "https://a/train/")]
    assert len(set(places)) == 3 and all(place.parent == Path("/c") for place in places)
    assert pack_directory("https://a/train", "/c") == places[2] and places[2].name.startswith("train-")
    assert pack_directory("data/train", "/c") == Path("data/train")


def http_error(status: int) -> Exception:
    return urllib.error.HTTPError("http://x", status, "no", Message(), None)


@pytest.mark.parametrize("error", [http_error(503), http_error(429), ConnectionResetError("gone"), TimeoutError()])
def test_failures_that_pass_are_waited_out(error, monkeypatch, capsys):
    monkeypatch.setattr("bd3_ds.data.remote.PAUSES", (0.0, 0.0))
    answers = [error, error, None]

    def fetch() -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    patiently(fetch, "x/shard", "/cache")
    assert answers == [] and capsys.readouterr().err.count("x/shard could not be fetched") == 2
    answers = [error] * 3
    with pytest.raises(UserError, match=r"'x/shard' could not be fetched in 3 attempts .* the same command continues"):
        patiently(fetch, "x/shard", "/cache")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (http_error(404), Missing, "'x/shard' is not there"),
        (FileNotFoundError("x"), Missing, "'x/shard' is not there"),
        (http_error(403), Refused, "is refused .* see that this machine may read it"),
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "cannot write x/shard to /cache: No space left"),
        (OSError(errno.EACCES, "Permission denied"), UserError, "Permission denied; make it writable, or name another"),
    ],
)
def test_failures_that_stay_are_said_at_once(error, kind, says):
    with pytest.raises(kind, match=says):
        patiently(lambda: (_ for _ in ()).throw(error), "x/shard", "/cache")


@settings(deadline=None)  # the first example imports streaming
@given(
    nodes=st.sampled_from([1, 2, 4]), local=st.sampled_from([1, 2, 3, 4, 8]), replicas=st.sampled_from([1, 2, 3, 4, 8])
)
def test_replicas_stand_where_streaming_puts_them(nodes, local, replicas):
    import_streaming()
    from streaming.base.world import World

    world = nodes * local
    if world % replicas:
        return
    seen = []
    for rank in range(world):
        share = Share(rank, world, local, 2, 2 * world // replicas, replicas)
        theirs = World(nodes, local, 1, rank).replicate(replicas)
        assert share.nodes == theirs.num_nodes and share.accumulation == 1
        first = theirs.rank_of_node * theirs.num_nodes + theirs.node
        assert share.slots(0).tolist() == [first, first + theirs.num_ranks]
        seen += share.slots(0).tolist()
    assert sorted(seen) == sorted([*range(2 * world // replicas)] * replicas)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_padding_is_told_from_text(tmp_path, pads, apart):
    data = data_config(numbered_pack(tmp_path / "pack", 8, pads=pads), document_mask=apart)
    documents = next(iter(open_loader(data, Share(0, 1, 1, 2, 2)))).documents
    if not pads and not apart:
        assert documents is None
        return
    expected = np.repeat([1, 2] if apart else [0, 0], [5, LENGTH - 5])
    expected[LENGTH - 4 :] = -1 if pads else expected[-1]
    assert documents is not None and documents.tolist() == [expected.tolist()] * 2


def test_shard_of_a_loader_process_that_was_ended_is_taken_up(tmp_path):
    """It has said that it is at work on the shard; others would wait for it."""
    loader = open_loader(data_config(numbered_pack(tmp_path / "pack", 8), shuffle=False), Share(0, 1, 1, 2, 2))
    loader.dataset._shard_states[0] = 2  # streaming's PREPARING
    loader.dataset._at_work.add(0)
    loader.dataset.give_up()
    assert [next(iter(loader)).tokens[i, 1].item() for i in range(2)] == [0, 1]


def test_pack_that_cannot_be_unpacked_where_it_is(tmp_path):
    pack = numbered_pack(tmp_path / "pack", 8)
    (pack / "00000/shard.00000.mds").mkdir()  # permissions would not stop root
    with pytest.raises(UserError, match=r"shard 00000/shard.+ cannot be (unpacked|read).+Is a directory"):
        next(iter(open_loader(data_config(pack), Share(0, 1, 1, 2, 2))))


def test_temporaries_are_swept_when_nobody_can_be_writing_them(tmp_path):
    """Whoever writes may be a process that is not seen from here, so a fresh one stays."""
    pack = numbered_pack(tmp_path / "pack", 8)
    fresh, old = (pack / f"00000/.shard.00000.mds.{name}" for name in ("fresh", "old"))
    for path in (fresh, old):
        path.touch()
    os.utime(old, (0, 0))
    open_loader(data_config(pack), Share(0, 1, 1, 2, 2))
    assert fresh.exists() and not old.exists()


def test_shard_that_another_process_was_faster_with(tmp_path):
    import_streaming()
    from bd3_ds.data.checked_stream import _put

    (tmp_path / "shard").write_bytes(b"theirs")
    _put(tmp_path / ".shard.swept", tmp_path / "shard")
    with pytest.raises(FileNotFoundError):
        _put(tmp_path / ".shard.swept", tmp_path / "other")


def test_mixed_packs_of_a_run_may_move_and_their_shares_stay(tmp_path):
    run = tiny_run(tmp_path, f"data.mix={{{tmp_path / 'valid'}: 0.2}}")
    Path(run.run_dir).mkdir()
    (Path(run.run_dir) / "run.yaml").write_text(to_yaml(run))
    place = shutil.copytree(tmp_path / "valid", tmp_path / "moved")
    preflight(tiny_run(tmp_path, f"data.mix={{{place}: 0.2}}"), 1)
    with pytest.raises(UserError, match=r"data\.mix was .* set it back"):
        preflight(tiny_run(tmp_path, f"data.mix={{{place}: 0.3}}"), 1)


def test_preflight_of_a_remote_pack(tmp_path, capsys):
    """`check` reads its facts from the address; they are then in data.cache, and no shard is."""
    tiny_run(tmp_path)
    with object_server(tmp_path) as server:
        words = [f"data.train={server.url}/train", f"data.cache={tmp_path / 'cache'}", "objective.frequency.power=0.1"]
        assert run_command(entry.main, ["check", str(tmp_path / "recipe.yaml"), "--resolved", *words]) == 0
        assert f"train: {server.url}/train" in capsys.readouterr().out
        assert not [line for line in server.requests if "shard" in line]
        assert run_command(entry.main, ["check", str(tmp_path / "recipe.yaml"), *words, "data.cache_limit=2kb"]) == 2
        assert "data.cache_limit=2kb is less than four times the largest shard" in capsys.readouterr().err
        assert run_command(entry.main, ["check", str(tmp_path / "recipe.yaml"), *words, "data.length=8"]) == 2
    assert "packed with length 16" in capsys.readouterr().err


@pytest.fixture
def number() -> str:
    """A number that no dataset has."""
    return f"{900_000 + os.getpid() % 100_000:06}"


def segment(number: str, name: str) -> Path:
    """Put a segment there that nobody maps."""
    memory = SharedMemory(f"{number}_{name}", create=True, size=64)
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    memory.close()
    return Path("/dev/shm", f"{number}_{name}")


def test_segments_and_locks_of_no_process_are_removed(number, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock, other = tmp_path / f"{number}_cache_filelock", tmp_path / f"{number}_notes"
    lock.touch()
    other.touch()
    left = [segment(number, name) for name in ("locals", "barrier", "shard_states")]
    foreign = segment(number, "not_streamings")
    shared_memory.clear_stale([])
    assert not lock.exists() and not any(path.exists() for path in left)
    assert other.exists() and foreign.exists()
    foreign.unlink()


def test_what_another_run_makes_meanwhile_stays(number, tmp_path, monkeypatch):
    """Its segments come after the look at who maps what, which so says nothing of them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = []
    look = shared_memory._mapped_numbers

    def look_then_start():
        yield from look()
        made.append(segment(number, "locals"))

    monkeypatch.setattr(shared_memory, "_mapped_numbers", look_then_start)
    shared_memory.clear_stale([])
    assert made[0].exists()
    made[0].unlink()


def test_what_a_process_maps_or_holds_stays(number, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory, "PATIENCE", 0.1)
    lock = tmp_path / f"{number}_barrier_filelock"
    lock.touch()
    registry, states = segment(number, "locals"), segment(number, "shard_states")
    text = f"/cache/pack\0{int(number)}".encode()
    registry.write_bytes(np.int32(4 + len(text)).tobytes() + text)
    script = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); kept = mmap.mmap(file.fileno(), 0); file.close();"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(states)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match="/cache/pack is in use by another run"):
            shared_memory.clear_stale(["/cache/pack"])
        process.kill()
    assert registry.exists() and states.exists() and lock.exists()

    with registry.open("rb") as held:  # as a run in another container does, whose maps cannot be seen
        fcntl.flock(held, fcntl.LOCK_SH)
        shared_memory.clear_stale(["/cache/other"])
        assert registry.exists() and states.exists()
    shared_memory.clear_stale(["/cache/pack"])
    assert not registry.exists() and not states.exists() and not lock.exists()
