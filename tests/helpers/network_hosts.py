"""Two machines in one: each with its own name, address, loopback and processes, joined by a cable of the kernel's.

They are namespaces without names, held by one process a host. However that process ends, the host's other processes
and its network go with it. Either host resolves both names, 127.0.0.1 is each one's own, nothing leaves the cable.
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

# A program in place of a training: who found whom, as `places` reads it.
PLACES = """
import os, sys
import torch
from internvl.dist_utils import gathered, init_dist, rank
try:
    init_dist(os.environ["LAUNCHER"])
except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
places = gathered(f"{os.uname().nodename}/{os.environ['LOCAL_RANK']}")
if rank() == 0:
    print("places", os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], *places)
torch.distributed.destroy_process_group()
"""
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
COMMANDS = ("ip", "setpriv", "unshare", "nsenter", "mount")
NAMESPACES = "--net --mount --uts --ipc --pid".split()


def find(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def lacking(*commands: str) -> str:
    """Why this machine cannot be two hosts that have these commands; empty where it can."""
    if missing := [command for command in (*COMMANDS, *commands) if not find(command)]:
        return f"no {', '.join(missing)} on this machine"
    if os.geteuid() != 0:
        return "only root makes hosts out of namespaces"
    return subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True).stderr.strip()


def places(printed: str) -> list[str]:
    """Address and port of rank 0, then each rank's host/local rank."""
    return re.search(r"^places (.*)$", printed, re.MULTILINE)[1].split()


class Host:
    """One of the machines."""

    def __init__(self, name: str):
        self.name = name
        first = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", "sleep", "infinity"]
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.holder = psutil.Popen(["setpriv", "--pdeathsig=KILL", *first], **quiet)
        while not (inside := self.holder.children()) or inside[0].name() != "sleep":
            assert self.holder.poll() is None
            time.sleep(0.01)
        self.pid = inside[0].pid

    def command(self, *words: str | Path) -> list[str]:
        """The command line that runs `words` there, in the caller's folder and environment."""
        return ["nsenter", f"--target={self.pid}", f"--wd={os.getcwd()}", *NAMESPACES, *map(str, words)]

    def run(self, *words: str | Path, **options) -> subprocess.CompletedProcess:
        """Of several tasks' lines one may stand amid a character of another: such are replaced."""
        options = {
            "capture_output": True,
            "encoding": "utf-8",
            "errors": "replace",
            "stdin": subprocess.DEVNULL,
            "timeout": 300,  # a first run compiles an op of DeepSpeed
        } | options
        return subprocess.run(self.command(*words), **options)

    def listen(self, port: int) -> None:
        """Take a port until the host ends."""
        program = (
            f"import socket, time; s = socket.create_server(('', {port})); print('!', flush=True); time.sleep(1e6)"
        )
        other = subprocess.Popen(self.command(sys.executable, "-c", program), stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"!\n"

    def end(self) -> None:
        psutil.Process(self.pid).kill()  # the first of its namespace: the kernel ends the others
        self.holder.wait(timeout=20)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Both, as long as they are needed; their /etc/hosts is kept in `folder`."""
    known = folder / "hosts"
    known.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[name]} {name}\n" for name in ADDRESSES))
    with contextlib.ExitStack() as stack:
        hosts = [Host(name) for name in ADDRESSES]
        for host in hosts:
            stack.callback(host.end)
        first, second = (str(host.pid) for host in hosts)
        cable = ["link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]
        subprocess.run(["ip", *cable], check=True)
        for host in hosts:
            address = f"ip address add {ADDRESSES[host.name]}/24 dev cable"
            up = "ip link set lo up; ip link set cable up"
            done = host.run("bash", "-ec", f"hostname {host.name}; mount --bind {known} /etc/hosts; {address}; {up}")
            assert done.returncode == 0, done.stderr
        yield hosts
