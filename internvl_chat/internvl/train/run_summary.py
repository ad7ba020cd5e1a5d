"""Write what a run is before its first step, for `tools/report.py`.

    OUTPUT_DIR/run.json                 the content of `flags.json` (see checkpoint/resume_rules.py), "max_steps",
                                        "trainable" (a row per part) and "samples" (dataset -> counts)
    OUTPUT_DIR/skipped_samples.jsonl    a line per unusable sample

`flags.json` belongs to weights, so the output folder has none before the run ends.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from internvl.checkpoint.resume_rules import RUN_FILE
from internvl.data.skipped_samples import SKIPPED_SAMPLES_FILE
from internvl.train.build_data import TrainingData
from internvl.train.trainable_parameters import list_trainable_parts

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer


def write_run_summary(trainer: "InternVLTrainer", data: TrainingData, is_resumed: bool) -> None:
    """Write both files, on the rank that saves.

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
