"""Measure the token losses of evaluation sets on some ranks, without and with ZeRO.

    evaluation_losses.py FOLDER TOKENIZER     on each rank; see `helpers/evaluation_cases.py`

Rank 0 writes `FOLDER/losses.json`: for each model, ZeRO configuration and row size the result of each sample.
"""

import json
import sys
from pathlib import Path

import torch
from helpers.evaluation_cases import MODELS, ROW_SIZES, ZERO_CONFIGS, make_settings, open_evaluation_sets

from internvl.dist_utils import gather_objects, get_rank, init_deepspeed
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.token_losses import measure_token_losses
from internvl.model import token_loss
from internvl.model.internvl_chat import InternVLChatModel
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group


def prepare(model: InternVLChatModel, config: dict) -> None:
    """Let DeepSpeed partition the model or its optimizer."""
    import deepspeed

    if config:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batch = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        deepspeed.initialize(model=model, optimizer=optimizer, config=batch | config)


def measure(data: EvaluationData, name: str, zero: str) -> dict[str, list]:
    """Measure a model in rows of each size; check that all ranks have the same results."""
    model = MODELS[name](data.dataset.datasets[0].tokenizer)
    prepare(model, ZERO_CONFIGS[zero])
    results = {}
    for max_tokens, max_tiles in ROW_SIZES:
        losses = measure_token_losses(model, data, make_settings(max_tokens, max_tiles)).tolist()
        assert all(other == losses for other in gather_objects(losses)), "ranks differ"
        results[f"{name} {zero} {max_tokens}"] = losses
    assert model.training and not any(p.grad is not None for p in model.parameters())
    return results


def main(folder: Path, tokenizer_path: Path) -> None:
    token_loss.CHUNK_BYTES = 7 * 4 * 1009  # ranks have different numbers of chunks
    data = open_evaluation_sets(folder, tokenizer_path)
    results = {}
    for name in MODELS:
        for zero in ZERO_CONFIGS:
            results |= measure(data, name, zero)
    if get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with abort_all_ranks_on_error():
        join_process_group(["--ddp_timeout", "60"])
        init_deepspeed()
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    exit_process_group(0)
