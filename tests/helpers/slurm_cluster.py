"""A real SLURM of two nodes.

munge, a controller, and a daemon on each of the hosts of `network_hosts.py`. All its files are in one folder. It is up
within seconds, or its logs are the error; it ends with its hosts.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.live_runs import wait_until
from helpers.network_hosts import Host, find_command, find_missing_requirement, start_two_hosts

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENT_COMMANDS = ("srun", "sbatch", "salloc", "scancel", "scontrol", "sinfo", "squeue")
# List of nodes -> first line of `scontrol show hostnames`; tests/shell/test_slurm.py compares them.
NODE_LISTS = {
    "node7": "node7",
    "gpu-a,node[1-3]": "gpu-a",
    "node[1-3,7],gpu-a": "node1",
    "node[7,1-3]": "node7",
    "n[001-010,12]": "n001",
    "rack[0-1]node[05-06]": "rack0node05",
    "r[2,4]-n[7-8]": "r2-n7",
    "node[12]": "node12",
}
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


def find_missing_cluster_requirement() -> str:
    """Name what this machine lacks for a cluster; empty if nothing."""
    return find_missing_requirement(*DAEMONS, *CLIENT_COMMANDS)


class Cluster:
    """A running cluster; its login node is the first node."""

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
        wait_until((munge / "socket").exists, self.read_logs, 10)
        self.start(self.login, "slurmctld", "-D")
        for host in hosts:
            self.start(host, "slurmd", "-D")
        wait_until(lambda: self.read_output("sinfo", "-h", "-o", "%T %D") == "idle 2", self.read_logs, 30)

    def start(self, host: Host, daemon: str, *options: str) -> None:
        """Start a daemon on a host."""
        with open(self.folder / f"{daemon}-{host.name}.log", "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            subprocess.Popen(host.wrap_command(find_command(daemon), *options), env=os.environ | self.env, **streams)

    def run(self, *words: str | Path, env: dict[str, str] = os.environ, **options) -> subprocess.CompletedProcess:
        """Run a command on the login node and wait for it."""
        return self.login.run(*words, env=env | self.env, **options)

    def read_output(self, *words: str | Path) -> str:
        """Run a command on the login node; return its output."""
        return self.run(*words).stdout.strip()

    def read_logs(self) -> str:
        """Read the end of each daemon's log."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))


@contextlib.contextmanager
def start_slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster on two hosts."""
    with start_two_hosts(folder) as hosts:
        yield Cluster(folder, hosts)
