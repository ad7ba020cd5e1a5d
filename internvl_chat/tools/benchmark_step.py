"""Benchmark our training step against transformers' InternVL with PEFT, or against another version of this repository.

    python tools/benchmark_step.py --size tiny         # two CPU cores, five minutes
    python tools/benchmark_step.py --size 8b           # one GPU
    python tools/benchmark_step.py --against FOLDER    # the code of another checkout
    python tools/benchmark_step.py --scaling           # two ranks, ZeRO 1, 2 and 3: step time and communication

Throughput, memory and loss of each contender are reported. All start from the same random weights, have LoRA of the
same rank in the same layers, use the same data type and optimizer, and get the same tensors. They differ in the model's
code and in the batches:

- ours: packed rows, or padded batches of 4 samples.
- transformers' class with its own attention, loss and gradient checkpointing: padded batches of 4 samples, of similar
  length or shuffled.

With gradient checkpointing on, all layers recompute their activations. One contender is ours with four of five layers
(--grad_checkpoint_ratio 0.8): it spends part of the memory that the loss saves.

A turn is a step on a few samples, the same ones for all contenders. On a CPU, all contenders are alive and take turns.
A GPU may hold only one: each takes all its turns before the next starts, unless --together is given. Throughput is the
median over turns, speed the median ratio to the reference on the same samples. Both have a 95 % interval by order
statistics: with 9 turns, from the second smallest to the second largest value. The learning rate is zero, so the loss
must be the same number for all contenders.

The mixture "with text" has a published mixture of instruction data with images, and as many samples of text only.
"images" has no samples of text only.

Memory is the peak beyond weights and data on each contender's largest batches. There the C library returns freed memory
at once (`tools/benchmark/memory.py`). Otherwise holes in its heap would count.

`tiny` is InternVL2.5-1B at two sevenths of the width and half the depth, which two CPU cores train in seconds. The
parts keep about their shares of the FLOPs: the vision encoder has half, and the LM head half as much as the LLM's
layers (two fifths in the 1B model, less in larger ones). A tile has 36 tokens instead of 256, and all other token
counts shrink alike. On a CPU, adapters, dropout and norms take a larger share than in a large model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from internvl.command_line import exit_on_user_error
from internvl.launchers import find_free_port
from internvl.tools.benchmark.contenders import BASELINE, CONTENDERS, DEFAULT_CONTENDERS, LORA_PARTS, OURS
from internvl.tools.benchmark.reports import (
    SCALING_COLUMNS,
    compare,
    describe_machine,
    plot_results,
    print_results,
    print_table,
)
from internvl.tools.benchmark.samples import MIXTURES, PADDED_BATCH_SIZE
from internvl.tools.benchmark.sizes import MODEL_SIZES
from internvl.tools.benchmark.turns import measure_in_turns
from internvl.versions import PACKAGE_DIR, require_package

TORCHRUN = PACKAGE_DIR / "shell/torchrun.py"
CHECKPOINTING_MODES = {"on": [True], "off": [False], "both": [True, False]}
START_FN = "internvl.tools.benchmark.contender_run:start_contender"


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    if args.scaling:
        results = [result for stage in (1, 2, 3) for result in measure_scaling(args, stage)]
        print_table(results[:: args.ranks], SCALING_COLUMNS)  # of rank 0
        print(f"{args.ranks} ranks. no DeepSpeed: the same steps on all ranks, without DeepSpeed and optimizer")
    else:
        require_package("matplotlib", "the figure")
        results = measure_contenders(args)
        print_results(results)
        plot_results(results, f"{args.output}.png")
    settings = {"size": args.size, "turns": args.turns, "samples": args.samples} | describe_machine()
    Path(f"{args.output}.json").write_text(json.dumps(settings | {"results": results}, indent=2) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: a number or folder that cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODEL_SIZES, default="tiny", help="model size (default: %(default)s)")
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES), help="default: both")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING_MODES, default="on", help="gradient checkpointing")
    parser.add_argument(
        "--lora", nargs="+", choices=LORA_PARTS, default=["vision+llm"], help="parts with LoRA; all else is frozen"
    )
    parser.add_argument("--turns", type=int, default=9, help="per contender and mixture (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="samples per turn, a multiple of 4; default: by size")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout (default: %(default)s)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=", ".join(f'"{name}"' for name in CONTENDERS),
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="checkout whose internvl/ each contender is compared with"
    )
    parser.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        default=not torch.cuda.is_available(),
        help="keep all contenders in memory and alternate between them (default: on a CPU)",
    )
    parser.add_argument("--output", default="benchmark_step", help="path of the chart and the JSON file, no suffix")
    parser.add_argument("--scaling", action="store_true", help="measure ZeRO 1, 2 and 3 on --ranks ranks instead")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of --scaling (default: %(default)s)")
    args = parser.parse_args(argv)
    args.samples = args.samples or MODEL_SIZES[args.size].num_samples
    args.contenders = args.contenders or ([OURS] if args.against else DEFAULT_CONTENDERS)
    if args.turns < 1 or args.samples < 1 or args.samples % PADDED_BATCH_SIZE:
        raise ValueError(
            f"--turns {args.turns} --samples {args.samples} is invalid: expected at least 1 turn and a multiple of "
            f"{PADDED_BATCH_SIZE} samples."
        )
    if args.against and not (args.against / "internvl_chat/internvl").is_dir():
        raise ValueError(f"--against {args.against}: expected a checkout with internvl_chat/internvl in it.")
    return args


class Entry(NamedTuple):
    """A contender in one of the settings that are measured.

    Attributes:
        columns: that name it in the results.
        reference: key of the entry that it is compared with.
        folder: see `ContenderProcess`.
    """

    columns: dict[str, Any]
    task: dict[str, Any]
    reference: str
    folder: str | None = None


def measure_contenders(args: argparse.Namespace) -> list[dict]:
    """Measure all contenders in all settings: a result per mixture and entry."""
    with tempfile.TemporaryDirectory() as folder:
        if args.against:
            link_other_package(args.against / "internvl_chat/internvl", Path(folder, "internvl"))
        entries = list_entries(args, folder)
        measurements = measure_in_turns(
            START_FN,
            {key: entry.task for key, entry in entries.items()},
            [{"mixture": mixture, "number": number} for mixture in args.mixtures for number in range(args.turns)],
            args.together,
            {key: entry.folder for key, entry in entries.items()},
        )
    return [
        {"mixture": mixture} | entry.columns | compare(measurements[key], measurements.get(entry.reference), mixture)
        for mixture in args.mixtures
        for key, entry in entries.items()
    ]


def link_other_package(other: Path, package: Path) -> None:
    """Make a package of another checkout's `internvl`, but with the tools of this one."""
    package.mkdir()
    for path in other.resolve().iterdir():
        if path.name != "tools":
            (package / path.name).symlink_to(path)
    (package / "tools").symlink_to(PACKAGE_DIR / "tools")


def list_entries(args: argparse.Namespace, folder: str) -> dict[str, Entry]:
    """List the contenders in each combination of adapters and checkpointing."""
    shared = {"num_turns": args.turns, "num_samples": args.samples}
    shared |= {name: getattr(args, name) for name in ("size", "mixtures", "dropout")}
    entries = {}
    for lora, checkpointing in product(args.lora, CHECKPOINTING_MODES[args.checkpointing]):
        setting = {"lora": lora, "checkpointing": checkpointing}
        suffix = f" (LoRA in {lora}, checkpointing {'on' if checkpointing else 'off'})"
        for name in args.contenders:
            if CONTENDERS[name].needs_checkpointing and not checkpointing:
                continue
            task = shared | setting | {"name": name}
            old_name = f"{name}, {args.against.resolve().name}" if args.against else BASELINE
            reference = old_name + suffix
            entries[name + suffix] = Entry(setting | {"contender": name}, task, reference)
            if args.against:
                entries[reference] = Entry(setting | {"contender": old_name}, task, reference, folder)
    return entries


def measure_scaling(args: argparse.Namespace, stage: int) -> list[dict]:
    """Measure a ZeRO stage: one result per rank."""
    task = {"stage": stage, "size": args.size, "num_samples": args.turns * args.samples * args.ranks}
    task["checkpointing"] = args.checkpointing != "off"
    print(f"measuring: ZeRO {stage}", file=sys.stderr, flush=True)
    launcher = [TORCHRUN, f"--nproc_per_node={args.ranks}", f"--master_port={find_free_port()}"]
    program = ["-m", "internvl.tools.benchmark.scaling", json.dumps(task)]
    command = [sys.executable, "-W", "ignore", *map(str, launcher), *program]
    process = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise ValueError(f"the benchmark of ZeRO failed with exit status {process.returncode}, see above: {task}")
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
