"""Our step on several ranks under DeepSpeed's ZeRO, and what of it is communication: one process a rank, started by
`tools/benchmark_step.py --scaling` through torchrun."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import comms_logger, timers
from torch import nn

from internvl.dist_utils import gather_objects, init_deepspeed, init_dist, rank, world_size
from internvl.train.param_groups import num_elements as numel

from .contenders import ours
from .measure import RATE
from .samples import batches_of, make_samples, plan_of, sizes_of_samples
from .sizes import SIZES, Size, config_of
from .traffic import counted

CONFIGS = Path(__file__).resolve().parents[3] / "zero_stage_configs"
WARM_UP = 2  # steps that are not counted
REAL = 8e9  # parameters of the models that ZeRO-3's sizes in the configurations are made for
SIZES_OF_STAGE_3 = (
    "sub_group_size reduce_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance"
).split()


def measure_stage(stage: int, size: Size, samples: int, checkpointing: bool) -> dict:
    """Per step: `seconds`; `alone`, the same without DeepSpeed; `collectives`, the seconds in which this rank waited in
    one, for others, too (gathers that run beside ZeRO-3's computation count only where it waits on the call); bytes
    that it moves, as DeepSpeed logs them and as `traffic` counts them: a tensor that ends up, or is added up, on all
    ranks counts with all its bytes, once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = steps_of_this_rank(size, samples, device)
    with device:
        model = ours(size, checkpointing, dropout=0.05).to(size.dtype)  # adapters, too, as DeepSpeed has them
    alone = train(steps, lambda batch: model(**batch).loss.backward(), model.zero_grad)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = {"trained": sum(map(bytes_of, trained)), "weights": sum(map(bytes_of, model.parameters()))}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, RATE), config=settings(stage, model, size)
    )
    seconds = train(steps, lambda batch: engine.backward(engine(**batch).loss), engine.step)
    comms_logger.enabled = False
    count = len(steps) - WARM_UP
    return {
        "stage": stage,
        "steps": count,
        "seconds": seconds / count,
        "alone": alone / count,
        "collectives": sum(timers(name).elapsed() for name in comms_logger.comms_dict) / 1000 / count,
        "logged": {name: whole(name, sizes) / count for name, sizes in comms_logger.comms_dict.items()},
        "counted": counted(stage, **weights),
        "weights": weights,
    }


def bytes_of(parameter: nn.Parameter) -> int:
    return numel(parameter) * parameter.element_size()


def steps_of_this_rank(size: Size, samples: int, device: torch.device) -> list[dict]:
    """A row for each step, all of which have one on every rank.

    Raises:
        ValueError: too few samples for steps behind the warm-up.
    """
    config = config_of(size)
    lengths = sizes_of_samples(config, samples)
    plan = plan_of(config, lengths, packed=True, by_length=False, world_size=world_size())
    plan = replace(plan, steps=plan.steps[(plan.steps >= 0).all(axis=(1, 2, 3))])
    if len(plan) <= WARM_UP:
        raise ValueError(f"{samples} samples fill {len(plan)} steps, of which {WARM_UP} are not counted: take more")
    batches = [batch for (batch,) in batches_of(plan, make_samples(config, lengths, size.dtype), rank())]
    return [{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]


def train(batches: list[dict], backward: Callable, step: Callable) -> float:
    """Seconds for all batches but the first few; what was logged about those is forgotten."""
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            for name in comms_logger.comms_dict:
                timers(name).reset()
            comms_logger.reset_data()
            start = all_there()
        backward(batch)
        step()
    return all_there() - start


def all_there() -> float:
    """The time when every rank, and its GPU, is done."""
    get_accelerator().synchronize()
    dist.barrier()
    return time.perf_counter()


def whole(name: str, sizes: dict) -> int:
    """Bytes of the whole tensors; of what is gathered, the log has a rank's part."""
    logged = sum(size * found[0] for size, found in sizes.items())
    return logged * world_size() if "gather" in name else logged


def settings(stage: int, model: nn.Module, size: Size) -> dict:
    """Our configuration of that stage; sizes are to ZeRO-3 what they are to a real model."""
    config = json.loads((CONFIGS / f"zero_stage{stage}_config.json").read_text())
    del config["optimizer"]
    share = min(1.0, sum(map(numel, model.parameters())) / REAL)
    zero = config["zero_optimization"]
    zero |= {name: int(zero[name] * share) for name in SIZES_OF_STAGE_3 if stage == 3 and name in zero}
    return config | {
        "train_batch_size": world_size(),
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
    found = measure_stage(task["stage"], SIZES[task["size"]], task["samples"], task["checkpointing"])
    everywhere = gather_objects(found)
    if rank() == 0:
        print(json.dumps(everywhere))
    dist.destroy_process_group()
