"""Report on an epoch plan: packing efficiency, load imbalance, FLOPs shares.

Logged before the first step and printed by `tools/check_data.py`. `tools/benchmark_plan.py` compares planners with it.
"""

from typing import NamedTuple

import numpy as np

from internvl.planning.epoch_plan import EpochPlan, PlanLayout


class TruncationSummary(NamedTuple):
    """Samples that lose loss tokens, because they exceed `--max_seq_length` or a row."""

    num_truncated: int
    num_samples: int
    num_lost: int
    num_loss_tokens: int

    @property
    def largest_share(self) -> float:
        """Share of samples that are truncated, or of loss tokens that are lost, whichever is larger."""
        return max(self.num_truncated / max(1, self.num_samples), self.num_lost / max(1, self.num_loss_tokens))

    def __str__(self) -> str:
        return (
            f"{self.num_truncated:,} of {self.num_samples:,} samples, {self.num_lost:,} of {self.num_loss_tokens:,} "
            f"loss tokens lost ({self.num_lost / max(1, self.num_loss_tokens):.1%})"
        )


def summarize_truncation(lengths: np.ndarray, lost_loss_tokens: np.ndarray) -> TruncationSummary:
    """Count truncated samples and lost loss tokens.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS.
        lost_loss_tokens: (N,)
    """
    num_lost = int(lost_loss_tokens.sum(dtype=np.int64))
    return TruncationSummary(
        num_truncated=int(np.count_nonzero(lost_loss_tokens)),
        num_samples=int(np.count_nonzero((lengths["tokens"] > 0) | (lost_loss_tokens > 0))),
        num_lost=num_lost,
        num_loss_tokens=num_lost + int(lengths["loss_tokens"].sum(dtype=np.int64)),
    )


def compute_packing_efficiency(plan: EpochPlan, lengths: np.ndarray, layout: PlanLayout) -> float:
    """Compute the share of non-padding tokens.

    Packed rows are padded to `max_tokens`, others to the longest row of their micro-batch.
    """
    tokens = _sum_per_slot(plan, lengths["tokens"])
    if layout.packed:
        return tokens.sum() / (np.count_nonzero(tokens) * layout.max_tokens)
    return tokens.sum() / (tokens.max(axis=-1) * np.count_nonzero(tokens, axis=-1)).sum()


def compute_load_imbalance(plan: EpochPlan, cost: np.ndarray) -> float:
    """Compute 1 - mean / max cost over ranks.

    This is the share of time that ranks wait for the slowest one, summed over forward passes.

    Args:
        cost: (N,) of samples.
    """
    load = _sum_per_slot(plan, cost).sum(axis=-1, dtype=np.float64)  # (steps, gradient accumulation, ranks)
    return 1 - load.sum() / (sum_slowest_costs(plan, cost) * load.shape[-1])


def sum_slowest_costs(plan: EpochPlan, cost: np.ndarray) -> float:
    """Add up the cost of the slowest rank over all forward passes.

    Args:
        cost: (N,) of samples.
    """
    return float(_sum_per_slot(plan, cost).sum(axis=-1, dtype=np.float64).max(axis=-1).sum())


def _sum_per_slot(plan: EpochPlan, values: np.ndarray) -> np.ndarray:
    """Add up (N,) values per slot of `plan.steps`; empty slots are 0."""
    return np.append(plan.sum_per_row(values), 0)[plan.steps]  # the appended 0 is what -1 indexes


def compute_flops_shares(lengths: np.ndarray, layout: PlanLayout) -> dict[str, float]:
    """Compute the share of an epoch's FLOPs by part of the model."""
    tokens, cost = lengths["tokens"].astype(np.float64), layout.sample_cost
    flops = {
        "vision encoder": cost.per_tile * lengths["tiles"].sum(dtype=np.float64),
        "LLM": cost.per_token * tokens.sum(),
        "attention": cost.per_token_pair * (tokens**2).sum(),
        "LLM head": cost.per_loss_token * lengths["loss_tokens"].sum(dtype=np.float64),
    }
    return {part: value / sum(flops.values()) for part, value in flops.items()}


def format_epoch_plan(
    lengths: np.ndarray, plan: EpochPlan, layout: PlanLayout, num_skipped: int, lost_loss_tokens: np.ndarray
) -> str:
    """Format a table of an epoch's samples, rows and steps.

    Args:
        lengths: as planned; 0 for samples that are skipped when they are loaded.
    """
    tokens, tiles = plan.sum_per_row(lengths["tokens"]), plan.sum_per_row(lengths["tiles"])
    longest = int(tokens.argmax())
    num_samples = np.count_nonzero(lengths["tokens"][plan.samples])
    num_loss_tokens = lengths["loss_tokens"][plan.samples].sum()
    factors = (
        f"{_format_count(layout.world_size, 'rank')} x {layout.micro_batch_size} micro-batch "
        f"x {layout.gradient_accumulation} gradient accumulation"
    )
    shares = compute_flops_shares(lengths, layout)
    lines = {
        "samples": f"{num_samples:,} ({num_skipped:,} skipped)",
        "tokens": f"{tokens.sum():,}, of them {num_loss_tokens:,} loss tokens",
        "truncated answers": str(summarize_truncation(lengths, lost_loss_tokens)),
        "tiles": f"{tiles.sum():,}",
        "rows": f"{plan.num_rows:,} ({num_samples / plan.num_rows:.1f} samples per row)",
        "longest row": (
            f"{tokens[longest]:,} tokens, {_format_count(tiles[longest], 'tile')} (most tiles in a row: {tiles.max()})"
        ),
        "packing efficiency": f"{compute_packing_efficiency(plan, lengths, layout):.1%}",
        "global batch size": f"{_format_count(layout.global_batch_size, 'row')} = {factors}",
        "steps per epoch": f"{len(plan):,}",
        "load imbalance": f"{compute_load_imbalance(plan, layout.sample_cost.compute(lengths)):.2%} (estimated)",
        "FLOPs (estimated)": ", ".join(f"{part} {share:.0%}" for part, share in shares.items()),
    }
    return "\n".join(f"  {name:20}{text}" for name, text in lines.items())


def _format_count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
