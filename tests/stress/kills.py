"""Kill a recipe again and again with SIGKILL, and start it again each time.

    python tests/stress/kills.py INPUTS FOLDER --rounds 40 --seed 3

INPUTS holds `model/` and `meta.json` of a tiny run. The recipe starts torchrun and two ranks, with packed rows,
dataloader workers and a constant learning rate. Its last step is in the middle of an epoch: a step too many, or a
repeated one, changes the adapters.

Each round kills one victim, or all, at a random moment between the first second and the last file. Then every process
of the run must end by itself, and the same command must resume. When a run has finished, its losses and adapters must
be those of an unbroken run, bit by bit, and the next round begins a new one. The exit status is 1 if not.
`test_kills.py` runs some rounds.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
from helpers.paths import REPO_ROOT

RECIPE = REPO_ROOT / "shell/internvl2.5/8b_vit_lora.sh"
MAX_STEPS = 7
FLAGS = f"""--bf16 False --force_image_size 56 --max_dynamic_patch 4 --max_seq_length 512 --use_packed_ds True
    --max_packed_tokens 512 --num_images_expected 12 --dataloader_num_workers 2 --lr_scheduler_type constant
    --learning_rate 1e-3 --num_train_epochs 100 --max_steps {MAX_STEPS} --save_steps 2 --save_total_limit 2
    --report_to none""".split()
ADAPTERS = [f"{part}/adapter_model.safetensors" for part in ("vision_model", "language_model")]
END_SECONDS = 60  # in which every process must end after a kill
RUN_SECONDS = 300
MARKER = "INTERNVL_KILLS_RUN"  # environment variable by which all processes of a run are found, orphans included


def list_processes(marker: str) -> list[psutil.Process]:
    """List the living processes of a run, from the environment that they inherited."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def is_rank(process: psutil.Process, rank: int) -> bool:
    """Return whether a process is a rank, and not one of its workers."""
    try:
        parent = process.parent()
        is_started_by_torchrun = parent is not None and "torchrun.py" in " ".join(parent.cmdline())
        return is_started_by_torchrun and process.environ().get("RANK") == str(rank)
    except psutil.Error:
        return False


def is_torchrun(process: psutil.Process) -> bool:
    try:
        return any(word.endswith("shell/torchrun.py") for word in process.cmdline())
    except psutil.Error:
        return False


# Victim -> those of the run's processes that are killed; `shell` is the recipe's own process.
VICTIMS = {
    "rank 0": lambda shell, processes: [p for p in processes if is_rank(p, 0)],
    "rank 1": lambda shell, processes: [p for p in processes if is_rank(p, 1)],
    "torchrun": lambda shell, processes: [p for p in processes if is_torchrun(p)],
    "shell": lambda shell, processes: [p for p in processes if p.pid == shell],
    "all": lambda shell, processes: processes,
}


class Run:
    """The recipe's command in one output folder, started as often as it is killed."""

    def __init__(self, inputs: Path, output: Path):
        self.output, self.log = output, output.with_suffix(".log")
        self.marker = str(uuid.uuid4())
        self.command = ["bash", str(RECIPE), *FLAGS]
        variables = {"MODEL_PATH": inputs / "model", "META_PATH": inputs / "meta.json", "OUTPUT_DIR": output}
        variables |= {"GPUS": 2, "BATCH_SIZE": 4, "PER_DEVICE_BATCH_SIZE": 1, "OMP_NUM_THREADS": 1}
        variables |= {"CUDA_VISIBLE_DEVICES": "", "INTERNVL_CACHE": inputs / "cache", MARKER: self.marker}
        # The recipe runs in this environment, as a user's second command does.
        variables |= {"INTERNVL_VENV": "none", "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
        self.env = os.environ | {name: str(value) for name, value in variables.items()}

    def start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_gone(self, shell: subprocess.Popen) -> None:
        """Wait until no process of the run is left."""
        deadline = time.monotonic() + END_SECONDS
        while shell.poll() is None or (left := list_processes(self.marker)):
            if time.monotonic() > deadline:
                left = [" ".join(p.cmdline())[:200] for p in list_processes(self.marker)]
                self.kill_all()
                raise AssertionError(f"still running {END_SECONDS} s after the kill: {left}\n{self.read_log()}")
            time.sleep(0.05)

    def kill_all(self) -> None:
        for process in list_processes(self.marker):
            process.kill()

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def finish(self) -> float:
        """Run to the end and return the seconds that it took."""
        start, shell = time.monotonic(), self.start()
        try:
            status = shell.wait(RUN_SECONDS)
        finally:
            self.kill_all()
        assert status == 0, f"exit status {status}\n{self.read_log()}"
        return time.monotonic() - start

    def kill(self, victim: str, after_seconds: float) -> str:
        """Start the command and kill a victim after some seconds; return what happened."""
        shell = self.start()
        try:
            shell.wait(after_seconds)
        except subprocess.TimeoutExpired:
            processes = list_processes(self.marker)
            # Before torchrun and ranks exist, and after they have ended, there is only the shell.
            victims = VICTIMS[victim](shell.pid, processes) or VICTIMS["shell"](shell.pid, processes)
            for process in victims:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            self.wait_until_gone(shell)
            return f"killed {len(victims)} of {len(processes)} processes, exit status {shell.returncode}"
        assert shell.returncode == 0, f"exit status {shell.returncode}\n{self.read_log()}"
        return "finished before the kill"

    def read_result(self) -> tuple[list[tuple[int, float]], list[bytes]]:
        """Return the losses by step and the adapters of a finished run."""
        state = json.loads((self.output / "trainer_state.json").read_text())
        losses = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
        return losses, [(self.output / adapter).read_bytes() for adapter in ADAPTERS]


def kill_repeatedly(inputs: Path, folder: Path, num_rounds: int, seed: int) -> None:
    """Kill runs in `num_rounds` rounds and compare each finished one with an unbroken run.

    Raises:
        AssertionError: a process is left running, a run fails, or a result differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    unbroken = Run(inputs, folder / "unbroken")
    seconds = unbroken.finish()
    expected = unbroken.read_result()
    assert [step for step, _ in expected[0]] == list(range(1, MAX_STEPS + 1)), expected[0]
    print(f"unbroken run: {seconds:.0f} s", flush=True)
    number, run = 1, Run(inputs, folder / "1")
    # Each victim as often as any other, in random order.
    victims = [list(VICTIMS)[i % len(VICTIMS)] for i in range(num_rounds)]
    generator.shuffle(victims)
    for index, victim in enumerate(victims, start=1):
        moment = generator.uniform(0.2, seconds)
        result = run.kill(victim, moment)
        print(f"round {index}: run {number}, {victim} after {moment:.1f} s: {result}", flush=True)
        is_last = index == num_rounds
        # A run that has been killed five times is left to finish: then it is compared, and a new one begins.
        if is_last or index % 5 == 0 or result.startswith("finished"):
            run.finish()  # a finished command that is started again trains nothing
            assert run.read_result() == expected, f"run {number} differs from the unbroken run\n{run.read_log()}"
            number, run = number + 1, Run(inputs, folder / f"{number + 1}")
    print(f"{num_rounds} rounds, {number - 1} runs: all equal the unbroken run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        kill_repeatedly(args.inputs, args.folder, args.rounds, args.seed)
    except AssertionError as error:
        sys.exit(f"finding: {error}")


if __name__ == "__main__":
    main()
