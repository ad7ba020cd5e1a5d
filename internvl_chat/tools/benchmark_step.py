"""Benchmark our training step against transformers' InternVL with PEFT.

    python tools/benchmark_step.py --size tiny    # two CPU cores, minutes
    python tools/benchmark_step.py --size 8b      # one GPU
    python tools/benchmark_step.py --scaling      # two ranks, ZeRO 1, 2 and 3: step time and communication

Time, memory and loss of each contender are reported. All start from the same random weights, have LoRA of the same rank
in the same layers of vision encoder and LLM, use the same data type and optimizer, and get the same tensors. They
differ in the model's code and in the batches:

- ours: packed rows, or padded batches of 4 samples.
- transformers' class with its own attention, loss and gradient checkpointing: padded batches of 4 samples, of similar
  length or shuffled.

With gradient checkpointing on, all layers recompute their activations. One contender is ours with four of five layers
(--grad_checkpoint_ratio 0.8): it spends part of the memory that the loss saves.

Each contender runs alone in its own process. All are measured once per repeat, in turn, and the median time counts.
"initial loss" is the mean over all loss tokens before the first step. It must be the same number for all contenders.
Samples are a published mixture of instruction data with images, and as many samples of text only.

Memory is measured in a separate process on each contender's largest batches: the peak beyond weights and data.
MALLOC_MMAP_THRESHOLD_ makes the C library return freed memory at once. Otherwise holes in its heap would count. This
takes time, so time is measured without it.

`tiny` is InternVL2.5-1B at two sevenths of the width and half the depth, which two CPU cores train in seconds. The
parts keep about their shares of the FLOPs: the vision encoder has half, and the LM head half as much as the LLM's
layers (two fifths in the 1B model, less in larger ones). A tile has 36 tokens instead of 256, and all other token
counts shrink alike. On a CPU, adapters, dropout and norms take a larger share than in a large model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tools.benchmark.contenders import BASELINE, CONTENDERS
from tools.benchmark.reports import SCALING_COLUMNS, add_baseline_ratios, plot_results, print_table
from tools.benchmark.sizes import MODEL_SIZES

from internvl.command_line import exit_on_user_error
from internvl.launchers import find_free_port

TORCHRUN = Path(__file__).resolve().parents[2] / "shell/torchrun.py"
# glibc returns freed blocks of 64 KiB and more to the system at once.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHECKPOINTING_MODES = {"on": [True], "off": [False], "both": [True, False]}


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    if args.scaling:
        results = [result for stage in (1, 2, 3) for result in measure_scaling(args, stage)]
        print_table(results[:: args.ranks], SCALING_COLUMNS)  # of rank 0
        print(f"{args.ranks} ranks. no DeepSpeed: the same steps on all ranks, without DeepSpeed and optimizer")
    else:
        modes = CHECKPOINTING_MODES[args.checkpointing]
        results = [result for checkpointing in modes for result in measure_contenders(args, checkpointing)]
        add_baseline_ratios(results)
        print_table(results)
        print(f"speed, memory: relative to {BASELINE}")
        plot_results(results, f"{args.output}.png")
    settings = {"size": args.size, "torch": torch.__version__, "threads": torch.get_num_threads()}
    Path(f"{args.output}.json").write_text(json.dumps(settings | {"results": results}, indent=2) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODEL_SIZES, default="tiny", help="model size (default: %(default)s)")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING_MODES, default="both", help="gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=3, help="time measurements per contender (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="samples per pass; default: by size")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--output", default="benchmark_step", help="path of the chart and the JSON file, no suffix")
    parser.add_argument("--scaling", action="store_true", help="measure ZeRO 1, 2 and 3 on --ranks ranks instead")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of --scaling (default: %(default)s)")
    args = parser.parse_args(argv)
    args.samples = args.samples or MODEL_SIZES[args.size].num_samples
    return args


def measure_contenders(args: argparse.Namespace, checkpointing: bool) -> list[dict]:
    """Measure all contenders: the first repeat's results with the median time."""
    task = {"size": args.size, "num_samples": args.samples, "dropout": args.dropout, "checkpointing": checkpointing}
    names = [name for name in args.contenders if checkpointing or not CONTENDERS[name].needs_checkpointing]
    memory = {name: run_module({"name": name, "measure_memory": True} | task, MALLOC_ENVIRONMENT) for name in names}
    repeats: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(args.repeats):
        for name in names:
            repeats[name].append(run_module({"name": name, "measure_initial_loss": number == 0} | task))
    results = []
    for name, passes in repeats.items():
        seconds = [result["seconds"] for result in passes]
        median = statistics.median(seconds)
        timing = {"seconds": median, "spread": (max(seconds) - min(seconds)) / median, "repeats": seconds}
        timing["mfu"] = passes[0]["mfu"] and passes[0]["mfu"] * seconds[0] / median
        results.append({"contender": name, "checkpointing": checkpointing} | passes[0] | memory[name] | timing)
    return results


def measure_scaling(args: argparse.Namespace, stage: int) -> list[dict]:
    """Measure a ZeRO stage: one result per rank."""
    task = {"stage": stage, "size": args.size, "num_samples": args.samples * args.ranks}
    task["checkpointing"] = args.checkpointing != "off"
    launcher = [TORCHRUN, f"--nproc_per_node={args.ranks}", f"--master_port={find_free_port()}"]
    return run_module(task, {"OMP_NUM_THREADS": "1"}, launcher, "tools.benchmark.scaling")


def run_module(
    task: dict,
    environment: dict[str, str] | None = None,
    launcher: list | tuple = (),
    module: str = "tools.benchmark.contender_run",
) -> Any:
    """Run a module in its own process and return its result.

    The module takes the task as JSON and prints its result as JSON in the last line of its output.
    """
    print(f"measuring: {', '.join(f'{key} {value}' for key, value in task.items())}", file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", *map(str, launcher), "-m", module, json.dumps(task)]
    process = subprocess.run(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise ValueError(f"{module} failed with exit status {process.returncode}, see above: {task}")
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
