"""Run trainings of a tiny model, in new processes or this one."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from helpers.forked_ranks import ForkedRanks
from helpers.paths import FINETUNE_PROGRAM, REPO_ROOT
from safetensors.torch import load_file

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.checkpoint.resume import choose_resume_checkpoint
from internvl.checkpoint.resume_rules import RunRecord
from internvl.constants import SPECIAL_TOKENS
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.launchers import find_free_port
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model, build_tokenizer
from internvl.train.build_trainer import build_trainer
from internvl.train.run_evaluation import build_run_evaluation, check_evaluation_flags
from internvl.train.trainable_parameters import get_untrained_tokens

TRAIN_LLM_AND_PROJECTOR = (
    "--freeze_backbone True".split()
)  # no dropout anywhere: the numbers do not depend on the number of ranks
FREEZE_ALL = "--freeze_backbone True --freeze_llm True --freeze_mlp True".split()
TRAIN_ADAPTERS = [*FREEZE_ALL, *"--use_backbone_lora 4 --use_llm_lora 4".split()]
ZERO_FLAGS = {"none": [], **{f"zero{n}": ["--deepspeed", f"zero_stage{n}_config.json"] for n in (1, 2, 3)}}


def write_meta_file(folder: Path, images: Path) -> None:
    """Write the meta file that names `train.jsonl` of the folder."""
    entry = {"root": str(images), "annotation": str(folder / "train.jsonl"), "repeat_time": 1, "data_augment": False}
    (folder / "meta.json").write_text(json.dumps({"tiny": entry}))


def build_run_flags(tiny_inputs: Path, output: Path, ranks: int = 1) -> list[str]:
    """Return the flags of a tiny run.

    6 steps with a global batch size of 4, in fp32, on the model and the data in the folder `tiny`.
    """
    return f"""--model_name_or_path {tiny_inputs}/model --meta_path {tiny_inputs}/meta.json --output_dir {output}
        --conv_style internvl2_5 --force_image_size 56 --dynamic_image_size True --use_thumbnail True
        --max_dynamic_patch 4 --max_seq_length 512 --max_steps 6 --learning_rate 1e-3 --lr_scheduler_type constant
        --per_device_train_batch_size 1 --gradient_accumulation_steps {4 // ranks} --weight_decay 0.05
        --logging_steps 1 --save_steps 3 --report_to none""".split()


def build_composition_flags(parts: Path) -> list[str]:
    """Return flags that load the model in parts (see the fixture)."""
    return ["--model_name_or_path", "", "--vision_path", f"{parts}/vit", "--llm_path", f"{parts}/llm"]


def run_training(
    tiny_inputs: Path,
    output: Path,
    *flags: str,
    ranks: int = 1,
    status: int = 0,
    entry: Path = FINETUNE_PROGRAM,
    launcher: bool = False,
) -> subprocess.CompletedProcess:
    """Train in `ranks` new processes and check their exit status.

    They are forked from a process that has imported everything (see `forked_ranks`). With `launcher`, or where there
    is a CUDA device, which a forked process cannot use, torchrun starts them (one rank: Python).
    """
    if launcher or torch.cuda.is_available():
        command, env = build_launch_command(tiny_inputs, output, *flags, ranks=ranks, entry=entry)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    else:
        with TemporaryDirectory() as folder:
            done = fork_training(Path(folder), tiny_inputs, output, *flags, ranks=ranks, entry=entry).wait()
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def run_training_until(there: Path, tiny_inputs: Path, output: Path, *flags: str, ranks: int = 1) -> None:
    """Train until the path `there` exists, then kill all ranks."""
    with TemporaryDirectory() as folder:
        ranks_running = fork_training(Path(folder), tiny_inputs, output, *flags, ranks=ranks)
        while not there.exists():
            assert ranks_running.is_running(), (
                f"ended before {there} was written: {ranks_running.wait().stderr[-5000:]}"
            )
            time.sleep(0.01)
        ranks_running.kill()


def fork_training(
    folder: Path, tiny_inputs: Path, output: Path, *flags: str, ranks: int, entry: Path = FINETUNE_PROGRAM
) -> ForkedRanks:
    """Start a run in forked processes; `folder` receives what it prints."""
    command = [str(entry), *build_run_flags(tiny_inputs, output, ranks), *map(str, flags)]
    return ForkedRanks(command, build_run_environment(tiny_inputs), ranks, find_free_port(), folder)


def build_launch_command(
    tiny_inputs: Path, output: Path, *flags: str, ranks: int, entry: Path = FINETUNE_PROGRAM
) -> tuple[list[str], dict]:
    """Return command line and environment of a run under torchrun.

    A single rank is started by Python alone.
    """
    torchrun = [REPO_ROOT / "shell/torchrun.py", f"--nproc_per_node={ranks}", f"--master_port={find_free_port()}"]
    command = [
        sys.executable,
        *(torchrun if ranks > 1 else []),
        entry,
        *build_run_flags(tiny_inputs, output, ranks),
        *flags,
    ]
    return list(map(str, command)), build_run_environment(tiny_inputs)


def build_run_environment(tiny_inputs: Path) -> dict[str, str]:
    """Return the environment of a run, with its cache beside the data."""
    paths = os.pathsep.join(
        [str(REPO_ROOT / "internvl_chat"), str(REPO_ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    ).removesuffix(os.pathsep)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "INTERNVL_CACHE": str(tiny_inputs / "cache")}


def read_step_logs(output: Path) -> list[dict]:
    """Read the log entry of each step."""
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def read_losses(output: Path) -> list[float]:
    """Read the loss of each step."""
    return [entry["loss"] for entry in read_step_logs(output)]


def load_weights(output: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a checkpoint, including those of its base model."""
    file = output / "model.safetensors"
    return load_file(file) if file.exists() else InternVLChatModel.from_pretrained(output).state_dict()


def copy_tiny_model(goldens: Path, folder: Path) -> None:
    """Copy a recorded model and its tokenizer: the checkpoint of `build_run_flags`."""
    shutil.copytree(goldens / "e2e/qwen2", folder / "model")
    for file in (goldens / "tokenizer").glob("*token*"):
        shutil.copy(file, folder / "model")


def train_in_process(tiny_inputs: Path, output: Path, *flags: str) -> None:
    """Train as `run_training` does, in this process; the caller sets INTERNVL_CACHE."""
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, output), *flags])
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def prepare_trainer(argv: list[str]):
    """Build the trainer as `main` does, ready for its first step."""
    model_args, data_args, training_args = parse_args(argv)
    validate_arguments(model_args, data_args, training_args)
    check_evaluation_flags(data_args, training_args)
    choose_resume_checkpoint(training_args)
    tokenizer = build_tokenizer(model_args, data_args)
    model = build_model(model_args, data_args, training_args, tokenizer)
    untrained_tokens = get_untrained_tokens(model, tokenizer)
    data = build_data(data_args, training_args, tokenizer, model.num_image_token, untrained_tokens=untrained_tokens)
    evaluation = build_run_evaluation(
        *(data, data_args, training_args, tokenizer, model, LazySupervisedDataset, untrained_tokens)
    )
    record = RunRecord(model_args, data_args, training_args)
    return build_trainer(model, tokenizer, data, data_args, training_args, record, evaluation=evaluation)


def prepare_batch(trainer, batch: dict) -> dict:
    """Prepare a collated batch for the model as the training loop does."""
    return trainer._prepare_inputs(batch)


def hash_trainable_parameters(trainer) -> str:
    """Return a digest of the trainable parameters of this rank."""
    import deepspeed

    digest = hashlib.sha256()
    for parameter in trainer.get_trainable_parameters().values():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            digest.update(parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


def remove_image_tokens(folder: Path) -> None:
    """Remove the nine image tokens from a tokenizer's files.

    They are the last of the vocabulary, so the ids of the others stay.
    """
    (folder / "special_tokens_map.json").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {i: t for i, t in config["added_tokens_decoder"].items() if t["content"] not in SPECIAL_TOKENS}
    config = {k: v for k, v in config.items() if k != "additional_special_tokens"} | {"added_tokens_decoder": kept}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
