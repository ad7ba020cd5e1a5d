"""Two hosts on one machine, joined by a virtual cable.

Each has its own name, address, loopback and processes. A host is a set of unnamed Linux namespaces, held by one
process. However that process ends, the host's other processes and its network end with it. Both hosts resolve both
names, 127.0.0.1 is a different one on each, and nothing leaves the cable.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# A program in place of a training: rank 0 prints where all ranks run, for `parse_placement`.
PRINT_PLACEMENT = """
import os, sys
import torch
from internvl.dist_utils import gather_objects, get_rank, init_dist
try:
    init_dist(os.environ["LAUNCHER"])
except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
ranks = gather_objects(f"{os.uname().nodename}/{os.environ['LOCAL_RANK']}")
if get_rank() == 0:
    print("placement", os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], *ranks)
torch.distributed.destroy_process_group()
"""
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
REQUIRED_COMMANDS = ("ip", "setpriv", "unshare", "nsenter", "mount")
NAMESPACES = "--net --mount --uts --ipc --pid".split()
# Open MPI refuses to run as root otherwise, and making namespaces takes root.
MPIRUN_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "LAUNCHER": "mpi"}


def find_command(command: str) -> str | None:
    """Find a command on PATH, or where only root's PATH leads."""
    return shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def find_missing_requirement(*commands: str) -> str:
    """Name what this machine lacks for two hosts; empty if nothing.

    Args:
        commands: also required on the hosts.
    """
    if missing := [command for command in (*REQUIRED_COMMANDS, *commands) if not find_command(command)]:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "namespaces require root"
    return subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True).stderr.strip()


def parse_placement(output: str) -> list[str]:
    """Parse what PRINT_PLACEMENT prints.

    Returns:
        Address and port of rank 0, then host/local rank of each rank.
    """
    return re.search(r"^placement (.*)$", output, re.MULTILINE)[1].split()


class Host:
    """One of the two hosts."""

    def __init__(self, name: str):
        self.name = name
        init = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", "sleep", "infinity"]
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.holder = psutil.Popen(["setpriv", "--pdeathsig=KILL", *init], **streams)
        while not (inside := self.holder.children()) or inside[0].name() != "sleep":
            assert self.holder.poll() is None
            time.sleep(0.01)
        self.pid = inside[0].pid

    def wrap_command(self, *words: str | Path) -> list[str]:
        """Return the command line that runs `words` on this host.

        Folder and environment are the caller's.
        """
        return ["nsenter", f"--target={self.pid}", f"--wd={os.getcwd()}", *NAMESPACES, *map(str, words)]

    def run(self, *words: str | Path, **options) -> subprocess.CompletedProcess:
        """Run a command on this host and wait for it."""
        options = {
            "capture_output": True,
            "encoding": "utf-8",
            "errors": "replace",  # output of one task can split a character of another's
            "stdin": subprocess.DEVNULL,
            "timeout": 300,  # a first run compiles an op of DeepSpeed
        } | options
        return subprocess.run(self.wrap_command(*words), **options)

    def occupy_port(self, port: int) -> None:
        """Listen on a port until the host shuts down."""
        program = (
            f"import socket, time; s = socket.create_server(('', {port})); print('!', flush=True); time.sleep(1e6)"
        )
        process = subprocess.Popen(self.wrap_command(sys.executable, "-c", program), stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"!\n"

    def shut_down(self) -> None:
        """End all processes of this host."""
        psutil.Process(self.pid).kill()  # the first of its PID namespace: the kernel kills the others
        self.holder.wait(timeout=20)


@contextlib.contextmanager
def start_two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Start both hosts; `folder` holds their /etc/hosts."""
    hosts_file = folder / "hosts"
    hosts_file.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[name]} {name}\n" for name in ADDRESSES))
    with contextlib.ExitStack() as stack:
        hosts = [Host(name) for name in ADDRESSES]
        for host in hosts:
            stack.callback(host.shut_down)
        first, second = (str(host.pid) for host in hosts)
        cable = ["link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]
        subprocess.run(["ip", *cable], check=True)
        for host in hosts:
            commands = [
                f"hostname {host.name}",
                f"mount --bind {hosts_file} /etc/hosts",
                f"ip address add {ADDRESSES[host.name]}/24 dev cable",
                "ip link set lo up",
                "ip link set cable up",
            ]
            done = host.run("bash", "-ec", "; ".join(commands))
            assert done.returncode == 0, done.stderr
        yield hosts
