"""Thousands of tiny steps, and what they leave: `python tests/stress/soak.py TINY --steps 2000`; see `test_soak.py`.

One process trains with dataloader workers and writes checkpoints, of which two are kept. Memory is read at every
`--window` steps; files, processes and shared memory before the run and after it.
"""

import argparse
import faulthandler
import gc
import json
import os
from pathlib import Path

import psutil
import torch
from helpers.training_runs import LORA, flags_of, prepare
from transformers import TrainerCallback

SHARED = Path("/dev/shm")
PATIENCE = 540  # seconds, of which a quiet machine takes 60; then what hangs tells where


def held(pids: set[int]) -> dict[str, int]:
    """What this process holds that it could leak; `pids`: of all processes that it had, whose shared memory counts."""
    process = psutil.Process()
    made = [name.split("_")[1] for name in os.listdir(SHARED) if name.startswith("torch_")]
    return {
        "open files": process.num_fds(),
        "child processes": len(process.children(recursive=True)),
        "threads": process.num_threads(),
        "files in /dev/shm": len([pid for pid in made if pid.isdecimal() and int(pid) in pids]),
        "folders in the temporary folder": len(os.listdir(os.environ["TMPDIR"])),
    }


def memory() -> dict[str, int]:
    """Resident bytes of this process and of its dataloader workers together."""
    process = psutil.Process()
    workers = sum(child.memory_info().rss for child in process.children(recursive=True))
    return {"own": process.memory_info().rss, "workers": workers}


class Watch(TrainerCallback):
    """Writes down memory and open files at every `window` steps."""

    def __init__(self, window: int):
        self.window, self.seen, self.pids = window, [], {os.getpid()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.window == 0:
            self.pids |= {child.pid for child in psutil.Process().children(recursive=True)}
            self.seen.append({"step": state.global_step, **memory(), "open files": psutil.Process().num_fds()})


def soak(tiny: Path, output: Path, steps: int, window: int) -> dict:
    """Train so many steps and tell what was held before, meanwhile and after."""
    flags = [
        "--max_steps",
        str(steps),
        "--save_steps",
        str(window),
        "--save_total_limit",
        "2",
        "--logging_steps",
        "10",
        "--disable_tqdm",
        "True",
    ]
    flags += (
        "--dataloader_num_workers 2 --max_dynamic_patch 1 --gradient_accumulation_steps 1 --no_smoke_save True".split()
    )
    flags += ["--max_seq_length", "128", "--max_bad_samples", "12"]
    trainer = prepare([*flags_of(tiny, output), *LORA, *flags])
    watch = Watch(window)
    trainer.add_callback(watch)
    before = held(watch.pids)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == steps
    del trainer
    gc.collect()
    return {
        "before": before,
        "seen": watch.seen,
        "after": held(watch.pids),
        "kept": sorted(p.name for p in output.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiny", type=Path, help="folder with model/ and meta.json")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--window", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    report = soak(args.tiny, args.output, args.steps, args.window)
    (args.output / "soak.json").write_text(json.dumps(report, indent=1))
    for entry in report["seen"]:
        own, workers = entry["own"] / 1e6, entry["workers"] / 1e6
        print(f"{entry['step']:6}  {own:8.1f} MB  {workers:8.1f} MB  {entry['open files']} files")


if __name__ == "__main__":
    main()
