"""Runs of the entry point on a tiny checkpoint: in processes of their own, or in this one up to the first step."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from helpers.forked_ranks import Ranks
from safetensors.torch import load_file

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.checkpoint.resume import choose_resume_checkpoint
from internvl.constants import SPECIAL_TOKENS
from internvl.dist_utils import free_port
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model, build_tokenizer
from internvl.train.build_trainer import build_trainer

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "internvl_chat/internvl/train/internvl_chat_finetune.py"
LORA = "--freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 4 --use_llm_lora 4".split()
FULL = "--freeze_backbone True".split()  # no dropout anywhere: the same numbers whatever the number of ranks


def write_meta(folder: Path, images: Path) -> None:
    entry = {"root": str(images), "annotation": str(folder / "train.jsonl"), "repeat_time": 1, "data_augment": False}
    (folder / "meta.json").write_text(json.dumps({"tiny": entry}))


def flags_of(tiny: Path, output: Path, ranks: int = 1) -> list[str]:
    """6 steps of 4 samples in fp32."""
    return f"""--model_name_or_path {tiny}/model --meta_path {tiny}/meta.json --output_dir {output}
        --conv_style internvl2_5 --force_image_size 56 --dynamic_image_size True --use_thumbnail True
        --max_dynamic_patch 4 --max_seq_length 512 --max_steps 6 --learning_rate 1e-3 --lr_scheduler_type constant
        --per_device_train_batch_size 1 --gradient_accumulation_steps {4 // ranks} --weight_decay 0.05
        --logging_steps 1 --save_steps 3 --report_to none""".split()


def composed(parts: Path) -> list[str]:
    """Flags that start from parts instead of the chat checkpoint of `flags_of`."""
    return ["--model_name_or_path", "", "--vision_path", f"{parts}/vit", "--llm_path", f"{parts}/llm"]


def run(
    tiny: Path, output: Path, *flags: str, ranks: int = 1, status: int = 0, entry: Path = ENTRY, launcher: bool = False
) -> subprocess.CompletedProcess:
    """Train in `ranks` processes of their own: forked, or with a `launcher` by torchrun, a single one by Python."""
    if launcher or torch.cuda.is_available():  # CUDA cannot be used after a fork
        command, env = started(tiny, output, *flags, ranks=ranks, entry=entry)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    else:
        with TemporaryDirectory() as folder:
            done = forked(Path(folder), tiny, output, *flags, ranks=ranks, entry=entry).wait()
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def run_until(there: Path, tiny: Path, output: Path, *flags: str, ranks: int = 1) -> None:
    """Train as `run` does, and kill all processes without a warning as soon as `there` exists."""
    with TemporaryDirectory() as folder:
        run = forked(Path(folder), tiny, output, *flags, ranks=ranks)
        while not there.exists():
            assert run.running(), f"it ended before {there} was written: {run.wait().stderr[-5000:]}"
            time.sleep(0.01)
        run.kill()


def forked(folder: Path, tiny: Path, output: Path, *flags: str, ranks: int, entry: Path = ENTRY) -> Ranks:
    """A run whose output goes to `folder`."""
    command = [str(entry), *flags_of(tiny, output, ranks), *map(str, flags)]
    return Ranks(command, environment(tiny), ranks, free_port(), folder)


def started(tiny: Path, output: Path, *flags: str, ranks: int, entry: Path = ENTRY) -> tuple[list[str], dict]:
    """Command line and environment of a run with a launcher."""
    torchrun = [ROOT / "shell/torchrun.py", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), entry, *flags_of(tiny, output, ranks), *flags]
    return list(map(str, command)), environment(tiny)


def environment(tiny: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "internvl_chat"), str(ROOT / "tests")])
    ours = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "INTERNVL_CACHE": str(tiny / "cache")}
    return os.environ | ours


def history(output: Path) -> list[dict]:
    """The log of each step."""
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, of its base, too, where it stands on one."""
    file = output / "model.safetensors"
    return load_file(file) if file.exists() else InternVLChatModel.from_pretrained(output).state_dict()


def copy_model(goldens: Path, folder: Path) -> None:
    """The checkpoint of `flags_of`: a recorded model and its tokenizer."""
    shutil.copytree(goldens / "e2e/qwen2", folder / "model")
    for file in (goldens / "tokenizer").glob("*token*"):
        shutil.copy(file, folder / "model")


def run_here(tiny: Path, output: Path, *flags: str) -> None:
    """Train as `run` does, in this process; INTERNVL_CACHE is the caller's."""
    trainer = prepare([*flags_of(tiny, output), *flags])
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def prepare(argv: list[str]):
    """What `main` does before the first step, in this process."""
    model_args, data_args, training_args = parse_args(argv)
    validate_arguments(model_args, data_args, training_args)
    choose_resume_checkpoint(training_args)
    tokenizer = build_tokenizer(model_args, data_args)
    model = build_model(model_args, data_args, training_args, tokenizer)
    data = build_data(data_args, training_args, tokenizer, model.num_image_token)
    return build_trainer(model, tokenizer, data, data_args, training_args)


def without_image_tokens(folder: Path) -> None:
    """Take the nine image tokens, the last of the vocabulary, out of a tokenizer's files."""
    (folder / "special_tokens_map.json").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {i: t for i, t in config["added_tokens_decoder"].items() if t["content"] not in SPECIAL_TOKENS}
    config = {k: v for k, v in config.items() if k != "additional_special_tokens"} | {"added_tokens_decoder": kept}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
