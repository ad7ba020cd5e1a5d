"""Measures a training step of ours beside transformers' own class with peft: time, memory and loss on the same samples.

    python tools/benchmark_step.py --size tiny           # two CPU cores, minutes
    python tools/benchmark_step.py --size 8b             # one GPU
    python tools/benchmark_step.py --scaling             # two ranks, ZeRO 1, 2, 3: what of a step is communication
    python tools/benchmark_step.py --predict --size 8b   # the same for 8, 64 and 512 GPUs, by arithmetic

Everyone starts from the same random weights, has LoRA of one rank in the same layers of both towers, computes in the
same type with the same optimizer, and is given the same tensors. What differs is the model's code and how samples are
laid: ours into full rows (`train/plan.py`) or padded batches of 4; transformers' class, with its own attention, loss
and checkpointing, in padded batches of 4, of samples of similar length or as they come. With checkpointing on, all
layers compute their activations again; one row is ours where four of five do (--checkpoint_every 1.25), which spends
some of the memory that the loss saves. Contenders run one at a time, each in a process of its own; they take turns, and
the median of their turns counts. `loss before` is the mean over all
trained tokens before the first update: the same number for everyone, or they do not do the same. The samples are a
published mixture of instruction data, half and half with text.

Memory is measured apart, on each contender's largest batches: the most in use beyond weights and data. There the C
library returns at once what is freed (MALLOC_MMAP_THRESHOLD_), or holes in its heap would count; that takes time.

`tiny` is InternVL2.5-1B, two sevenths as wide and half as deep, so that two CPU cores train it in seconds and the parts
keep about their shares of the work: the vision encoder half of it, the head half as much as the decoder's layers (two
fifths in the 1B, less in larger models). A tile has 36 tokens instead of 256, and all that is counted in tokens
shrinks by that. Adapters, dropout and norms weigh more than in a large model on a CPU, for everyone alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tools.benchmark import predict
from tools.benchmark.contenders import BASELINE, CONTENDERS
from tools.benchmark.reports import SCALING, beside_the_baseline, draw, show
from tools.benchmark.sizes import SIZES
from tools.benchmark.traffic import Network

from internvl.command_line import command
from internvl.dist_utils import free_port

TORCHRUN = Path(__file__).resolve().parents[2] / "shell/torchrun.py"
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODES = {"on": [True], "off": [False], "both": [True, False]}


@command
def main(argv=None):
    args = parse(argv)
    about = {"size": args.size, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.predict:
        network = Network(args.nvlink * 1e9, args.infiniband * 1e9 / 8)
        table = predict.show(args.size, SIZES[args.size], args.gpus, args.peak * 1e12, args.mfu, network)
        results = [prediction._asdict() for prediction in table]
    elif args.scaling:
        results = [rank for stage in (1, 2, 3) for rank in scale(args, stage)]
        show(results[:: args.ranks], SCALING)  # of rank 0
        print(f"{args.ranks} ranks; without it: the same steps, all ranks at once, without DeepSpeed and an optimizer")
    else:
        results = [result for mode in MODES[args.checkpointing] for result in measure_all(args, mode)]
        beside_the_baseline(results)
        show(results)
        print(f"speed, memory: times those of {BASELINE}")
        draw(results, f"{args.output}.png")
    Path(f"{args.output}.json").write_text(json.dumps(about | {"results": results}, indent=2) + "\n")


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--checkpointing", choices=MODES, default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of a pass; default: the size's own number")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the adapters")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--output", default="benchmark_step", help="stem of the picture and of the JSON file")
    parser.add_argument("--scaling", action="store_true", help="measure ZeRO 1, 2, 3 on --ranks processes instead")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--predict", action="store_true", help="compute the same for --gpus instead")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU (H100, bf16, dense)")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak, recomputation not counted")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s of a GPU, each way, within a node of 8")
    parser.add_argument("--infiniband", type=float, default=400, help="Gbit/s of a GPU, each way, between nodes")
    args = parser.parse_args(argv)
    args.samples = args.samples or SIZES[args.size].samples
    return args


def measure_all(args: argparse.Namespace, checkpointing: bool) -> list[dict]:
    """A result for each contender: the first turn's, with the median of all turns' seconds."""
    task = {name: vars(args)[name] for name in ("size", "samples", "dropout")} | {"checkpointing": checkpointing}
    names = [name for name in args.contenders if checkpointing or not CONTENDERS[name].selective]
    memory = {name: run({"name": name, "what": "memory"} | task, AT_ONCE) for name in names}
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(args.repeats):
        for name in names:
            turns[name].append(run({"name": name, "what": "time", "first_loss": number == 0} | task))
    results = []
    for name, found in turns.items():
        seconds = [turn["seconds"] for turn in found]
        median = statistics.median(seconds)
        summed = {"seconds": median, "spread": (max(seconds) - min(seconds)) / median, "turns": seconds}
        summed["mfu"] = found[0]["mfu"] and found[0]["mfu"] * seconds[0] / median
        results.append({"contender": name, "checkpointing": checkpointing} | found[0] | memory[name] | summed)
    return results


def scale(args: argparse.Namespace, stage: int) -> list[dict]:
    """What each rank finds under a ZeRO stage."""
    task = {"stage": stage, "size": args.size, "samples": args.samples * args.ranks}
    task["checkpointing"] = args.checkpointing != "off"
    launcher = [TORCHRUN, f"--nproc_per_node={args.ranks}", f"--master_port={free_port()}"]
    return run(task, {"OMP_NUM_THREADS": "1"}, launcher, "tools.benchmark.scaling")


def run(task: dict, environment: dict[str, str] | None = None, launcher=(), module="tools.benchmark.measure"):
    """What a module finds in processes of its own, and says in the last line of its output."""
    print(", ".join(f"{key} {value}" for key, value in task.items()), file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", *map(str, launcher), "-m", module, json.dumps(task)]
    done = subprocess.run(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{module} failed with status {done.returncode}: {task}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
