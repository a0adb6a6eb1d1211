"""Two hosts on one machine: namespaces of network, processes, names and shared memory, and an sshd in each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.launch import wait_until

ADDRESSES = ("10.91.7.1", "10.91.7.2")
_TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pdsh")

# The hosts share a kernel and a file system; everything else that ranks could meet each other by is apart.
# Compiled operators are copied: their locks are found to be held by looking into /proc, which is each host's own.
_HOST = (
    "mount -t tmpfs tmpfs /dev/shm && cp -a {operators} /dev/shm/operators && hostname {name} && "
    "mkdir -p /run/sshd && exec {sshd} -D -e -f {config}"
)


def _operators(directory: Path) -> Path:
    """A directory with what this machine has compiled of DeepSpeed's collectives; nothing is compiled twice."""
    default = Path.home() / ".cache/torch_extensions"
    copies = directory / "operators"
    copies.mkdir()
    for place in Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)).rglob("deepspeed_shm_comm"):
        shutil.copytree(place, copies / place.name, ignore=shutil.ignore_patterns("lock"), dirs_exist_ok=True)
    return copies


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin")


def why_not() -> str | None:
    """What two hosts would need and this machine lacks."""
    missing = [name for name in _TOOLS if _tool(name) is None]
    if os.geteuid() != 0 or missing:
        return f"needs root{' and ' + ', '.join(missing) if missing else ''}"
    with _namespaces() as names:
        return None if names else "network namespaces cannot be made here"


@dataclass(frozen=True)
class TwoHosts:
    """`start` runs a command on the first host; `cut` and `mend` the cable between the two."""

    names: tuple[str, str]
    directory: Path
    daemons: list[subprocess.Popen[bytes]]

    @property
    def hostfile(self) -> Path:
        return self.directory / "hostfile"

    def start(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """A process in the first host's namespaces, whose ssh knows the test's keys."""
        path = os.pathsep.join(map(str, (self.directory, Path(sys.executable).parent, os.environ["PATH"])))
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ENV_FILE": str(self.directory / "deepspeed_env")}
        inside = ["nsenter", f"--target={self._init(0)}", "--net", "--pid", "--mount", "--uts", f"--wd={os.getcwd()}"]
        return subprocess.Popen([*inside, *command], env=env, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload,no-any-return]

    def cut(self) -> None:
        """No packet passes from now on; nobody is told."""
        self._link("down")

    def mend(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.names[1], "link", "set", "eth0", state], check=True)

    def _init(self, host: int) -> int:
        """The host's first process, as this machine numbers it."""
        pid = self.daemons[host].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def ranks(self) -> list[int]:
        """Processes of trainers on both hosts, as this machine numbers them."""
        found = []
        spaces = {os.readlink(f"/proc/{self._init(host)}/ns/pid") for host in (0, 1)}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                ours = os.readlink(entry / "ns/pid") in spaces
                if ours and b"--local_rank=" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found


@contextmanager
def two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """Both hosts up and reachable; every process and namespace of theirs is gone afterwards."""
    directory.mkdir()
    config, operators = _write_ssh(directory), _operators(directory)
    daemons: list[subprocess.Popen[bytes]] = []
    with _namespaces() as names, (directory / "sshd.log").open("wb") as log:
        assert names, "network namespaces cannot be made here"
        try:
            for name in names:
                script = _HOST.format(operators=operators, name=name, sshd=_tool("sshd"), config=config)
                own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
                command = ["ip", "netns", "exec", name, *own, "sh", "-c", script]
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            ssh = str(directory / "ssh")
            for name, address in zip(names, ADDRESSES, strict=True):
                command = ["ip", "netns", "exec", name, ssh, address, "true"]
                wait_until(lambda c=command: subprocess.run(c, capture_output=True).returncode == 0, 30, "sshd")  # type: ignore[misc]
            yield TwoHosts(names, directory, daemons)
        finally:
            for daemon in daemons:  # unshare takes its host's first process with it, and the kernel all the others
                with suppress(ProcessLookupError):
                    os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


@contextmanager
def _namespaces() -> Iterator[tuple[str, str] | None]:
    """Two network namespaces with a cable between them; None where the kernel allows none."""
    names = (f"bd3-{os.getpid()}-0", f"bd3-{os.getpid()}-1")
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
    for name, address in zip(names, ADDRESSES, strict=True):
        commands += [f"-n {name} addr add {address}/24 dev eth0"]
        commands += [f"-n {name} link set lo up", f"-n {name} link set eth0 up"]
    try:
        made = all(subprocess.run(["ip", *words.split()], capture_output=True).returncode == 0 for words in commands)
        yield names if made else None
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _write_ssh(directory: Path) -> Path:
    """Throwaway keys, the daemon's configuration, and an `ssh` that uses them; returns the daemon's configuration."""
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)], check=True)
    daemon, client, wrapper = (directory / name for name in ("sshd_config", "ssh_config", "ssh"))
    daemon.write_text(
        f"HostKey {directory}/host_key\nAuthorizedKeysFile {directory}/user_key.pub\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    client.write_text(
        f"IdentityFile {directory}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile /dev/null\n"
        "StrictHostKeyChecking no\nLogLevel ERROR\nConnectTimeout 5\nServerAliveInterval 3\nServerAliveCountMax 3\n"
    )
    wrapper.write_text(f'#!/bin/sh\nexec {_tool("ssh")} -F {client} "$@"\n')
    wrapper.chmod(0o755)
    (directory / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    (directory / "deepspeed_env").write_text(
        "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nTORCH_EXTENSIONS_DIR=/dev/shm/operators\n"
        f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}\n"  # another ninja would compile everything again
    )
    return daemon
