"""A real SLURM of two nodes: munge, a controller and a daemon a node, on the two hosts of `hosts.py`.

Everything that it writes lies in one folder. It is up within seconds, or its logs are the error; its hosts end it.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.network_hosts import Host, find, lacking, two_hosts

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("srun", "sbatch", "salloc", "scancel", "scontrol", "sinfo", "squeue")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=3600
SchedulerParameters=bf_interval=1,sched_interval=2
SlurmdParameters=config_overrides
NodeName=node[1-2] CPUs=8 State=UNKNOWN
PartitionName=tiny Nodes=node[1-2] Default=YES State=UP
"""


def cluster_lacks() -> str:
    """Why there can be no cluster here; empty where there can."""
    return lacking(*DAEMONS, *COMMANDS)


class Cluster:
    """Users log in on the first node."""

    def __init__(self, folder: Path, hosts: list[Host]):
        self.folder, self.hosts, self.login = folder, hosts, hosts[0]
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        munge = folder / "munge"
        munge.mkdir(mode=0o755)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [f"--{kind}-file={munge}/{kind}" for kind in ("key", "pid", "log", "seed")]
        self.start(self.login, "munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        until((munge / "socket").exists, 10, self.logs)
        self.start(self.login, "slurmctld", "-D")
        for host in hosts:
            self.start(host, "slurmd", "-D")
        until(lambda: self.says("sinfo", "-h", "-o", "%T %D") == "idle 2", 30, self.logs)

    def start(self, host: Host, daemon: str, *options: str) -> None:
        with open(self.folder / f"{daemon}-{host.name}.log", "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            subprocess.Popen(host.command(find(daemon), *options), env=os.environ | self.env, **streams)

    def run(self, *words: str | Path, env: dict[str, str] = os.environ, **options) -> subprocess.CompletedProcess:
        return self.login.run(*words, env=env | self.env, **options)

    def says(self, *words: str | Path) -> str:
        return self.run(*words).stdout.strip()

    def logs(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))


def until(true: Callable[[], object], seconds: float, otherwise: Callable[[], str]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    with two_hosts(folder) as hosts:
        yield Cluster(folder, hosts)
