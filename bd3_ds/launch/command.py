"""`run.py launch [--restarts N] [--hostfile FILE] RECIPE [--deepspeed_config JSON] [key=value …]`"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from bd3_ds.config.ds_json import DEFAULT
from bd3_ds.config.load import load_recipe
from bd3_ds.config.schema import AUTO, RunConfig
from bd3_ds.launch.plan import Host, Plan, explain, make_plan, read_hostfile
from bd3_ds.launch.processes import LOCAL, answering, ranks_on
from bd3_ds.launch.supervisor import RunProgress, Supervisor
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.resources import ROOT
from bd3_ds.runtime.slurm import PORTS

MICRO_BATCH = "train.micro_batch"
# Else ssh waits for a lost host until the kernel gives up, a quarter of an hour later.
_NOTICE_LOSS = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"


# At `error` the launcher calls a run that stopped as it was asked (code 75) failed; how it ended the supervisor says.
_QUIET = ("--log_level", "critical")


class DeepSpeedLaunch:
    """`deepspeed … --module bd3_ds train …` on a plan's ranks, in a session that a terminal's Ctrl-C does not reach."""

    def __init__(self, plan: Plan, launcher: list[str], words: list[str], remote: bool):
        self._plan = plan
        self._port = free_port()
        tools = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        env.setdefault("OMP_NUM_THREADS", "1")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        if not has_gpus():
            env.setdefault("DS_ACCELERATOR", "cpu")  # the launcher then need not warn that it found nothing better
        env["PDSH_SSH_ARGS_APPEND"] = f"{env.get('PDSH_SSH_ARGS_APPEND', '')} {_NOTICE_LOSS}".strip()
        command = [str(tools / "deepspeed"), *_QUIET, "--master_port", str(self._port), *launcher]
        if remote:
            with tempfile.NamedTemporaryFile("w", prefix="bd3-hosts-", delete=False) as file:
                file.writelines(f"{host} slots={plan.per_host}\n" for host in plan.hosts)
            atexit.register(os.unlink, file.name)
            command += ["--hostfile", file.name, "--force_multi"]  # the one host left need not be this one
            if re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:]*", plan.hosts[0]):
                command += ["--master_addr", plan.hosts[0]]
        else:
            command += ["--hostfile", os.devnull, "--num_accelerators", str(plan.ranks)]
        # In the caller's directory, on every host: relative paths of recipes and command lines are the caller's.
        command += ["--module", "bd3_ds", "train", *planned(words, plan)]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def signal(self, number: int) -> bool:
        """Signal the ranks themselves; False while not all of them are there yet."""
        there = ranks_on(self._plan.hosts, self._port)
        if sum(len(ranks or []) for ranks in there.values()) < self._plan.ranks and self.process.poll() is None:
            return False
        ranks_on(self._plan.hosts, self._port, number)
        return True

    def alive(self) -> bool:
        """Whether a rank runs on any host that answers."""
        return any(ranks_on(self._plan.hosts, self._port).values())


def planned(words: list[str], plan: Plan) -> list[str]:
    """The words of a run with the plan's micro-batch in place of the user's."""
    number = "auto" if plan.micro_batch == AUTO else plan.micro_batch
    return [word for word in words if not word.startswith(f"{MICRO_BATCH}=")] + [f"{MICRO_BATCH}={number}"]


def free_port() -> int:
    """A port of PORTS at which nobody on this host listens; on others it may be taken: the next start has another."""
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise UserError(f"no port of {PORTS.start} … {PORTS.stop - 1} is free; end what listens there")


def has_gpus() -> bool:
    """Whether torch sees a GPU here; hosts of one run are alike."""
    import torch

    return bool(torch.cuda.is_available())


def this_host(ranks: int | None) -> Host:
    """This machine with its visible accelerators, or 2 ranks where it has none."""
    import torch

    return Host(LOCAL, ranks or torch.cuda.device_count() or 2)


def main(argv: list[str]) -> int:
    """Supervise a run to its end; the exit codes are run.py's."""
    parser = Parser(prog="run.py launch", description="Train on one host or many; start again what fails.")
    parser.add_argument("recipe", help="YAML file, such as configs/recipes/docs_pretrain.yaml")
    parser.add_argument("--hostfile", type=Path, help="'name slots=N' lines; absent: this machine alone")
    parser.add_argument("--ranks", type=at_least_one, help="of this machine, at most; absent: its accelerators, or 2")
    parser.add_argument("--restarts", type=int, default=0, help="at most, without a newer checkpoint between them")
    parser.add_argument("--backoff", type=float, default=5.0, help="seconds before the first restart; it doubles")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT, help="memory and communication (ds_configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration on top of the recipe")
    options = parser.parse(argv)
    if options.restarts < 0 or options.backoff < 0:
        raise UserError(f"--restarts {options.restarts} and --backoff {options.backoff:g} must not be below 0")
    if options.hostfile and options.ranks:
        raise UserError("--ranks is for this machine alone; the slots of --hostfile say how many ranks a host has")

    run = load_recipe(options.recipe, options.overrides)
    words = [options.recipe, *options.overrides, "--deepspeed_config", str(options.deepspeed_config)]
    hosts = read_hostfile(options.hostfile) if options.hostfile else [this_host(options.ranks)]
    if make_plan(run, hosts) is None:
        raise UserError(
            f"train.sequence_parallel={run.train.sequence_parallel} and train.global_batch={run.train.global_batch} "
            f"fit no number of ranks up to {sum(host.slots for host in hosts)}; lower the one or change the other"
        )

    def start() -> DeepSpeedLaunch | None:
        return start_once(run, hosts, words, remote=options.hostfile is not None)

    progress = RunProgress(Path(run.run_dir), run.train.total_steps)
    return Supervisor(start, progress, options.restarts, options.backoff).run()


def start_once(run: RunConfig, hosts: list[Host], words: list[str], remote: bool) -> DeepSpeedLaunch | None:
    """Launch on the hosts that answer now; None where they are too few."""
    there = hosts
    if remote:
        names = answering(host.name for host in hosts)
        there = [host for host in hosts if host.name in names]
        for host in hosts:
            if host not in there:
                print(
                    f"{host.name} does not answer, or lacks {ROOT}, {os.getcwd()} or {sys.executable}; left out",
                    file=sys.stderr,
                )
    plan = make_plan(run, there)
    if plan is None:
        print("too few hosts answer", file=sys.stderr, flush=True)
        return None
    print(explain(run, plan, there), file=sys.stderr, flush=True)
    return DeepSpeedLaunch(plan, [], words, remote)
