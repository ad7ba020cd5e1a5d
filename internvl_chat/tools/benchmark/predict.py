"""How our step would scale to many GPUs: arithmetic from the plan's cost model, parameter sizes and stated bandwidths.

Nothing here is measured. A step is one row on each GPU, without accumulation, and nothing of the communication is
hidden behind computation, which is the least favourable case.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from internvl.planning.plan_report import load_imbalance
from internvl.planning.sample_cost import Passes, step_cost

from .contenders import ours
from .samples import plan_of, sizes_of_samples
from .sizes import Size, config_of
from .traffic import Network, counted, seconds

SAMPLES_A_GPU = 2000
ROW = "{ranks:>6}{stage:>7}{waiting:>10}{step:>10}{moved:>12}{communication:>16}{tokens:>14}{efficiency:>13}"
HEADINGS = {name: name for name in ("waiting", "communication", "efficiency")}
HEADINGS |= {"ranks": "GPUs", "stage": "ZeRO", "step": "step", "moved": "moved", "tokens": "tokens/s"}


class Prediction(NamedTuple):
    """Of a step: share of the ranks' time spent waiting for the slowest, seconds, bytes moved, share of communication;
    tokens a second of all GPUs, and how many of those that as many single GPUs would have."""

    ranks: int
    stage: int
    waiting: float
    step: float
    moved: int
    communication: float
    tokens: float
    efficiency: float

    def __str__(self) -> str:
        return ROW.format(
            ranks=self.ranks,
            stage=self.stage,
            waiting=f"{self.waiting:.2%}",
            step=f"{self.step:.3f} s",
            moved=f"{self.moved / 1e9:.2f} GB",
            communication=f"{self.communication:.1%}",
            tokens=f"{self.tokens:,.0f}",
            efficiency=f"{self.efficiency:.1%}",
        )


def predict(size: Size, ranks: int, speed: float, network: Network) -> list[Prediction]:
    """For ZeRO 1, 2 and 3.

    Args:
        speed: FLOPs a second of one GPU at work, recomputation not counted: its peak times MFU.
    """
    config = config_of(size)
    lengths = sizes_of_samples(config, SAMPLES_A_GPU * ranks)
    plan = plan_of(config, lengths, packed=True, by_length=False, world_size=ranks)
    cost = step_cost(config, Passes(2, 2)).of(lengths)  # forward, and gradients of inputs: the weights are frozen
    waiting = load_imbalance(replace(plan, steps=plan.steps[:-1]), cost)
    rows = len(plan.starts) - 1
    computing = float(cost.sum(dtype=float)) / rows / speed
    tokens = float(lengths.tokens.sum()) / rows
    found = []
    for stage in (1, 2, 3):
        moved = counted(stage, **bytes_of_weights(size))
        communicating = seconds(moved, ranks, network)
        step = computing / (1 - waiting) + communicating
        share = communicating / step
        found.append(
            Prediction(ranks, stage, waiting, step, sum(moved.values()), share, ranks * tokens / step, computing / step)
        )
    return found


def bytes_of_weights(size: Size) -> dict[str, int]:
    """As DeepSpeed holds them: adapters, too, in the type of the model."""
    with torch.device("meta"):
        model = ours(size, checkpointing=True, dropout=0.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trained": trained * size.dtype.itemsize,
        "weights": sum(p.numel() for p in model.parameters()) * size.dtype.itemsize,
    }


def show(size_name: str, size: Size, gpus: list[int], peak: float, mfu: float, network: Network) -> list[Prediction]:
    """Prints the table of `size`; `peak` in FLOPs a second."""
    print(f"PREDICTED, not measured: {size_name}, rows of the plan's own length, a row a GPU and step,")
    print(
        f"{peak / 1e12:,.0f} TFLOP/s at an assumed MFU of {mfu:.0%}, {network.within / 1e9:,.0f} GB/s within a node of "
        f"{network.gpus_a_node}, {network.between * 8 / 1e9:,.0f} Gbit/s a GPU between nodes, nothing overlapped."
    )
    print(ROW.format(**HEADINGS))
    table = [line for ranks in gpus for line in predict(size, ranks, peak * mfu, network)]
    print("\n".join(map(str, table)))
    return table
