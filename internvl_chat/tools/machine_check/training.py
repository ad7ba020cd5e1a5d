"""Train a tiny model through the real program, with and without DeepSpeed.

Checkpoint, images and annotations are generated. All runs see the same samples in the same order, so their losses must
be equal up to rounding. The adapters that they save are opened again.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from internvl.launchers import find_free_port
from internvl.metrics.step_metrics import METRICS_FILE
from internvl.model.chat_template import save_tokenizer
from internvl.model.internvl_chat import InternVLChatModel
from internvl.tools.quickstart.tiny_model import build_model, read_texts, train_tokenizer
from internvl.versions import PACKAGE_DIR

from .checks import Checks, SkippedCheck

PROGRAM = PACKAGE_DIR / "train/internvl_chat_finetune.py"
TORCHRUN = PACKAGE_DIR / "shell/torchrun.py"
COLORS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "white": (240, 240, 240)}
NUM_SAMPLES, NUM_STEPS, GLOBAL_BATCH_SIZE = 24, 4, 4
IMAGE_SIZE = 224  # a tile of the tiny model
# Name of a run -> its flags beyond those of all runs. The first is the reference.
RUNS: dict[str, list[str]] = {
    "without DeepSpeed": [],
    "ZeRO-2": ["--deepspeed", "zero_stage2_config.json"],
    "ZeRO-3": ["--deepspeed", "zero_stage3_config.json"],
    "QLoRA": ["--quantize_llm", "True"],
}
REQUIRED_PACKAGES = {"ZeRO-2": "deepspeed", "ZeRO-3": "deepspeed", "QLoRA": "bitsandbytes"}  # by run
# Largest relative difference of a step's loss from the reference. In fp32 only sums have another order. In bf16
# DeepSpeed casts the adapters, too, and rounds their updates. Base weights in 4 bits change every number.
LOSS_TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "4 bits": 2e-1}


def list_training_checks(
    device: torch.device, folder: Path, timeout: float, runs: Sequence[str] = tuple(RUNS)
) -> Checks:
    """List a check for each run, and one for what all have saved.

    Args:
        folder: for everything that is generated and saved.
        timeout: seconds for each run.
        runs: keys of RUNS.
    """
    write_inputs(folder)
    outputs: dict[str, Path] = {}
    for name in runs:
        yield name, partial(check_run, name, device, folder, timeout, outputs)
    yield "adapters reopened", partial(check_saved_adapters, outputs)


def write_inputs(folder: Path) -> None:
    """Write a tiny checkpoint, images, annotations and the meta file."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(NUM_SAMPLES):
        color = list(COLORS)[number % len(COLORS)]
        noise = rng.integers(-30, 30, (IMAGE_SIZE, IMAGE_SIZE, 3))
        pixels = np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
        turns = [("human", "<image>\nWhich color is this?"), ("gpt", f"It is {color}.")]
        if number % 4 == 3:  # a sample without an image
            turns[0] = ("human", f"Name the color {color}.")
        record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        records.append(record if number % 4 == 3 else record | {"image": f"{number}.png"})
    annotation = folder / "train.jsonl"
    annotation.write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"root": str(folder), "annotation": str(annotation), "repeat_time": 1, "data_augment": False}
    (folder / "meta.json").write_text(json.dumps({"colors": entry}))
    torch.manual_seed(0)
    tokenizer = train_tokenizer(read_texts(annotation))
    model = build_model(tokenizer)
    model.save_pretrained(folder / "model")
    save_tokenizer(tokenizer, model.config, folder / "model")


def check_run(name: str, device: torch.device, folder: Path, timeout: float, outputs: dict[str, Path]) -> dict:
    """Train, and compare the losses with those of the reference.

    Args:
        outputs: gets the run's output folder, by its name.

    Raises:
        ValueError: the run failed, or its losses differ.
    """
    package = REQUIRED_PACKAGES.get(name)
    if package and not importlib.util.find_spec(package):
        raise SkippedCheck(f"{package} is not installed")
    if name == "QLoRA" and device.type == "cpu":
        raise SkippedCheck("without a GPU the check saves the time for it")
    reference = next(iter(outputs.values()), None)
    num_ranks = min(2, torch.cuda.device_count()) or 1  # two if possible, to try NCCL
    output = folder / name.replace(" ", "_")
    run_training(build_command(name, folder, output, num_ranks, device), folder, timeout)
    outputs[name] = output
    steps = read_metrics(output)
    losses = [step["loss"] for step in steps]
    if len(losses) != NUM_STEPS or not all(map(math.isfinite, losses)):
        raise ValueError(f"expected {NUM_STEPS} finite losses in {METRICS_FILE}, got {losses}")
    found = {"ranks": num_ranks, "losses": [round(loss, 4) for loss in losses]}
    found["step_seconds"] = round(min(step["step_seconds"] for step in steps), 3)
    if reference:
        precision = "4 bits" if name == "QLoRA" else "bf16" if device.type == "cuda" else "fp32"
        wanted = [step["loss"] for step in read_metrics(reference)]
        difference = max(abs(loss / other - 1) for loss, other in zip(losses, wanted, strict=True))
        found["difference"] = difference
        if difference > LOSS_TOLERANCES[precision]:
            raise ValueError(
                f"losses {found['losses']} differ by {difference:.1e} from those of {reference.name}, "
                f"{[round(loss, 4) for loss in wanted]}: expected at most {LOSS_TOLERANCES[precision]:.0e}"
            )
    return found


def build_command(name: str, folder: Path, output: Path, num_ranks: int, device: torch.device) -> list[str]:
    """Build the command line of a run: LoRA in both parts, packed rows."""
    flags = f"""--model_name_or_path {folder}/model --meta_path {folder}/meta.json --output_dir {output}
        --conv_style internvl2_5 --force_image_size {IMAGE_SIZE} --max_seq_length 512 --use_packed_ds True
        --max_packed_tokens 512 --num_images_expected 12 --freeze_backbone True --freeze_llm True --freeze_mlp True
        --use_backbone_lora 4 --use_llm_lora 4 --max_steps {NUM_STEPS} --learning_rate 1e-3
        --lr_scheduler_type constant --per_device_train_batch_size 1
        --gradient_accumulation_steps {GLOBAL_BATCH_SIZE // num_ranks} --grad_checkpoint True
        --bf16 {device.type == "cuda"} --logging_steps 1 --save_strategy no --report_to none
        --dataloader_num_workers {2 if device.type == "cuda" else 0}""".split()
    torchrun = [str(TORCHRUN), f"--nproc_per_node={num_ranks}", f"--master_port={find_free_port()}"]
    return [sys.executable, *(torchrun if num_ranks > 1 else []), str(PROGRAM), *flags, *RUNS[name]]


def run_training(command: list[str], folder: Path, timeout: float) -> None:
    """Run a command to its end; stop it and its children at the time limit.

    It stays in the process group of this program, and ends with it.

    Raises:
        ValueError: it failed; with the last line of its output.
    """
    paths = [str(PACKAGE_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    env |= {"OMP_NUM_THREADS": "1", "INTERNVL_CACHE": str(folder / "cache")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the run has not ended within {timeout:g} s") from None
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
            process.wait()
    if process.returncode:
        lines = [line for line in printed.splitlines() if line.strip()]
        raise ValueError(f"the run ended with status {process.returncode}: {lines[-1] if lines else 'no output'}")


def read_metrics(output: Path) -> list[dict]:
    """Read the lines of a run's metrics file that have a loss."""
    lines = map(json.loads, (output / METRICS_FILE).read_text().splitlines())
    return [line for line in lines if "loss" in line]


def check_saved_adapters(outputs: dict[str, Path]) -> dict:
    """Open each run's output, and count the adapters that training has changed.

    Raises:
        ValueError: adapters are missing, still zero, or not finite.
    """
    if not outputs:
        raise SkippedCheck("no run has finished")
    found = {}
    for name, output in outputs.items():
        model = InternVLChatModel.from_pretrained(output)
        for part in ("vision_model", "language_model"):
            # B is zero before training.
            adapters = [p for key, p in getattr(model, part).named_parameters() if "lora_B" in key]
            num_changed = sum(bool(p.isfinite().all() and p.any()) for p in adapters)
            if not adapters or num_changed < len(adapters):
                raise ValueError(f"{name}: training has changed {num_changed} of {len(adapters)} adapters in {part}")
            found[f"{name}, {part}"] = len(adapters)
    return found
