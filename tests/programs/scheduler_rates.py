"""Write the learning rates of every scheduler, on the optimizer of one run.

    python scheduler_rates.py FLAGS

The optimizer is the one of a real run, wrapped by accelerate and, with --deepspeed, by DeepSpeed. The output folder
gets `rates.json`: scheduler -> a list per step with the rate of each parameter group.
"""

import json
import sys
from pathlib import Path

from helpers.training_runs import prepare_trainer

from internvl.arguments.schedulers import STEP_SCHEDULERS
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group

NUM_STEPS = 10
# scheduler -> --lr_scheduler_kwargs
ARGUMENTS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
}


def list_rates(trainer, name: str) -> list[list[float]]:
    """Return the rates of one scheduler: a list per step."""
    trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs = name, ARGUMENTS.get(name)
    trainer.args.warmup_steps, trainer.lr_scheduler, rates = 3, None, []
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    scheduler = trainer.create_scheduler(NUM_STEPS, trainer.optimizer)
    for _ in range(NUM_STEPS):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        scheduler.step()
    return rates


def main() -> None:
    with abort_all_ranks_on_error():
        join_process_group()
        trainer = prepare_trainer(sys.argv[1:])
        trainer.train()
        rates = {name: list_rates(trainer, name) for name in STEP_SCHEDULERS}
        Path(trainer.args.output_dir, "rates.json").write_text(json.dumps(rates))
    exit_process_group(0)


if __name__ == "__main__":
    main()
