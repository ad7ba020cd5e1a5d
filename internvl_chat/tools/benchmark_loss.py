"""Measures the loss alone, forward and backward: seconds, and peak memory beyond its inputs.

`python tools/benchmark_loss.py` prints one table, `--full` at up to 32k tokens x 152k vocabulary. `ours` is
`internvl/model/token_loss.py`. Beside it: the logits of all tokens, and those of trained tokens alone, each at once.
One process a row, float32, on the CPU; weights and states are random, and a quarter of the tokens is trained.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from internvl.command_line import command
from internvl.metrics.step_timer import peak_memory
from internvl.model.internvl_chat.documents import IGNORE_INDEX
from internvl.model.token_loss import token_loss

SIZES = {"tokens": [4096, 16384], "vocabulary": 32768, "hidden": 256}
FULL = {"tokens": [8192, 32768], "vocabulary": 151674, "hidden": 896}
TRAINED = 0.25


def all_at_once(states: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(states[0, :-1]), labels[0, 1:], ignore_index=IGNORE_INDEX)


def trained_at_once(states: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    trained = labels[0, 1:] != IGNORE_INDEX
    return F.cross_entropy(head(states[0, :-1][trained]), labels[0, 1:][trained])


# How it is computed -> function, and the share of tokens whose logits exist at a time (None: does not depend on them).
CONTENDERS: dict[str, tuple[Callable, float | None]] = {
    "logits of all tokens": (all_at_once, 1.0),
    "logits of trained tokens": (trained_at_once, TRAINED),
    "ours": (token_loss, None),
}


def fits(share: float | None, tokens: int, vocabulary: int) -> bool:
    """Logits, their logarithms and their gradient, in float32, within half of the memory that is free."""
    return share is None or 3 * 4 * share * tokens * vocabulary < 0.5 * psutil.virtual_memory().available


def measure(name: str, tokens: int, vocabulary: int, hidden: int, train_head: bool) -> dict[str, float]:
    """Seconds, peak bytes beyond what was there before, and the loss. In a process of its own: a peak does not fall."""
    loss_of, _ = CONTENDERS[name]
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(train_head)
    states = torch.randn(1, tokens, hidden, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens)).masked_fill(torch.rand(1, tokens) > TRAINED, IGNORE_INDEX)
    loss_of(states[:, :8], nn.Linear(hidden, 8), labels[:, :8].clamp(max=7)).backward()  # what is loaded at first use
    before = peak_memory(torch.device("cpu"))
    start = time.perf_counter()
    loss = loss_of(states, head, labels)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = peak_memory(torch.device("cpu")) - before
    return {"seconds": seconds, "peak": peak, "loss": loss.item()}


def measure_apart(**sizes) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--row", json.dumps(sizes)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 32k tokens x 152k vocabulary")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {SIZES['tokens']}")
    parser.add_argument("--vocabulary", type=int, help=f"default {SIZES['vocabulary']}")
    parser.add_argument("--hidden", type=int, help=f"default {SIZES['hidden']}")
    parser.add_argument("--train_head", action="store_true", help="with gradients of the head's weight")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps(measure(**args.row)))
        return
    sizes = {name: getattr(args, name) or value for name, value in (FULL if args.full else SIZES).items()}
    print(f"{'tokens':>8}{'vocabulary':>12}  {'loss from':26}{'seconds':>9}{'peak MB':>9}{'loss':>10}")
    for tokens in sizes["tokens"]:
        for name, (_, share) in CONTENDERS.items():
            shown = f"{tokens:8,}{sizes['vocabulary']:12,}  {name:26}"
            if not fits(share, tokens, sizes["vocabulary"]):
                print(f"{shown}does not fit into memory", flush=True)
                continue
            row = measure_apart(name=name, **sizes | {"tokens": tokens}, train_head=args.train_head)
            print(f"{shown}{row['seconds']:9.2f}{row['peak'] / 1e6:9,.0f}{row['loss']:10.5f}", flush=True)


if __name__ == "__main__":
    main()
