"""What a plan promises: how full rows are, how long ranks wait for each other, where the time goes.

Printed before the first step and by `tools/check_data.py`; `tools/benchmark_plan.py` measures planners with it.
"""

import numpy as np

from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleLengths


def packing_efficiency(plan: EpochPlan, lengths: SampleLengths, layout: PlanLayout) -> float:
    """Share of the positions of a batch that hold a sample's token: of full rows, or of rows padded to the longest."""
    tokens = _by_slot(plan, lengths.tokens)
    if layout.packed:
        return tokens.sum() / (np.count_nonzero(tokens) * layout.max_tokens)
    return tokens.sum() / (tokens.max(axis=-1) * np.count_nonzero(tokens, axis=-1)).sum()


def load_imbalance(plan: EpochPlan, cost: np.ndarray) -> float:
    """Share of their time that ranks wait for the slowest of each forward and backward pass; (N,) cost of samples."""
    load = _by_slot(plan, cost).sum(axis=-1, dtype=np.float64)
    return 1 - load.sum() / (load.max(axis=-1) * load.shape[-1]).sum()


def _by_slot(plan: EpochPlan, values: np.ndarray) -> np.ndarray:
    """Sum over the samples of the row in each slot: (N,) -> the shape of `plan.steps`; 0 where a slot is empty."""
    return np.append(plan.totals(values), 0)[plan.steps]


def flops_shares(lengths: SampleLengths, layout: PlanLayout) -> dict[str, float]:
    """Share of the FLOPs of an epoch by what they are for."""
    tokens, cost = lengths.tokens.astype(np.float64), layout.cost
    flops = {
        "vision": cost.tile * lengths.tiles.sum(dtype=np.float64),
        "language": cost.token * tokens.sum(),
        "attention": cost.pair * (tokens**2).sum(),
        "head": cost.trained * lengths.trained.sum(dtype=np.float64),
    }
    return {part: value / sum(flops.values()) for part, value in flops.items()}


def format_plan(lengths: SampleLengths, plan: EpochPlan, layout: PlanLayout, left_out: int) -> str:
    """A table of an epoch, in lines."""
    tokens = plan.totals(lengths.tokens)
    tiles = plan.totals(lengths.tiles)
    longest, filled = int(tokens.argmax()), packing_efficiency(plan, lengths, layout)
    slots = f"{layout.world_size} ranks x {layout.micro_batch} rows x {layout.accumulation} accumulated"
    shares = ", ".join(f"{part} {share:.0%}" for part, share in flops_shares(lengths, layout).items())
    lines = {
        "samples": f"{len(plan.samples):,} an epoch ({left_out:,} left out)",
        "tokens": f"{tokens.sum():,}, {lengths.trained[plan.samples].sum():,} of them trained",
        "tiles": f"{tiles.sum():,}",
        "rows": f"{len(tokens):,} of {len(plan.samples) / len(tokens):.1f} samples, filled to {filled:.1%}",
        "steps": f"{len(plan):,} an epoch: {slots}",
        "waiting": f"{load_imbalance(plan, layout.cost.of(lengths)):.2%} of a rank's time, expected",
        "longest row": f"{tokens[longest]:,} tokens, {tiles[longest]} tiles; most tiles in a row: {tiles.max()}",
        "time goes to": shares,
    }
    return "\n".join(f"  {name:13}{text}" for name, text in lines.items())
