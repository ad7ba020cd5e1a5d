"""One rank of a program that trains the same samples in many ways, one run after the other.

    torchrun --nproc_per_node=2 equal_ranks.py TINY FOLDER '{"name": ["--bf16", "True", ...], ...}'

TINY is the folder of the fixture `tiny`. By each run's name rank 0 writes FOLDER/NAME.safetensors, how far each trained
tensor has moved, and FOLDER/NAME.json: losses, norms of gradients, the tiles that each rank saw in each micro-batch.
"""

import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch
from runs import flags_of, prepare
from safetensors.torch import save_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from internvl.dist_utils import gathered, rank
from internvl.train.ending import join_ranks, shared_end
from internvl.train.run import leave


def train(tiny: Path, folder: Path, name: str, flags: list[str]) -> None:
    trainer = prepare([*flags_of(tiny, folder / "out" / name), "--save_strategy", "no", "--no_smoke_save", *flags])
    tiles, prepare_inputs = [], trainer._prepare_inputs

    def noting(inputs: dict) -> dict:
        tiles.append(int(inputs["image_flags"].sum()))
        return prepare_inputs(inputs)

    trainer._prepare_inputs = noting
    before = whole(trainer)
    trainer.train()
    told = {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    told["norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    told["tiles"] = gathered(tiles)
    moved = {name: tensor - before[name] for name, tensor in whole(trainer).items()}
    if rank() == 0:
        save_file(moved, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(told))


def whole(trainer) -> dict[str, torch.Tensor]:
    """What trains, by name, as a copy in fp32."""
    trained = trainer.trained_parameters()
    with deepspeed.zero.GatheredParameters([p for p in trained.values() if hasattr(p, "ds_id")]):
        return {name: p.detach().float().clone() for name, p in trained.items()}


def main(tiny: Path, folder: Path, runs: dict[str, list[str]]) -> None:
    for name, flags in runs.items():
        train(tiny, folder, name, flags)
        unset_hf_deepspeed_config()
        gc.collect()


if __name__ == "__main__":
    with shared_end():
        join_ranks(["--ddp_timeout", "60"])
        main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    leave(0)
