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
from typing import Any

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
from internvl.checkpoint.manifest import UNIVERSAL_DIR
from internvl.checkpoint.saved_states import find_number_error, find_tensor_error, one_line_state_errors
from internvl.dist_utils import run_on_rank_0
from internvl.model.internvl_chat.zero3 import gathered_parameters, get_full_shape
from internvl.regular_files import open_regular_file

logger = logging.getLogger(__name__)
OPTIMIZER_STATE_FILE = "optimizer.safetensors"
LATEST_FILE = "latest"  # DeepSpeed writes the name of the folder of its files into it
MAX_NAME_BYTES = 1024  # of `latest`, which names DeepSpeed's folder
MASTER_WEIGHT_KEY, MOMENT_KEYS = "fp32", ("exp_avg", "exp_avg_sq")  # the names that DeepSpeed and torch use
CPU_ADAM = "DeepSpeedCPUAdam"  # importing the class compiles it
CODE_KEYS = ("state1", "state2")  # 8-bit moments of bitsandbytes


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


def load_engine_states(
    engine,
    parameters: Mapping[str, nn.Parameter],
    checkpoint: Path,
    is_rank_0: bool,
    strict: bool,
    global_step: int,
    has_same_groups: bool,
):
    """Load optimizer states into a DeepSpeed engine. A collective.

    Args:
        strict: whether DeepSpeed's files must hold all weights, as they do without adapters.
        global_step: of the checkpoint.
        has_same_groups: whether the parameter groups are those of the run that wrote the checkpoint.

    Raises:
        ValueError: the checkpoint was not written under DeepSpeed, is damaged, or holds other parameters.
    """
    with one_line_state_errors(checkpoint):
        if (checkpoint / OPTIMIZER_STATE_FILE).exists():
            load_optimizer_states(engine, parameters, checkpoint, global_step)
        elif matches_deepspeed_shards(engine, checkpoint) and (has_same_groups or not engine.zero_optimization()):
            deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=strict)
        elif not is_adamw(engine.optimizer.optimizer):
            raise ValueError(
                f"{checkpoint} was written with another number of ranks, ZeRO stage or rates per part. Only the states "
                "of AdamW can be converted: resume with the same, or start again with --overwrite_output_dir True."
            )
        else:
            logger.info("Converting optimizer states: %s has other ranks, ZeRO stage or parameter groups", checkpoint)
            load_converted_optimizer_states(engine, parameters, checkpoint, is_rank_0)
        _check_loaded_states(engine, checkpoint)
        _replay_bias_correction(engine)


def _replay_bias_correction(engine) -> None:
    """Bring the powers of the betas in DeepSpeed's CPU Adam to the loaded step.

    DeepSpeed 0.19 multiplies them up step by step, in C++. Computed at once, as after loading, they round differently.
    """
    optimizer: Any = getattr(engine.optimizer, "optimizer", None)
    if type(optimizer).__name__ != CPU_ADAM:
        return
    (num_steps,) = {int(state["step"]) for state in optimizer.state.values()} or {0}
    groups, dummy = optimizer.param_groups, torch.zeros(1)
    dummy.grad = torch.zeros(1)
    optimizer.param_groups = [{**groups[0], "params": [dummy]}]
    for _ in range(num_steps):
        optimizer.step()
    optimizer.param_groups = groups
    del optimizer.state[dummy]


def is_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Check for AdamW of torch, or DeepSpeed's for offloaded states."""
    return isinstance(optimizer, torch.optim.AdamW) or type(optimizer).__name__ == CPU_ADAM


def _check_loaded_states(engine, checkpoint: Path) -> None:
    """Check this rank's part of the loaded states.

    Raises:
        ValueError: a moment or master weight is not finite.
    """
    for flat, states in getattr(engine.optimizer, "optimizer", engine.optimizer).state.items():
        for name, tensor in {MASTER_WEIGHT_KEY: flat, **states}.items():
            is_code = name in CODE_KEYS and getattr(tensor, "dtype", None) == torch.uint8
            is_checked = isinstance(tensor, torch.Tensor) and not is_code
            if is_checked and (error := find_tensor_error(tensor, tensor.shape, name)):
                raise ValueError(f"The optimizer state of {checkpoint} is invalid: {error}.")


def load_optimizer_states(engine, parameters: Mapping[str, nn.Parameter], folder: Path, global_step: int) -> None:
    """Load the file of `save_optimizer_states`. A collective.

    Raises:
        ValueError: the file holds other parameters, or invalid values.
    """
    path = folder / OPTIMIZER_STATE_FILE
    with one_line_state_errors(path), open_regular_file(path), safe_open(path, "pt") as file:
        expected = {f"{name}.{key}" for name in parameters for key in (MASTER_WEIGHT_KEY, *MOMENT_KEYS)}
        if differing := sorted(expected ^ set(file.keys())):
            raise ValueError(
                f"{path} holds other parameters than this run trains: {len(differing)} differ, such as {differing[0]}."
            )
        step, scaler_state = _read_metadata(path, file.metadata() or {}, engine.optimizer.loss_scaler, global_step)

        def read(name: str, key: str) -> torch.Tensor:
            full_name = f"{name}.{key}"
            tensor = file.get_tensor(full_name)
            if error := find_tensor_error(tensor, get_full_shape(parameters[name]), full_name):
                raise ValueError(f"{path} is invalid: {error}.")
            return tensor

        _set_states(engine, parameters, read, step)
        vars(engine.optimizer.loss_scaler).update(scaler_state)


def _read_metadata(path: Path, metadata: dict[str, str], loss_scaler, global_step: int) -> tuple[int, dict]:
    """Return the number of optimizer steps, and the numbers of the loss scaler."""
    step = metadata.get("step", "")
    if not (step.isascii() and step.isdecimal() and len(step) < 19 and 1 <= int(step) <= global_step):
        raise ValueError(f"{path} is invalid: step is {step!r:.80}, expected 1 to {global_step}.")
    own, saved = _loss_scaler_state(loss_scaler), json.loads(metadata.get("loss_scaler", "null"))
    if error := find_number_error(saved, own, "loss_scaler"):
        raise ValueError(f"{path} is invalid: {error}.")
    return int(step), {name: saved[name] for name in own}


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
    run_on_rank_0(lambda: _convert_to_universal(shards, converted))
    saved = torch.load(converted / "zero/optimizer_state.pt", weights_only=True)
    # ZeRO-3 keeps the step number with the states, ZeRO-1 and ZeRO-2 in a file for each parameter.
    zero3_states = saved.get("optimizer_state_dict", {}).get("state")
    files = [] if zero3_states else converted.glob("zero/*/step.pt")
    steps = [zero3_states[0]["step"]] if zero3_states else [torch.load(file, weights_only=True) for file in files]

    def read(name: str, key: str) -> torch.Tensor:
        tensor = torch.load(converted / "zero" / name / f"{key}.pt", weights_only=True)
        return (tensor["param"] if isinstance(tensor, dict) else tensor).view(get_full_shape(parameters[name]))

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
    if not files:
        raise ValueError(f"{shards} holds no optimizer states (*_optim_states.pt).")
    stage = torch.load(files[0], weights_only=True, map_location="meta")["optimizer_state_dict"].get("zero_stage")
    return len(files) == engine.dp_world_size and int(stage) == engine.zero_optimization_stage()


def find_deepspeed_shards(folder: Path) -> Path:
    """Return the folder of DeepSpeed's files in a checkpoint.

    Raises:
        ValueError: there is none, or `latest` names a folder elsewhere.
    """
    if not (folder / LATEST_FILE).exists():
        raise ValueError(f"{folder} was written without DeepSpeed: resume without --deepspeed.")
    with open_regular_file(folder / LATEST_FILE, MAX_NAME_BYTES) as file:
        name = file.read().decode(errors="replace").strip()
    if not (folder / name).is_dir() or (folder / name).resolve().parent != folder.resolve():
        raise ValueError(f"{folder / 'latest'} names {name!r:.80}, which is not a folder in {folder}.")
    return folder / name


def _convert_to_universal(shards: Path, converted: Path) -> None:
    """Run DeepSpeed's converter.

    Raises:
        ValueError: the files are damaged.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(converted, ignore_errors=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": False}
    options |= {"inject_missing_state": True, "input_folder": str(shards), "output_folder": str(converted)}
    # The converter prints its progress, a page of text.
    with (
        one_line_state_errors(shards),
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
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
        if type(torch_optimizer).__name__ == CPU_ADAM:
            num_steps = step
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENT_KEYS}
        torch_optimizer.state[flat] = {"step": num_steps, **moments}
    link_optimizer_states(optimizer)


def _loss_scaler_state(loss_scaler) -> dict:
    """Return the numbers of an fp16 loss scaler."""
    return {name: value for name, value in vars(loss_scaler).items() if isinstance(value, (int, float, bool))}
