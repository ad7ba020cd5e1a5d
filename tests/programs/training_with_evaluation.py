"""Train a run twice, without and with evaluations, and report the trained parameters.

    training_with_evaluation.py FOLDER TOKENIZER '{"name": ["--deepspeed", ...], ...}'     on each rank

FOLDER holds the inputs of a tiny run and evaluation sets. Rank 0 writes `FOLDER/runs.json`: for each run and each of
its two trainings the losses, and a digest of the trained parameters.
"""

import gc
import json
import os
import sys
from pathlib import Path

from helpers.evaluation_cases import make_settings, open_evaluation_sets
from helpers.training_runs import build_run_flags, hash_trainable_parameters, prepare_trainer
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from internvl.dist_utils import get_rank
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.token_losses import measure_token_losses, summarize_token_losses
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group

EVALUATED_STEPS = (0, 3, 4)


class Evaluation(TrainerCallback):
    """Evaluates before the first step and after some others."""

    def __init__(self, data: EvaluationData):
        self.data, self.losses = data, []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in EVALUATED_STEPS:
            losses = measure_token_losses(model, self.data, make_settings(300, 12))
            self.losses.append(summarize_token_losses(self.data, losses)["loss"])


def train(folder: Path, name: str, flags: list[str], data: EvaluationData | None) -> dict:
    """Train once; evaluate if there is data."""
    output = folder / f"{name}-{data is not None}"
    noise = "--use_backbone_lora 4 --use_llm_lora 4 --drop_path_rate 0.3 --neftune_noise_alpha 5".split()
    few = "--no_smoke_save --save_strategy no --max_steps 6".split()
    world_size = int(os.environ["WORLD_SIZE"])
    trainer = prepare_trainer([*build_run_flags(folder, output, world_size), *noise, *few, *flags])
    evaluation = Evaluation(data) if data else None
    if evaluation:
        trainer.add_callback(evaluation)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "digest": hash_trainable_parameters(trainer),
        "evaluation_losses": evaluation.losses if evaluation else [],
    }


def main(folder: Path, tokenizer_path: Path, runs: dict[str, list[str]]) -> None:
    data, results = open_evaluation_sets(folder, tokenizer_path), {}
    for name, flags in runs.items():
        results[name] = []
        for evaluated in (None, data):
            results[name].append(train(folder, name, flags, evaluated))
            unset_hf_deepspeed_config()
            gc.collect()
    if get_rank() == 0:
        (folder / "runs.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with abort_all_ranks_on_error():
        join_process_group(["--ddp_timeout", "60"])
        main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    exit_process_group(0)
