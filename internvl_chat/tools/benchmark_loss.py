"""Benchmark time and memory of the loss alone, forward and backward.

    python tools/benchmark_loss.py           # two CPU cores, two minutes
    python tools/benchmark_loss.py --full    # up to 32k tokens x 152k vocabulary

"ours" is `internvl/model/token_loss.py`, which never holds all logits. The others hold the logits of all tokens, or of
all loss tokens, and take turns with ours, in float32 on the CPU. Times are medians with their 95 % interval. Weights
and hidden states are random. A quarter of the tokens are loss tokens. Peak memory is counted beyond the inputs.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from internvl.command_line import exit_on_user_error
from internvl.constants import IGNORE_INDEX
from internvl.metrics.step_metrics import get_peak_memory
from internvl.model.token_loss import compute_token_loss
from internvl.tools.benchmark.memory import reset_peak_memory
from internvl.tools.benchmark.turns import compare_turns, compute_median_interval, format_interval, measure_in_turns

DEFAULT_SHAPE: dict[str, Any] = {"tokens": [4096, 16384], "vocabulary": 32768, "hidden": 256}
FULL_SHAPE: dict[str, Any] = {"tokens": [8192, 32768], "vocabulary": 151674, "hidden": 896}
LOSS_TOKEN_SHARE = 0.25


def compute_loss_of_all_logits(hidden_states: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross entropy from the logits of all tokens."""
    return F.cross_entropy(head(hidden_states[0, :-1]), labels[0, 1:], ignore_index=IGNORE_INDEX)


def compute_loss_of_selected_logits(hidden_states: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross entropy from the logits of the loss tokens."""
    is_loss_token = labels[0, 1:] != IGNORE_INDEX
    return F.cross_entropy(head(hidden_states[0, :-1][is_loss_token]), labels[0, 1:][is_loss_token])


# Contender -> (loss function, share of the tokens whose logits are held at once; None: a constant number).
CONTENDERS: dict[str, tuple[Callable, float | None]] = {
    "logits of all tokens": (compute_loss_of_all_logits, 1.0),
    "logits of loss tokens": (compute_loss_of_selected_logits, LOSS_TOKEN_SHARE),
    "ours": (compute_token_loss, None),
}


def fits_in_memory(logits_share: float | None, tokens: int, vocabulary: int) -> bool:
    """Estimate whether the logits fit into half of the free memory.

    Logits, log-probabilities and gradients have 4 bytes per number each (float32).
    """
    return logits_share is None or 3 * 4 * logits_share * tokens * vocabulary < 0.5 * psutil.virtual_memory().available


def start_contender(
    name: str, tokens: int, vocabulary: int, hidden: int, train_head: bool
) -> tuple[dict, Callable[[], dict]]:
    """Measure a contender's peak bytes beyond the inputs, and its loss.

    Returns:
        `peak` and `loss`, and a function that measures `seconds` of the next forward and backward pass.
    """
    loss_fn, _ = CONTENDERS[name]
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(train_head)
    hidden_states = torch.randn(1, tokens, hidden, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    labels = labels.masked_fill(torch.rand(1, tokens) > LOSS_TOKEN_SHARE, IGNORE_INDEX)

    def run_step() -> dict:
        head.zero_grad()
        hidden_states.grad = None
        start = time.perf_counter()
        loss = loss_fn(hidden_states, head, labels)
        loss.backward()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}

    # Warm-up on 8 tokens: libraries are loaded at first use.
    loss_fn(hidden_states[:, :8], nn.Linear(hidden, 8), labels[:, :8].clamp(max=7)).backward()
    bytes_before = reset_peak_memory(torch.device("cpu"))
    loss = run_step()["loss"]
    return {"peak": get_peak_memory(torch.device("cpu")) - bytes_before, "loss": loss}, run_step


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 32k tokens x 152k vocabulary")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default: {DEFAULT_SHAPE['tokens']}")
    parser.add_argument("--vocabulary", type=int, help=f"default: {DEFAULT_SHAPE['vocabulary']}")
    parser.add_argument("--hidden", type=int, help=f"hidden size (default: {DEFAULT_SHAPE['hidden']})")
    parser.add_argument("--train_head", action="store_true", help="compute gradients of the LM head's weight, too")
    parser.add_argument("--turns", type=int, default=9, help="measurements per contender (default: %(default)s)")
    args = parser.parse_args(argv)
    defaults = FULL_SHAPE if args.full else DEFAULT_SHAPE
    shape = {name: getattr(args, name) or value for name, value in defaults.items()}
    header = f"{'tokens':>8}{'vocabulary':>12}  {'contender':24}{'seconds':>22}{'times ours':>22}"
    print(f"{header}{'peak MB':>9}{'loss':>10}")
    for tokens in shape["tokens"]:
        fits = {name: fits_in_memory(share, tokens, shape["vocabulary"]) for name, (_, share) in CONTENDERS.items()}
        tasks = {
            name: shape | {"name": name, "tokens": tokens, "train_head": args.train_head}
            for name in CONTENDERS
            if fits[name]
        }
        measured = measure_in_turns("internvl.tools.benchmark_loss:start_contender", tasks, [{}] * args.turns)
        for name in CONTENDERS:
            label = f"{tokens:8,}{shape['vocabulary']:12,}  {name:24}"
            if not fits[name]:
                print(f"{label}skipped: not enough free memory", flush=True)
                continue
            seconds, facts = measured[name].list_values("seconds"), measured[name].facts
            relative = compare_turns(seconds, measured["ours"].list_values("seconds"))
            columns = f"{format_interval(compute_median_interval(seconds)):>22}{format_interval(relative):>22}"
            print(f"{label}{columns}{facts['peak'] / 1e6:9,.0f}{facts['loss']:10.5f}", flush=True)


if __name__ == "__main__":
    main()
