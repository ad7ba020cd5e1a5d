"""Read the DeepSpeed configuration file of a run."""

import json
from pathlib import Path

import transformers

ZERO_CONFIG_DIR = Path(__file__).resolve().parents[3] / "zero_stage_configs"
if not ZERO_CONFIG_DIR.is_dir():  # in an upstream checkout the files lie beside the package, as upstream has them
    ZERO_CONFIG_DIR = Path(__file__).resolve().parents[2]

CONFIG_BLOCKS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16")  # of a DeepSpeed configuration


def load_deepspeed_config(name: str, args: transformers.TrainingArguments) -> dict:
    """Read a DeepSpeed configuration given by path or by the bare name of one in `zero_stage_configs/`.

    Its AdamW block is taken out: the trainer builds the same AdamW itself, with a learning rate per part, from the
    flags that the block's `auto` values refer to. Values written out in the block must agree with the flags.
    `wall_clock_breakdown` acts with --log_level debug only: it prints, and waits for the device, at every micro-batch.
    """
    path = next((p for p in (Path(name), ZERO_CONFIG_DIR / name) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in ZERO_CONFIG_DIR.glob("*.json")))
        raise ValueError(f"--deepspeed {name}: no such file, and not one of {known}.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # wrong JSON as well as wrong UTF-8
        raise ValueError(f"--deepspeed {path} is not valid JSON: {error}.") from error
    blocks = [config, *(config.get(key, {}) for key in CONFIG_BLOCKS)] if isinstance(config, dict) else [config]
    if wrong := [block for block in blocks if not isinstance(block, dict)]:
        raise ValueError(f"--deepspeed {path}: {wrong[0]!r} is no object, as the file and each block in it must be.")
    config["wall_clock_breakdown"] = config.get("wall_clock_breakdown", False) and args.log_level == "debug"
    optimizer = {"params": {}} | config.pop("optimizer", {"type": "AdamW"})
    if optimizer.get("type") != "AdamW":
        raise ValueError(f"--deepspeed {path}: optimizer {optimizer.get('type')} is not supported, only AdamW is.")
    flags = {
        "lr": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if not isinstance(optimizer["params"], dict):
        raise ValueError(f"--deepspeed {path}: the optimizer's params are {optimizer['params']!r}, not an object.")
    for key, value in optimizer["params"].items():
        if value != "auto" and value != flags.get(key):
            raise ValueError(
                f"--deepspeed {path} sets optimizer {key} to {value}, the command line to {flags.get(key)}."
            )
    return config
