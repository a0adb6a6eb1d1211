"""Damaged shards, remotes that fail, full disks and killed runs: reading recovers, or ends with one sentence."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from bd3_ds.data.remote import pack_directory
from bd3_ds.data.shared_memory import clear_stale
from bd3_ds.runtime.errors import UserError
from tests.helpers.launch import curve, launch_training, start_training, stop, train, wait_for_step
from tests.helpers.readers import Cluster, data_config, numbered_pack, read
from tests.helpers.s3_server import ObjectServer, object_server
from tests.helpers.tiny import tiny_run

STEPS = 8  # one pass over 64 chunks in 4 shards
WORKERS = pytest.mark.parametrize("workers", [0, 2])
# Each kind of fault is quick over one protocol and in one pattern of workers; what only repeats it elsewhere is slow.
REMOTES = pytest.mark.parametrize(
    ("protocol", "workers"), [("http", 0), ("http", 2), ("s3", 2), pytest.param("s3", 0, marks=pytest.mark.slow)]
)
WORKERS_ARE_ENOUGH = pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_pack(tmp_path_factory.mktemp("sound") / "pack", 64)


@pytest.fixture(scope="module")
def expected(pack: Path) -> np.ndarray:
    return read(data_config(pack), Cluster(), 0, STEPS)


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged, without what reading has unpacked; tmp_path/bucket/pack."""
    return shutil.copytree(pack, tmp_path / "bucket" / "pack", ignore=shutil.ignore_patterns("*.mds"))


@pytest.fixture
def server(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    with object_server(copy.parents[1]) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("bd3_ds.data.remote.PAUSES", (0.01, 0.02))
        yield running


@pytest.fixture
def hub(copy: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the pack on a hub of Hugging Face's kind."""
    place = copy.parents[1] / "datasets/owner/name/resolve/main"
    place.parent.mkdir(parents=True)
    place.symlink_to(copy.parent)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return "hf://datasets/owner/name/pack"


def address(server: ObjectServer, protocol: str) -> str:
    return "s3://bucket/pack" if protocol == "s3" else f"{server.url}/bucket/pack"


def damage(directory: Path, how: str) -> str:
    """Do it to the third shard; returns its name."""
    shard = directory / "00002/shard.00000.mds.zstd"
    content = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        shard.write_bytes({"truncated": content[:-9], "flipped": flipped}[how])
    return shard.relative_to(directory).as_posix()


SAYS = {"missing": "is missing", "truncated": r"has \d+ bytes instead of \d+", "flipped": "does not match its hash"}


@WORKERS
@pytest.mark.parametrize("how", SAYS)
def test_damaged_shard_ends_with_its_name(copy, how, workers):
    name = damage(copy, how)
    with pytest.raises(UserError) as caught:
        read(data_config(copy), Cluster(1, workers), 0, STEPS)
    (message,) = caught.value.messages
    assert re.search(f"data pack '{copy}' is damaged: shard {name} {SAYS[how]}; `python -m data_prep.verify", message)
    assert "copy that shard anew" in message and "\n" not in message


@WORKERS
def test_unpacked_shard_with_a_flipped_byte_is_made_again(copy, expected, workers, capfd):
    read(data_config(copy), Cluster(), 0, STEPS)  # it has unpacked all shards
    plain = copy / "00001/shard.00000.mds"
    content = plain.read_bytes()
    plain.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert np.array_equal(read(data_config(copy), Cluster(1, workers), 0, STEPS), expected)
    assert f"{plain} does not match its hash; making it again" in capfd.readouterr().err
    assert plain.read_bytes() == content


@pytest.mark.parametrize("damaged", [None, "{", '{"version": 2}', '{"version": 3, "shards": []}'])
def test_index_missing_or_damaged(copy, damaged):
    (copy / "index.json").unlink()
    if damaged is not None:
        (copy / "index.json").write_text(damaged)
    with pytest.raises(UserError, match=f"data pack index.*{copy}/index.json"):
        read(data_config(copy), Cluster(), 0, 1)


@REMOTES
def test_remote_pack_is_the_local_one(server, expected, tmp_path, protocol, workers, monkeypatch):
    """Read by two ranks that are killed on the way, in one cache, and in the end without the remote.

    What they leave in shared memory would tell streaming that the cache is in use, once its locks have been swept.
    """
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(locks))
    data = data_config(address(server, protocol), cache=str(tmp_path / "cache"))
    for begin, end in ((0, 3), (3, STEPS)):
        found = read(data, Cluster(2, workers), begin, end - begin)
        assert np.array_equal(found, expected[begin:end])
        for lock in locks.glob("*_filelock"):
            lock.unlink()
    assert len([line for line in server.requests if line.startswith("GET") and line.endswith(".zstd")]) == 4
    server.fail_next(1000)
    assert np.array_equal(read(data, Cluster(2, workers), 0, STEPS), expected)


@WORKERS
def test_pack_on_a_hub(hub, server, expected, tmp_path, workers):
    data = data_config(hub, cache=str(tmp_path / "cache"))
    assert np.array_equal(read(data, Cluster(1, workers), 0, STEPS), expected)
    assert any("datasets/owner/name/resolve/main/pack/00003/shard" in line for line in server.requests)
    with pytest.raises(UserError, match=r"'hf://datasets/owner/name/none' is not a data pack: it has no index\.json"):
        read(data_config(hub.replace("/pack", "/none"), cache=str(tmp_path / "cache")), Cluster(), 0, 1)


@pytest.mark.parametrize(
    ("protocol", "status"),
    [
        *(("http", status) for status in (503, 500, 429, 0)),
        *(("s3", status) for status in (503, 0)),
        *(pytest.param("s3", status, marks=pytest.mark.slow) for status in (500, 429)),  # boto3's own long pauses
    ],
)
def test_failing_remote_is_asked_again(server, expected, tmp_path, protocol, status, capfd):
    """From the first file on and again in the shards; status 0 cuts a body in the middle."""
    data = data_config(address(server, protocol), cache=str(tmp_path / "cache"))
    server.fail_next(2, status)
    assert np.array_equal(read(data, Cluster(), 0, 1), expected[:1])
    server.fail_next(2 if protocol == "http" else 12, status)  # boto3 asks several times itself
    assert np.array_equal(read(data, Cluster(1, 2), 0, STEPS), expected)
    if protocol == "http":
        assert "could not be fetched" in (said := capfd.readouterr().err) and "trying again in 0 s" in said


@REMOTES
def test_remote_gone_for_good(server, tmp_path, protocol, workers):
    data = data_config(address(server, protocol), cache=str(tmp_path / "cache"), predownload=1)
    with (
        mock.patch("bd3_ds.data.remote.PAUSES", ()),
        pytest.raises(UserError, match="could not be fetched in 1 attempts"),
    ):
        server.fail_next(10_000)
        read(data, Cluster(), 0, 1)
    server.fail_next(0)
    read(data, Cluster(), 0, 1)
    for plain in pack_directory(data.train, data.cache).rglob("*.mds"):
        plain.unlink()
    server.fail_next(10_000)
    with pytest.raises(
        UserError, match=r"shard.00000.mds.zstd' could not be fetched in 3 attempts \(.+\); when the address"
    ):
        read(data, Cluster(1, workers), 0, STEPS)


@pytest.mark.parametrize(
    ("protocol", "how"),
    [
        *(("http", how) for how in SAYS),
        ("s3", "flipped"),
        *(pytest.param("s3", how, marks=pytest.mark.slow) for how in ("missing", "truncated")),
    ],
)
def test_damaged_remote_shard(server, copy, tmp_path, protocol, how):
    name = damage(copy, how)
    with pytest.raises(UserError, match=f"pack' is damaged: shard {name} {SAYS[how]}.*copy that shard anew"):
        read(data_config(address(server, protocol), cache=str(tmp_path / "cache")), Cluster(1, 2), 0, STEPS)


def test_no_pack_there_and_a_changed_one(server, copy, tmp_path):
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"bucket/nothing' is not a data pack: it has no index\.json"):
        read(data_config(f"{server.url}/bucket/nothing", cache=cache), Cluster(), 0, 1)
    data = data_config(f"{server.url}/bucket/pack", cache=cache)
    read(data, Cluster(), 0, 1)
    numbered_pack(copy, 48)
    with pytest.raises(UserError, match=r"keeps parts of another, .* remove that directory"):
        read(data, Cluster(), 0, 1)
    numbered_pack(copy, 64, to_a_shard=8)  # the same tokens, so the same pack hash
    with pytest.raises(UserError, match=r"was replaced: .* in other shards; remove that directory"):
        read(data, Cluster(), 0, 1)


@WORKERS_ARE_ENOUGH
def test_cache_limit_evicts_and_order_stays(server, copy, tmp_path, workers):
    shards, steps = 16, 200
    local = numbered_pack(copy.with_name("larger"), 100 * shards, to_a_shard=100)
    order = {"shuffle_algorithm": "py1s"}  # shard by shard
    expected = read(data_config(local, **order), Cluster(), 0, steps)
    largest = max(path.stat().st_size for path in local.rglob("*.mds"))
    limit = 8 * largest + (local / "index.json").stat().st_size
    data = data_config(
        f"{server.url}/bucket/larger", cache=str(tmp_path / "cache"), predownload=8, cache_limit=f"{limit}b", **order
    )
    assert np.array_equal(read(data, Cluster(2, workers), 0, steps), expected)
    kept = list(pack_directory(data.train, data.cache).rglob("*.mds"))
    assert 0 < len(kept) <= 8 < len({line for line in server.requests if line.endswith(".zstd")}) == shards


def test_two_runs_do_not_share_a_cache(server, tmp_path):
    """The first goes on, the second ends with a sentence; local packs are shared."""
    data = data_config(f"{server.url}/bucket/pack", cache=str(tmp_path / "cache"))
    script = (
        "import sys; from tests.helpers.readers import *\n"
        f"loader = open_loader(data_config({data.train!r}, cache={data.cache!r}), Share(0, 1, 1, 1, 8))\n"
        "batches = iter(loader); next(batches); print('reading', flush=True)\n"
        "sys.stdin.readline(); next(batches); print('still reading', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "reading\n"
        with (
            mock.patch("bd3_ds.data.shared_memory.PATIENCE", 0.5),
            pytest.raises(UserError, match="in use by another run"),
        ):
            read(data, Cluster(), 0, 1)
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "still reading\n"
        first.kill()
    clear_stale([str(pack_directory(data.train, data.cache))])  # raises nothing: the killed run is gone
    read(data, Cluster(), 0, 1)


@WORKERS_ARE_ENOUGH
def test_full_disk(tmp_path, workers):
    """In a file system of 700 KiB of its own."""
    numbered_pack(tmp_path / "bucket/pack", 4000, to_a_shard=1000)
    cache = tmp_path / "cache"
    cache.mkdir()
    script = (
        "import sys; from tests.helpers.readers import *\n"
        "try:\n"
        f"    read(data_config(sys.argv[1], cache={str(cache)!r}), Cluster(1, {workers}), 0, 500)\n"
        "except UserError as error: print(error)\n"
    )
    mount = f'mount -t tmpfs -o size=420k none {cache} && exec {sys.executable} -c "$0" "$1"'
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file systems may be mounted here")
    with object_server(tmp_path) as server:
        command = ["unshare", "-rm", "sh", "-c", mount, script, f"{server.url}/bucket/pack"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "No space left on device; free some space, lower data.cache_limit, or name another directory" in done.stdout
    assert done.stdout.count("\n") == 1 and str(cache) in done.stdout, done.stdout + done.stderr


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of last change of all that is in a directory, the directories too."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [directory, *directory.rglob("*")]}


@WORKERS_ARE_ENOUGH
def test_a_pack_on_a_read_only_mount_is_unpacked_in_the_cache(copy, expected, tmp_path, workers):
    cache = tmp_path / "cache"
    script = (
        "import sys; from tests.helpers.readers import *\n"
        f"data = data_config(sys.argv[1], cache={str(cache)!r})\n"
        f"for _ in range(2): np.save(sys.argv[2], read(data, Cluster(1, {workers}), 0, {STEPS}))\n"
    )
    mount = f'mount --bind {copy} {copy} && mount -o remount,bind,ro {copy} && exec {sys.executable} -c "$0" "$@"'
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file systems may be mounted here")
    before = listing(copy)
    command = ["unshare", "-rm", "sh", "-c", mount, script, str(copy), str(tmp_path / "read.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.array_equal(np.load(tmp_path / "read.npy"), expected)
    assert listing(copy) == before
    assert done.stderr.count(f"{copy} cannot be written to: its shards are unpacked in {cache}/pack-") == 1, done.stderr
    assert len(list(cache.rglob("*.mds"))) == 4 and not list(cache.rglob(".*.mds*"))


def test_a_cache_of_links_reads_like_the_pack_and_leaves_it_alone(copy, expected, tmp_path, monkeypatch):
    """As on a read-only mount, where none can be made."""
    monkeypatch.setattr("bd3_ds.data.read_only.can_unpack_in", lambda _: False)
    before, data = listing(copy), data_config(copy, cache=str(tmp_path / "cache"))
    assert np.array_equal(read(data, Cluster(), 0, STEPS), expected)
    # What was unpacked there is checked like any other, and a pack that was made again is not taken for the old one.
    unpacked = sorted((tmp_path / "cache").rglob("*.mds"))
    unpacked[0].write_bytes(unpacked[0].read_bytes()[:-1] + b"?")
    assert np.array_equal(read(data, Cluster(2, 0), 0, STEPS), expected)
    assert listing(copy) == before
    shutil.rmtree(copy)
    numbered_pack(copy, 64, mark=1)
    assert np.array_equal(read(data, Cluster(), 0, STEPS), expected + 10_000)


def test_neither_pack_nor_cache_can_be_written_to(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("bd3_ds.data.read_only.can_unpack_in", lambda _: False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"cannot be written to, and neither can data\.cache=.*/file/cache .*local disk"
    ):
        read(data_config(copy, cache=str(tmp_path / "file" / "cache")), Cluster(), 0, 1)


@pytest.mark.slow
@WORKERS
def test_training_ends_with_one_sentence_and_code_2(tmp_path, workers):
    """Both ranks meet the shard, under the launcher; one says so."""
    tiny_run(tmp_path)
    shard = next((tmp_path / "train").rglob("*.zstd"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    done = launch_training(tmp_path / "recipe.yaml", f"data.workers={workers}", timeout=120)
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "does not match its hash" in errors[0], done.stdout
    assert "Traceback" not in done.stdout and done.returncode == 2, done.stdout


@pytest.mark.slow
def test_kill_9_of_training_from_a_remote_pack(tmp_path):
    """All processes of the run die at once; the same command then ends as a run from the local pack does."""
    tiny_run(tmp_path)
    steps = ("train.total_steps=12", "train.checkpoint_every=1", "train.export_every=100", "train.global_batch=8")
    train(tmp_path / "recipe.yaml", f"run_dir={tmp_path / 'calm'}", *steps)
    with object_server(tmp_path) as server:
        words = (f"data.train={server.url}/train", f"data.cache={tmp_path / 'cache'}", "data.workers=2", *steps)
        with start_training(tmp_path / "recipe.yaml", *words) as process:
            wait_for_step(tmp_path / "run", 3, process)
            stop(process, signal.SIGKILL)
        server.fail_next(1)
        assert "continuing" in train(tmp_path / "recipe.yaml", *words)
    assert curve(tmp_path / "run") == curve(tmp_path / "calm")
    assert f"train: {server.url}/train" in (tmp_path / "run/run.yaml").read_text()
    assert len(list((tmp_path / "run/exports").glob("*/tokenizer/*"))) == 1
