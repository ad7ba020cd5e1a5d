"""Measures a training step of ours beside transformers' own class with peft: time, memory and loss on the same samples.

    python tools/benchmark_step.py --size tiny              # two CPU cores, minutes
    python tools/benchmark_step.py --size 8b                # one GPU
    python tools/benchmark_step.py --scaling                # two ranks, ZeRO 1, 2, 3: what is communication
    python tools/benchmark_step.py --predict --size 8b      # the same for 8, 64, 512 GPUs, by arithmetic

Everyone starts from the same random weights, has LoRA of one rank in the same layers of both towers, computes in the same
type with the same optimizer, and is given the same tensors. What differs is the model's code and how samples are laid:
ours into full rows (`train/plan.py`) or padded batches of 4; transformers' class, with its own attention, loss and
checkpointing, in padded batches of 4, of samples of similar length or as they come. Contenders run one at a time, each in
a process of its own; they take turns, and the median of their turns counts. `loss before` is the mean over all trained
tokens before the first update: the same number for everyone, or they do not do the same. The samples are a published
mixture of instruction data, half and half with text.

Memory is measured apart, on each contender's largest batches: the most in use beyond weights and data. There the C
library returns at once what is freed (MALLOC_MMAP_THRESHOLD_), or holes in its heap would count; that takes time.

`tiny` is InternVL2.5-1B, two sevenths as wide and half as deep, so that two CPU cores train it in seconds and the parts
keep about their shares of the work: the vision encoder half of it, the head half as much as the decoder's layers (in
the 1B two fifths; in larger models less). A tile has 36 tokens instead of 256, and all that is counted in tokens shrinks
by that. Adapters, dropout and norms weigh more than in a large model on a CPU, for everyone alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tools.benchmark.contenders import BASELINE, CONTENDERS
from tools.benchmark.sizes import SIZES

from internvl.command_line import command

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
COLUMNS = {  # heading -> width, what stands there
    "checkpointing": (14, lambda r: "on" if r["checkpointing"] else "off"),
    "contender": (32, lambda r: r["contender"]),
    "seconds": (9, lambda r: f"{r['seconds']:.2f}"),
    "spread": (8, lambda r: f"{r['spread']:.0%}"),
    "tokens/s": (10, lambda r: f"{r['tokens'] / r['seconds']:,.0f}"),
    "speed": (8, lambda r: f"{r['speed']:.2f}x"),
    "peak MB": (9, lambda r: f"{r['peak_bytes'] / 1e6:,.0f}"),
    "memory": (8, lambda r: f"{r['memory']:.2f}x"),
    "padding": (9, lambda r: f"{r['padding']:.0%}"),
    "loss before": (13, lambda r: f"{r['first_loss']:.5f}"),
    "loss": (9, lambda r: f"{r['loss']:.4f}"),
}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--checkpointing", choices=("on", "off", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of a pass; default: the size's own number")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the adapters")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--output", default="benchmark_step", help="stem of the picture and of the JSON file")
    args = parser.parse_args(argv)
    modes = {"on": [True], "off": [False], "both": [True, False]}[args.checkpointing]
    results = []
    for checkpointing in modes:
        results += measure_all(args, checkpointing)
    show(results)
    about = {"size": args.size, "torch": torch.__version__, "threads": torch.get_num_threads()}
    Path(f"{args.output}.json").write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    draw(results, f"{args.output}.png")
    return results


def measure_all(args: argparse.Namespace, checkpointing: bool) -> list[dict]:
    """A result for each contender: the first turn's, with the median of all turns' seconds."""
    common = {"size": args.size, "samples": args.samples or SIZES[args.size].samples, "dropout": args.dropout}
    common["checkpointing"] = checkpointing
    memory = {name: run({"name": name, "what": "memory"} | common, AT_ONCE) for name in args.contenders}
    turns: dict[str, list[dict]] = {name: [] for name in args.contenders}
    for number in range(args.repeats):
        for name in args.contenders:
            turns[name].append(run({"name": name, "what": "time", "first_loss": number == 0} | common))
    results = []
    for name, found in turns.items():
        seconds = [turn["seconds"] for turn in found]
        median = statistics.median(seconds)
        summed = {"seconds": median, "spread": (max(seconds) - min(seconds)) / median, "turns": seconds}
        results.append({"contender": name, "checkpointing": checkpointing} | found[0] | memory[name] | summed)
    base = next((result for result in results if result["contender"] == BASELINE), results[0])
    for result in results:
        result["speed"] = base["seconds"] / result["seconds"]
        result["memory"] = result["peak_bytes"] / base["peak_bytes"]
    return results


def run(task: dict, environment: dict[str, str] | None = None) -> dict:
    """What `benchmark/measure.py` finds in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.benchmark.measure", json.dumps(task)]
    done = subprocess.run(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{task['name']} failed with status {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    told = f"{found['peak_bytes'] / 1e6:,.0f} MB" if task["what"] == "memory" else f"{found['seconds']:.2f} s"
    mode = "on" if task["checkpointing"] else "off"
    print(f"{task['name']}, checkpointing {mode}: {told}", file=sys.stderr, flush=True)
    return found


def show(results: list[dict]) -> None:
    print("".join(f"{heading:>{width}}" for heading, (width, _) in COLUMNS.items()))
    for result in results:
        print("".join(f"{text(result):>{width}}" for width, text in COLUMNS.values()))
    print(f"speed, memory: times those of {BASELINE}; memory beyond weights and data")


def draw(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(result["checkpointing"] for result in results))
    shown = {"tokens a second": lambda r: r["tokens"] / r["seconds"], "peak beyond the weights (MB)": None}
    shown["peak beyond the weights (MB)"] = lambda r: r["peak_bytes"] / 1e6
    figure, axes = pyplot.subplots(len(modes), 2, figsize=(11, 2.2 * len(modes)), layout="constrained", squeeze=False)
    for row, mode in zip(axes, modes, strict=True):
        mine = [result for result in results if result["checkpointing"] == mode]
        names = [result["contender"] for result in mine]
        colors = ["C1" if name.startswith("ours") else "C0" for name in names]
        for axis, (title, value) in zip(row, shown.items(), strict=True):
            bars = axis.barh(names, [value(result) for result in mine], color=colors)
            axis.bar_label(bars, fmt="{:,.0f}", padding=3)
            axis.set_title(f"{title}, checkpointing {'on' if mode else 'off'}", fontsize=10)
            axis.margins(x=0.15)
            axis.invert_yaxis()
        row[1].set_yticklabels([])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
