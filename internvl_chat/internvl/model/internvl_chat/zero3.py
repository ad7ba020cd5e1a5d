"""Parameters that DeepSpeed ZeRO-3 partitions over ranks.

Such a parameter is empty between the modules that use it. DeepSpeed (0.19) adds attributes to it: `ds_id` and the full
shape `ds_shape`.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Check whether ZeRO-3 partitions a parameter."""
    return hasattr(parameter, "ds_id")


def get_full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered_parameters(*parameters: nn.Parameter) -> AbstractContextManager:
    """Gather parameters that ZeRO-3 partitions, within a context.

    Inside it they have their full shape and may be modified, in the same way on all ranks. Without ZeRO-3 it does
    nothing.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
