"""States of DeepSpeed's optimizer by the name of a parameter, so that any number of ranks at any ZeRO stage can go on.

Beside `checkpointing.py`. DeepSpeed writes what each rank holds into a file of its own, which as many ranks at the same
stage can read. A checkpoint of adapters holds whole states instead, in one file; the states of models that train as a
whole are too large for one rank: they stay in DeepSpeed's files, and its converter makes whole states of these when
other ranks want them. Both are read by name here.
"""

import contextlib
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from internvl.model.internvl_chat.resize import gathered_parameters

OPTIMIZER_STATE_FILE = "optimizer.safetensors"
MASTER_WEIGHT_KEY, MOMENT_KEYS = "fp32", ("exp_avg", "exp_avg_sq")  # DeepSpeed's and torch's names
UNIVERSAL_DIR = "universal"


def save_optimizer_states(engine, parameters: Mapping[str, nn.Parameter], folder: Path, write: bool) -> None:
    """Write master weights and AdamW's moments of `parameters`, under their names; a collective.

    Args:
        engine: DeepSpeed's, at any ZeRO stage.
        write: whether this rank writes; the others help to gather.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = [state for state in engine.optimizer.optimizer.state.values() if MOMENT_KEYS[0] in state]
    if states:
        _link(engine.optimizer)
    tensors = {}
    for name, parameter in parameters.items():
        gathered = {MASTER_WEIGHT_KEY: safe_get_full_fp32_param(parameter)}
        if states:
            gathered |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENT_KEYS}
        if write:
            tensors |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in gathered.items()}
    if write:
        step = int(states[0]["step"]) if states else 0
        note = {"step": str(step), "loss_scaler": json.dumps(_numbers(engine.optimizer.loss_scaler))}
        save_file(tensors, folder / OPTIMIZER_STATE_FILE, metadata=note)


def load_optimizer_states(engine, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Put what `save_optimizer_states` wrote into optimizer and parameters; a collective.

    Raises:
        ValueError: it is of other parameters.
    """
    with safe_open(folder / OPTIMIZER_STATE_FILE, "pt") as file:
        expected = {f"{name}.{key}" for name in parameters for key in (MASTER_WEIGHT_KEY, *MOMENT_KEYS)}
        if wrong := sorted(expected ^ set(file.keys())):
            raise ValueError(
                f"{folder / OPTIMIZER_STATE_FILE} is of other parameters: {len(wrong)} differ, such as {wrong[0]}."
            )
        note = file.metadata()
        _put(engine, parameters, lambda name, key: file.get_tensor(f"{name}.{key}"), int(note["step"]))
        vars(engine.optimizer.loss_scaler).update(json.loads(note["loss_scaler"]))


def load_converted_optimizer_states(engine, parameters: Mapping[str, nn.Parameter], folder: Path, first: bool) -> None:
    """Put what DeepSpeed wrote for other ranks, or at another stage, into optimizer and parameters; a collective.

    Args:
        folder: a checkpoint with the folder of DeepSpeed's files in it. first: whether this rank converts them.
    """
    from deepspeed import comm

    shards, converted = find_deepspeed_shards(folder), folder / UNIVERSAL_DIR
    if first:
        _convert(shards, converted)
    comm.barrier()
    saved = torch.load(converted / "zero/optimizer_state.pt", weights_only=True)
    of_zero_3 = saved.get("optimizer_state_dict", {}).get("state")
    files = [] if of_zero_3 else converted.glob("zero/*/step.pt")
    steps = [of_zero_3[0]["step"]] if of_zero_3 else [torch.load(file, weights_only=True) for file in files]

    def read(name: str, key: str) -> torch.Tensor:
        tensor = torch.load(converted / "zero" / name / f"{key}.pt", weights_only=True)
        return tensor["param"] if isinstance(tensor, dict) else tensor

    _put(engine, parameters, read, int(steps[0]))
    vars(engine.optimizer.loss_scaler).update(_numbers(saved["loss_scaler"]))
    comm.barrier()
    if first:
        shutil.rmtree(converted)


def matches_deepspeed_shards(engine, folder: Path) -> bool:
    """Whether DeepSpeed's files in a checkpoint are of as many ranks at the same stage as this engine's.

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
    """The folder of DeepSpeed's files in a checkpoint.

    Raises:
        ValueError: there is none in it.
    """
    if not (folder / "latest").is_file():
        raise ValueError(f"{folder} was not written under DeepSpeed: go on without --deepspeed.")
    name = (folder / "latest").read_text().strip()
    if not (folder / name).is_dir() or (folder / name).resolve().parent != folder.resolve():
        raise ValueError(f"{folder / 'latest'} names {name!r}, which is no folder in {folder}.")
    return folder / name


def _convert(shards: Path, converted: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(converted, ignore_errors=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": False}
    options |= {"inject_missing_state": True, "input_folder": str(shards), "output_folder": str(converted)}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(Namespace(**options))


def _put(engine, parameters: Mapping[str, nn.Parameter], read: Callable[[str, str], torch.Tensor], step: int) -> None:
    """States as read by (name of the parameter, key), after so many steps."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _begin(engine.optimizer, step)
    for name, parameter in parameters.items():
        master = read(name, MASTER_WEIGHT_KEY)
        with gathered_parameters(parameter), torch.no_grad():
            parameter.copy_(master.view(parameter.shape))
        safe_set_full_fp32_param(parameter, master.to(parameter.device))
        for key in MOMENT_KEYS:
            safe_set_full_optimizer_state(parameter, read(name, key).to(parameter.device), key)
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_epilogue()  # small parameters are whole again, as ZeRO-3 expects them


def _begin(optimizer, step: int) -> None:
    """Let the states exist, as after so many steps: torch's optimizers make them in their first one."""
    torch_optimizer = optimizer.optimizer
    on_device = torch_optimizer.defaults.get("fused") or torch_optimizer.defaults.get("capturable")
    for flat in _flat_masters(optimizer):
        steps = torch.tensor(float(step), device=flat.device if on_device else "cpu")
        if type(torch_optimizer).__name__ == "DeepSpeedCPUAdam":
            steps = step
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENT_KEYS}
        torch_optimizer.state[flat] = {"step": steps, **moments}
    _link(optimizer)


def _flat_masters(optimizer) -> list[torch.Tensor]:
    """This rank's share of the fp32 master weights, one tensor a group of parameters."""
    of_zero_3 = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return optimizer.single_partition_of_fp32_groups if of_zero_3 is None else of_zero_3


def _link(optimizer) -> None:
    """Let ZeRO-1 and 2 know where in the flat states those of each parameter are. DeepSpeed does so after the step of
    its first group of parameters, when the others have no states yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(getattr(optimizer, "bit16_groups", ()), _flat_masters(optimizer), strict=False):
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)


def _numbers(loss_scaler) -> dict:
    """What a loss scaler counts with (fp16)."""
    return {name: value for name, value in vars(loss_scaler).items() if isinstance(value, (int, float, bool))}
