"""Our training step under DeepSpeed ZeRO on several ranks, and its communication.

One process per rank, started by `tools/benchmark_step.py --scaling` through torchrun.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import comms_logger, timers
from torch import nn

from internvl.arguments.deepspeed_config import read_deepspeed_config
from internvl.dist_utils import gather_objects, get_rank, get_world_size, init_deepspeed, init_dist
from internvl.train.param_groups import count_elements

from .contenders import build_ours
from .samples import build_batches, draw_sample_lengths, make_random_samples, plan_rows
from .sizes import MODEL_SIZES, ModelSize, build_config, get_image_token_id

NUM_WARM_UP_STEPS = 2  # excluded from time and communication
# The size fields of our ZeRO-3 configuration are meant for models of about this many parameters.
REFERENCE_NUM_PARAMETERS = 8e9
ZERO3_SIZE_FIELDS = (
    "sub_group_size reduce_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance"
).split()


def measure_zero_stage(stage: int, size: ModelSize, num_samples: int, checkpointing: bool) -> dict:
    """Measure step times and communication under a ZeRO stage.

    Returns:
        `seconds` and `seconds_without_deepspeed` of each step. Mean per step: `collective_seconds`, in which this rank
        waited in a collective, also for other ranks (ZeRO-3's asynchronous gathers count only where the rank waits on
        the call); `logged_bytes` and `expected_bytes`, by collective: the bytes of the full tensors, each counted once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = build_rank_batches(size, num_samples, device)
    with device:
        # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`: the checker loses `self`
        model = build_ours(size, checkpointing, dropout=0.05).to(size.dtype)  # DeepSpeed casts adapters, too
    seconds_without = time_steps(batches, lambda batch: model(**batch).loss.backward(), model.zero_grad)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 2e-4)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=build_deepspeed_config(stage, model, size)
    )
    seconds = time_steps(batches, lambda batch: engine.backward(engine(**batch).loss), engine.step)
    comms_logger.enabled = False
    num_steps = len(batches) - NUM_WARM_UP_STEPS
    log = comms_logger.comms_dict
    return {
        "stage": stage,
        "steps": num_steps,
        "seconds": seconds,
        "seconds_without_deepspeed": seconds_without,
        "collective_seconds": sum(timers(name).elapsed() for name in log) / 1000 / num_steps,  # timers are in ms
        "logged_bytes": {name: count_full_tensor_bytes(name, sizes) / num_steps for name, sizes in log.items()},
        "expected_bytes": count_expected_bytes(stage, model),
    }


def count_bytes(parameter: nn.Parameter) -> int:
    """Count the bytes of a parameter, partitioned by ZeRO-3 or not."""
    return count_elements(parameter) * parameter.element_size()


def count_expected_bytes(stage: int, model: nn.Module) -> dict[str, int]:
    """Count the bytes of full tensors per collective in a step.

    ZeRO-1 and -2 all-reduce full gradients (DeepSpeed 0.19, for either value of `reduce_scatter`) and gather the new
    weights. ZeRO-3 gathers all weights in the forward pass and again in the backward pass; recomputed layers share the
    latter gather. Small weights that stay gathered, and weights gathered more often, are not modeled.
    """
    all_bytes = sum(map(count_bytes, model.parameters()))
    trainable_bytes = sum(count_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if stage < 3:
        return {"all_reduce": trainable_bytes, "all_gather_into_tensor": trainable_bytes}
    return {"all_gather_into_tensor": 2 * all_bytes, "reduce_scatter_tensor": trainable_bytes}


def build_rank_batches(size: ModelSize, num_samples: int, device: torch.device) -> list[dict]:
    """Build this rank's packed rows, one per step, on the device.

    Raises:
        ValueError: too few samples for a step after the warm-up.
    """
    config = build_config(size)
    lengths = draw_sample_lengths(config, num_samples)
    plan = plan_rows(config, lengths, packed=True, group_by_length=False, world_size=get_world_size())
    plan = replace(plan, steps=plan.steps[(plan.steps >= 0).all(axis=(1, 2, 3))])  # every rank has a row
    if len(plan) <= NUM_WARM_UP_STEPS:
        raise ValueError(
            f"{num_samples} samples make {len(plan)} steps, expected more than the {NUM_WARM_UP_STEPS} of the warm-up: "
            "increase --samples."
        )
    samples = make_random_samples(config, lengths, size.dtype)
    steps = build_batches(plan, samples, get_rank(), get_image_token_id(config))
    return [{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for (batch,) in steps]


def time_steps(batches: list[dict], backward_fn: Callable, step_fn: Callable) -> list[float]:
    """Measure the seconds of each step after the warm-up.

    The communication log is reset after the warm-up, too.
    """
    seconds = []
    for number, batch in enumerate(batches):
        if number == NUM_WARM_UP_STEPS:
            for name in comms_logger.comms_dict:
                timers(name).reset()
            comms_logger.reset_data()
        start = wait_for_all_ranks()
        backward_fn(batch)
        step_fn()
        seconds.append(wait_for_all_ranks() - start)
    return seconds[NUM_WARM_UP_STEPS:]


def wait_for_all_ranks() -> float:
    """Wait for all ranks and their GPUs, then return the time."""
    get_accelerator().synchronize()
    dist.barrier()
    return time.perf_counter()


def count_full_tensor_bytes(collective: str, sizes: dict) -> int:
    """Count the bytes of the full tensors in DeepSpeed's log.

    Args:
        sizes: message size in bytes -> [count, ...]. For gathers, DeepSpeed logs the size of a rank's partition.
    """
    logged_bytes = sum(size * entry[0] for size, entry in sizes.items())
    return logged_bytes * get_world_size() if "gather" in collective else logged_bytes


def build_deepspeed_config(stage: int, model: nn.Module, size: ModelSize) -> dict:
    """Load our configuration of a ZeRO stage, scaled to the model's size."""
    _, config = read_deepspeed_config(f"zero_stage{stage}_config.json")
    del config["optimizer"]
    scale = min(1.0, sum(map(count_elements, model.parameters())) / REFERENCE_NUM_PARAMETERS)
    zero = config["zero_optimization"]
    zero |= {name: int(zero[name] * scale) for name in ZERO3_SIZE_FIELDS if stage == 3 and name in zero}
    return config | {
        "train_batch_size": get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": size.dtype == torch.bfloat16},
        "wall_clock_breakdown": False,
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    }


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    init_dist()
    init_deepspeed()
    result = measure_zero_stage(task["stage"], MODEL_SIZES[task["size"]], task["num_samples"], task["checkpointing"])
    results = gather_objects(result)
    if get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()
