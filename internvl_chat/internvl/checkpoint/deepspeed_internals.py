"""Private names of DeepSpeed that this package uses, as of version 0.19.8.

`PRIVATE_NAMES` lists them. A test fails with the private name when a new version of DeepSpeed moves it.
"""

import torch

# Class of DeepSpeed -> undocumented attributes and methods that are used.
PRIVATE_NAMES = {
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "scaled_global_norm",  # norm of the gradient of the next step, times the loss scale
        "loss_scale",
        "averaged_gradients",  # group -> gradients of this rank's partition
        "norm_for_param_grads",  # parameter id -> norm of an offloaded gradient
        "single_partition_of_fp32_groups",  # this rank's share of the fp32 master weights, one tensor per group
        "bit16_groups",
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "_get_norm_groups",
        "loss_scale",
        "averaged_gradients",
        "norm_for_param_grads",
        "fp32_partitioned_groups_flat",
        "checkpoint_event_epilogue",
    ),
}
PRIVATE_FUNCTIONS = ("deepspeed.utils.lazy_init_hp_params_optimizer_state",)


def compute_grad_norm(optimizer) -> float:
    """Compute the gradient norm of a ZeRO optimizer before its step.

    It is the same on all ranks. A collective.
    """
    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and ZeRO-2
        norm = optimizer.scaled_global_norm()
    else:
        norms = torch.tensor([float(norm) for norm in optimizer._get_norm_groups()])
        norm = norms.where(norms >= 0, torch.inf).norm()  # -1: the norm of the group is not finite
    return float(norm) / optimizer.loss_scale


def set_grads_to_inf(optimizer) -> None:
    """Set gradients to infinity, which makes a ZeRO optimizer skip its step.

    If gradients are offloaded, the optimizer checks only their norms.
    """
    for gradients in optimizer.averaged_gradients.values():
        for gradient in gradients or ():
            gradient.fill_(torch.inf)
    norms = getattr(optimizer, "norm_for_param_grads", {})
    norms.update({parameter_id: torch.full_like(norm, torch.inf) for parameter_id, norm in norms.items()})


def get_flat_master_weights(optimizer) -> list[torch.Tensor]:
    """Return this rank's master weights: one flat fp32 tensor per group."""
    zero3_groups = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return optimizer.single_partition_of_fp32_groups if zero3_groups is None else zero3_groups


def link_optimizer_states(optimizer) -> None:
    """Link each parameter to its slice of the flat states (ZeRO-1, ZeRO-2).

    DeepSpeed does this after the step of its first parameter group, when the other groups have no states yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(getattr(optimizer, "bit16_groups", ()), get_flat_master_weights(optimizer), strict=False):
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)


def persist_small_parameters(engine) -> None:
    """Gather small parameters again, as ZeRO-3 expects them between steps."""
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_epilogue()
