"""Plan of an evaluation: the packed rows of all sets, and the forward pass that each belongs to."""

import numpy as np

from internvl.evaluation.settings import EvaluationSettings
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleCost, plan_epoch

TOKENS_ONLY = SampleCost()


def plan_evaluation(
    lengths: np.ndarray,
    settings: EvaluationSettings,
    world_size: int,
    sample_cost: SampleCost = TOKENS_ONLY,
    max_shared_tokens: int | None = None,
) -> EpochPlan:
    """Plan packed rows, one per rank and step; the same in every evaluation.

    A sample larger than a row has a row of its own.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS; samples of 0 tokens are not evaluated.
        sample_cost: ranks run rows of nearly equal cost in each forward pass.
        max_shared_tokens: a sample of more tokens has a row of its own, too.

    Returns:
        A plan whose steps are (num_steps, 1, world_size, 1); all ranks have the same number, some without a row.
    """
    room = lengths.copy()  # that each sample takes in its row
    max_tokens = min(settings.max_tokens, max_shared_tokens or settings.max_tokens)
    is_oversized = (lengths["tokens"] > max_tokens) | (lengths["tiles"] > settings.max_tiles)
    room["tokens"][is_oversized], room["tiles"][is_oversized] = settings.max_tokens, settings.max_tiles
    layout = PlanLayout(
        seed=0,
        world_size=world_size,
        micro_batch_size=1,
        gradient_accumulation=1,
        packed=True,
        max_tokens=settings.max_tokens,
        max_tiles=settings.max_tiles,
        sample_cost=sample_cost,
    )
    return plan_epoch(room, layout, epoch=0)
