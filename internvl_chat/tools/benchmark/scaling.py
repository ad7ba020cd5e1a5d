"""Our step on several ranks under DeepSpeed's ZeRO, and what of it is communication. Started by
`tools/benchmark_step.py --scaling` through torchrun, one process a rank."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.comm import comms_logger

from internvl.dist_utils import init_deepspeed, init_dist, rank, world_size

from .contenders import ours
from .measure import RATE
from .samples import batches_of, make_samples, plan_of, sizes_of_samples
from .sizes import SIZES, Size, config_of

CONFIGS = Path(__file__).resolve().parents[3] / "zero_stage_configs"
WARM_UP = 1  # steps that are not counted
# Bytes of the whole tensor of a collective, from those that DeepSpeed logs: a rank's share of what is gathered.
GATHERING = ("all_gather_into_tensor", "all_gather", "allgather_fn")


def measure_stage(stage: int, size: Size, samples: int, checkpointing: bool) -> dict:
    config, ranks = config_of(size), world_size()
    lengths = sizes_of_samples(config, samples)
    plan = plan_of(config, lengths, packed=True, by_length=False, world_size=ranks)
    full = (plan.steps >= 0).all(axis=(1, 2, 3))
    steps = batches_of(replace(plan, steps=plan.steps[full]), make_samples(config, lengths, size.dtype), rank())
    model = ours(size, checkpointing, dropout=0.05)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, RATE), config=settings(stage, size, ranks)
    )
    for number, (batch,) in enumerate(steps):
        if number == WARM_UP:
            dist.barrier()
            comms_logger.reset_data()
            start = time.perf_counter()
        engine.backward(engine(**batch).loss)
        engine.step()
    dist.barrier()
    seconds = time.perf_counter() - start
    print(
        rank(),
        stage,
        seconds,
        {k: {m: (v[0], sum(v[1])) for m, v in d.items()} for k, d in comms_logger.comms_dict.items()},
    )


def settings(stage: int, size: Size, ranks: int) -> dict:
    config = json.loads((CONFIGS / f"zero_stage{stage}_config.json").read_text())
    config |= {"train_batch_size": ranks, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 1.0, "fp16": {"enabled": False}, "bf16": {"enabled": size.dtype == torch.bfloat16}}
    config["wall_clock_breakdown"] = False
    config["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    del config["optimizer"]
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = int(sys.argv[3])
    return config


if __name__ == "__main__":
    init_dist()
    init_deepspeed()
    for stage in (1, 2, 3):
        measure_stage(stage, SIZES[sys.argv[1]], int(sys.argv[2]), True)
    dist.destroy_process_group()
