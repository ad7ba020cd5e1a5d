"""DeepSpeed optimizer states by parameter name, for any number of ranks.

DeepSpeed writes one file per rank. Only the same number of ranks at the same ZeRO stage can read them. Adapter
checkpoints have one file with the gathered states instead. The states of full fine-tuning are too large for one rank:
they stay in DeepSpeed's files, and its converter gathers them if the number of ranks changes. Here both are read by
parameter name.
"""

import contextlib
import json
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from internvl.checkpoint.deepspeed_internals import (
    get_flat_master_weights,
    link_optimizer_states,
    persist_small_parameters,
)
from internvl.model.internvl_chat.zero3 import gathered_parameters

logger = logging.getLogger(__name__)
OPTIMIZER_STATE_FILE = "optimizer.safetensors"
MASTER_WEIGHT_KEY, MOMENT_KEYS = "fp32", ("exp_avg", "exp_avg_sq")  # the names that DeepSpeed and torch use
UNIVERSAL_DIR = "universal"  # output of DeepSpeed's converter in the checkpoint, removed after reading


def save_optimizer_states(engine, parameters: Mapping[str, nn.Parameter], folder: Path, is_writer: bool) -> None:
    """Write master weights and AdamW moments under parameter names. A collective.

    Args:
        engine: DeepSpeed engine, at any ZeRO stage.
        parameters: the trainable parameters by name.
        is_writer: whether this rank writes; all ranks gather.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = [state for state in engine.optimizer.optimizer.state.values() if MOMENT_KEYS[0] in state]
    if states:
        link_optimizer_states(engine.optimizer)
    tensors = {}
    for name, parameter in parameters.items():
        gathered = {MASTER_WEIGHT_KEY: safe_get_full_fp32_param(parameter)}
        if states:
            gathered |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENT_KEYS}
        if is_writer:
            # pyrefly: ignore[missing-attribute]  # DeepSpeed declares None for parameters that it does not know
            tensors |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in gathered.items()}
    if is_writer:
        step = int(states[0]["step"]) if states else 0
        metadata = {"step": str(step), "loss_scaler": json.dumps(_loss_scaler_state(engine.optimizer.loss_scaler))}
        save_file(tensors, folder / OPTIMIZER_STATE_FILE, metadata=metadata)


def load_engine_states(engine, parameters: Mapping[str, nn.Parameter], checkpoint: Path, is_rank_0: bool, strict: bool):
    """Load optimizer states into a DeepSpeed engine. A collective.

    Args:
        strict: whether DeepSpeed's files must hold all weights, as they do without adapters.

    Raises:
        ValueError: the checkpoint was not written under DeepSpeed, or holds other parameters.
    """
    if (checkpoint / OPTIMIZER_STATE_FILE).is_file():
        load_optimizer_states(engine, parameters, checkpoint)
    elif matches_deepspeed_shards(engine, checkpoint):
        deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=strict)
    else:
        logger.info("Converting optimizer states: %s has another number of ranks or ZeRO stage", checkpoint)
        load_converted_optimizer_states(engine, parameters, checkpoint, is_rank_0)


def load_optimizer_states(engine, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Load the file of `save_optimizer_states`. A collective.

    Raises:
        ValueError: the file holds other parameters.
    """
    with safe_open(folder / OPTIMIZER_STATE_FILE, "pt") as file:
        expected = {f"{name}.{key}" for name in parameters for key in (MASTER_WEIGHT_KEY, *MOMENT_KEYS)}
        if differing := sorted(expected ^ set(file.keys())):
            raise ValueError(
                f"{folder / OPTIMIZER_STATE_FILE} holds other parameters than this run trains: {len(differing)} "
                f"differ, such as {differing[0]}."
            )
        metadata = file.metadata()
        _set_states(engine, parameters, lambda name, key: file.get_tensor(f"{name}.{key}"), int(metadata["step"]))
        vars(engine.optimizer.loss_scaler).update(json.loads(metadata["loss_scaler"]))


def load_converted_optimizer_states(
    engine, parameters: Mapping[str, nn.Parameter], folder: Path, is_rank_0: bool
) -> None:
    """Load DeepSpeed's files of other ranks or ZeRO stage. A collective.

    Args:
        folder: a checkpoint that contains the folder of DeepSpeed's files.
        is_rank_0: whether this rank converts them.
    """
    from deepspeed import comm

    shards, converted = find_deepspeed_shards(folder), folder / UNIVERSAL_DIR
    if is_rank_0:
        _convert_to_universal(shards, converted)
    comm.barrier()
    saved = torch.load(converted / "zero/optimizer_state.pt", weights_only=True)
    # ZeRO-3 keeps the step number with the states, ZeRO-1 and ZeRO-2 in a file for each parameter.
    zero3_states = saved.get("optimizer_state_dict", {}).get("state")
    files = [] if zero3_states else converted.glob("zero/*/step.pt")
    steps = [zero3_states[0]["step"]] if zero3_states else [torch.load(file, weights_only=True) for file in files]

    def read(name: str, key: str) -> torch.Tensor:
        tensor = torch.load(converted / "zero" / name / f"{key}.pt", weights_only=True)
        return tensor["param"] if isinstance(tensor, dict) else tensor

    _set_states(engine, parameters, read, int(steps[0]))
    vars(engine.optimizer.loss_scaler).update(_loss_scaler_state(saved["loss_scaler"]))
    comm.barrier()
    if is_rank_0:
        shutil.rmtree(converted)


def matches_deepspeed_shards(engine, folder: Path) -> bool:
    """Check that DeepSpeed's files fit this engine's ranks and ZeRO stage.

    Raises:
        ValueError: there are none.
    """
    shards = find_deepspeed_shards(folder)
    if not engine.zero_optimization():
        return True
    files = sorted(shards.glob("*_optim_states.pt"))
    stage = torch.load(files[0], weights_only=True, map_location="meta")["optimizer_state_dict"].get("zero_stage")
    return len(files) == engine.dp_world_size and int(stage) == engine.zero_optimization_stage()


def find_deepspeed_shards(folder: Path) -> Path:
    """Return the folder of DeepSpeed's files in a checkpoint.

    Raises:
        ValueError: there is none, or `latest` names a folder elsewhere.
    """
    if not (folder / "latest").is_file():
        raise ValueError(f"{folder} was written without DeepSpeed: resume without --deepspeed.")
    name = (folder / "latest").read_text().strip()
    if not (folder / name).is_dir() or (folder / name).resolve().parent != folder.resolve():
        raise ValueError(f"{folder / 'latest'} names {name!r}, which is not a folder in {folder}.")
    return folder / name


def _convert_to_universal(shards: Path, converted: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(converted, ignore_errors=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": False}
    options |= {"inject_missing_state": True, "input_folder": str(shards), "output_folder": str(converted)}
    # The converter prints its progress, a page of text.
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        ds_to_universal.main(Namespace(**options))


def _set_states(
    engine, parameters: Mapping[str, nn.Parameter], read_fn: Callable[[str, str], torch.Tensor], step: int
) -> None:
    """Set the states of all parameters.

    Args:
        read_fn: (parameter name, key of a state) -> the gathered tensor.
        step: number of steps that the optimizer has taken.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _create_states(engine.optimizer, step)
    for name, parameter in parameters.items():
        master_weight = read_fn(name, MASTER_WEIGHT_KEY)
        with gathered_parameters(parameter), torch.no_grad():
            parameter.copy_(master_weight.view(parameter.shape))
        safe_set_full_fp32_param(parameter, master_weight.to(parameter.device))
        for key in MOMENT_KEYS:
            safe_set_full_optimizer_state(parameter, read_fn(name, key).to(parameter.device), key)
    persist_small_parameters(engine)


def _create_states(optimizer, step: int) -> None:
    """Create the states that an optimizer creates in its first step."""
    torch_optimizer = optimizer.optimizer
    is_step_on_device = torch_optimizer.defaults.get("fused") or torch_optimizer.defaults.get("capturable")
    for flat in get_flat_master_weights(optimizer):
        num_steps = torch.tensor(float(step), device=flat.device if is_step_on_device else "cpu")
        if type(torch_optimizer).__name__ == "DeepSpeedCPUAdam":
            num_steps = step
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENT_KEYS}
        torch_optimizer.state[flat] = {"step": num_steps, **moments}
    link_optimizer_states(optimizer)


def _loss_scaler_state(loss_scaler) -> dict:
    """Return the numbers of an fp16 loss scaler."""
    return {name: value for name, value in vars(loss_scaler).items() if isinstance(value, (int, float, bool))}
