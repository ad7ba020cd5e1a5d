"""Train thousands of tiny steps and measure what leaks.

    python tests/stress/soak.py INPUTS OUTPUT --steps 2000

One process trains with dataloader workers and writes checkpoints, of which it keeps two. Memory is measured every
`--window` steps; open files, processes and shared memory are counted before and after the run. See `test_soak.py`.
"""

import argparse
import faulthandler
import gc
import json
import os
from pathlib import Path

import psutil
import torch
from helpers.training_runs import TRAIN_ADAPTERS, build_run_flags, prepare_trainer
from transformers import TrainerCallback

SHARED_MEMORY_DIR = Path("/dev/shm")
TIMEOUT_SECONDS = 540  # without other load the run takes 60; after it, a hang prints its stack


def count_resources(pids: set[int]) -> dict[str, int]:
    """Count what this process could leak.

    `pids` are this process and all that it has started: files in shared memory are counted if one of them made them.
    """
    process = psutil.Process()
    makers = [name.split("_")[1] for name in os.listdir(SHARED_MEMORY_DIR) if name.startswith("torch_")]
    return {
        "open files": process.num_fds(),
        "child processes": len(process.children(recursive=True)),
        "threads": process.num_threads(),
        "files in /dev/shm": len([pid for pid in makers if pid.isdecimal() and int(pid) in pids]),
        "folders in the temporary folder": len(os.listdir(os.environ["TMPDIR"])),
    }


def measure_memory() -> dict[str, int]:
    """Return the resident bytes of this process and of its dataloader workers."""
    process = psutil.Process()
    workers = sum(child.memory_info().rss for child in process.children(recursive=True))
    return {"own": process.memory_info().rss, "workers": workers}


class ResourceLog(TrainerCallback):
    """A log of memory and open files, every `window` steps."""

    def __init__(self, window: int):
        self.window, self.entries, self.pids = window, [], {os.getpid()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.window == 0:
            self.pids |= {child.pid for child in psutil.Process().children(recursive=True)}
            self.entries.append(
                {"step": state.global_step, **measure_memory(), "open files": psutil.Process().num_fds()}
            )


def soak(tiny_inputs: Path, output: Path, steps: int, window: int) -> dict:
    """Train and report resources before, during and after the run."""
    flags = f"""--max_steps {steps} --save_steps {window} --save_total_limit 2 --logging_steps 10 --disable_tqdm True
        --dataloader_num_workers 2 --max_dynamic_patch 1 --gradient_accumulation_steps 1 --no_smoke_save True
        --max_seq_length 128 --max_bad_samples 12""".split()
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, output), *TRAIN_ADAPTERS, *flags])
    log = ResourceLog(window)
    trainer.add_callback(log)
    before = count_resources(log.pids)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == steps
    del trainer
    gc.collect()
    return {
        "before": before,
        "log": log.entries,
        "after": count_resources(log.pids),
        "output": sorted(path.name for path in output.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, help="folder with model/ and meta.json")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--window", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    report = soak(args.inputs, args.output, args.steps, args.window)
    (args.output / "soak.json").write_text(json.dumps(report, indent=1))
    for entry in report["log"]:
        own, workers = entry["own"] / 1e6, entry["workers"] / 1e6
        print(f"{entry['step']:6}  {own:8.1f} MB  {workers:8.1f} MB  {entry['open files']} files")


if __name__ == "__main__":
    main()
