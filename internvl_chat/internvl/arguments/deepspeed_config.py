"""Read the DeepSpeed configuration file of a run."""

import json
from pathlib import Path

import transformers

ZERO_CONFIG_DIR = Path(__file__).resolve().parents[3] / "zero_stage_configs"
if not ZERO_CONFIG_DIR.is_dir():  # in an upstream checkout the files are next to the package
    ZERO_CONFIG_DIR = Path(__file__).resolve().parents[2]

CONFIG_BLOCKS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16")  # of a DeepSpeed configuration


def load_deepspeed_config(name: str, args: transformers.TrainingArguments) -> dict:
    """Load a DeepSpeed configuration by path or bare name.

    A bare name is a file in `zero_stage_configs/`. The AdamW block is removed: the trainer builds the same AdamW, with
    a learning rate per part, from the flags that the block's `auto` values refer to. `wall_clock_breakdown` is kept
    with --log_level debug only, because it prints and synchronizes the device in every micro-batch.

    Raises:
        ValueError: no such file, not a valid configuration, or the AdamW block contradicts the flags.
    """
    path = next((p for p in (Path(name), ZERO_CONFIG_DIR / name) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in ZERO_CONFIG_DIR.glob("*.json")))
        raise ValueError(f"--deepspeed {name}: no such file; expected a path, or one of {known}.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # invalid JSON or invalid UTF-8
        raise ValueError(f"--deepspeed {path} is not valid JSON: {error}.") from error
    blocks = [config, *(config.get(key, {}) for key in CONFIG_BLOCKS)] if isinstance(config, dict) else [config]
    if invalid := [block for block in blocks if not isinstance(block, dict)]:
        raise ValueError(f"--deepspeed {path} is invalid: expected JSON objects, got {invalid[0]!r}.")
    config["wall_clock_breakdown"] = config.get("wall_clock_breakdown", False) and args.log_level == "debug"
    optimizer = {"params": {}} | config.pop("optimizer", {"type": "AdamW"})
    if optimizer.get("type") != "AdamW":
        raise ValueError(f"--deepspeed {path}: optimizer {optimizer.get('type')} is not supported: expected AdamW.")
    check_optimizer_params(path, optimizer["params"], args)
    return config


def check_optimizer_params(path: Path, params: dict, args: transformers.TrainingArguments) -> None:
    """Raise a ValueError if AdamW's parameters in the file contradict the flags."""
    flags = {
        "lr": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if not isinstance(params, dict):
        raise ValueError(f"--deepspeed {path} is invalid: expected optimizer params as a JSON object, got {params!r}.")
    for key, value in params.items():
        if value != "auto" and value != flags.get(key):
            raise ValueError(
                f"--deepspeed {path}: optimizer {key} {value} contradicts the command line, which has {flags.get(key)}."
            )


def get_zero_stage(deepspeed_config: dict | str | None) -> int:
    """Return the ZeRO stage of a loaded configuration, 0 without one."""
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0) if isinstance(deepspeed_config, dict) else 0
