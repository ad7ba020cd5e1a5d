"""Write what a run is before its first step.

    OUTPUT_DIR/run.json                 the content of `flags.json` (see checkpoint/resume_rules.py), "max_steps",
                                        "trainable" (a row per part) and "samples" (dataset -> counts)
    OUTPUT_DIR/skipped_samples.jsonl    a line per unusable sample
    OUTPUT_DIR/run.yaml                 the flags that were given, for `internvl train --config`

`flags.json` belongs to weights, so the output folder has none before the run ends.
"""

import contextlib
import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from internvl import __version__
from internvl.arguments.preference import DPOConfig
from internvl.arguments.run_file import CONFIG_FLAG, RUN_CONFIG_FILE, format_run_file
from internvl.arguments.training import list_given_flags
from internvl.checkpoint.resume_rules import RUN_FILE
from internvl.constants import escape_control_characters
from internvl.data.skipped_samples import SKIPPED_SAMPLES_FILE
from internvl.dist_utils import get_world_size
from internvl.evaluation.results import write_lines
from internvl.launchers import count_local_ranks
from internvl.train.build_data import TrainingData
from internvl.train.trainable_parameters import list_trainable_parts

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer


def write_run_summary(trainer: "InternVLTrainer", data: TrainingData, is_resumed: bool) -> None:
    """Write `run.json` and `skipped_samples.jsonl`, on the rank that saves.

    Args:
        is_resumed: keep the unusable samples of the process before.
    """
    if not trainer.args.should_save:
        return
    folder: Path = trainer.checkpoints.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    summary = trainer.run_record.describe(trainer.model.base_checkpoint) | {
        "max_steps": trainer.count_steps(),
        "trainable": list_trainable_parts(trainer.model, trainer.args),
        "samples": count_samples(data),
    }
    (folder / RUN_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    trainer.skipped_samples.open_file(folder / SKIPPED_SAMPLES_FILE, is_resumed)


def write_run_file(trainer: "InternVLTrainer", argv: list[str]) -> None:
    """Write `run.yaml`, on the rank that saves; keep one that has the same flags, with its comments.

    Args:
        argv: the command line of the run.
    """
    file, classes = Path(str(trainer.args.output_dir), RUN_CONFIG_FILE), trainer.run_record.classes
    if not trainer.args.should_save:
        return
    flags = list_given_flags(argv, classes)
    with contextlib.suppress(ValueError):
        if list_given_flags([CONFIG_FLAG, str(file)], classes) == flags:
            return
    header = describe_run(file, isinstance(trainer.args, DPOConfig))
    write_lines(file, [format_run_file(flags, header).removesuffix("\n")])


def describe_run(file: Path, is_preference: bool) -> list[str]:
    """Describe how a run was started, and how to repeat it, in lines of text."""
    num_ranks = get_world_size()
    num_local_ranks = min(num_ranks, count_local_ranks(os.environ))  # Python alone in a SLURM allocation: 1
    num_nodes = num_ranks // num_local_ranks
    command = ["internvl", "train", *(["--preference"] if is_preference else []), CONFIG_FLAG, str(file)]
    command += ["--nproc", str(num_local_ranks), "--output_dir", "NEW_FOLDER"]
    nodes = f"NODES={num_nodes} " if num_nodes > 1 else ""
    lines = [
        "Flags of a run, without defaults. To repeat it:",
        f"  cd {shlex.quote(os.getcwd())}",
        f"  {nodes}{shlex.join(command)}",
        f"Started with internvl {__version__} at {time.strftime('%Y-%m-%d %H:%M:%S')} on {num_ranks} ranks.",
    ]
    return [escape_control_characters(line) for line in lines]


def count_samples(data: TrainingData) -> dict[str, dict[str, int]]:
    """Count samples, usable samples, tokens and loss tokens of each dataset, as drawn in an epoch."""
    sources, lengths = data.dataset.get_source_samples(), data.lengths
    dataset_of_sample = np.searchsorted(data.dataset.ends, sources, side="right")
    num_datasets = len(data.dataset.datasets)
    num_usable = np.bincount(dataset_of_sample[data.list_trained_samples()], minlength=num_datasets)
    tokens, loss_tokens = (
        np.bincount(dataset_of_sample, lengths[name], minlength=num_datasets) for name in ("tokens", "loss_tokens")
    )
    return {
        dataset.ds_name: {
            "samples": len(dataset),
            "usable": int(num_usable[number]),
            "tokens": int(tokens[number]),
            "loss_tokens": int(loss_tokens[number]),
        }
        for number, dataset in enumerate(data.dataset.datasets)
    }
