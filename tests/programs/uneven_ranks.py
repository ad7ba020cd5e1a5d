"""One rank of a program that trains many small runs, one after the other, on data that falls unevenly on the ranks.

    torchrun --nproc_per_node=2 uneven_ranks.py FOLDER '{"name": ["one picture", "--use_llm_lora", "4", ...], ...}'

FOLDER holds `model` and the pictures of `records`. Each run goes through all its data twice. Rank 0 writes
`FOLDER/told.json`: by run, what each rank saw and has at the end.
"""

import gc
import hashlib
import json
import os
import sys
from pathlib import Path

from helpers.training_runs import flags_of, prepare
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from internvl.dist_utils import gather_objects, rank
from internvl.runtime.shutdown import abort_all_ranks_on_error, join_process_group
from internvl.train.run_training import exit_process_group
from internvl.train.trainer_checkpoint import barrier

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SHOWN = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}]


def picture(name: str) -> dict:
    return {"image": name, "conversations": SHOWN}


TEXT = {"conversations": TURNS}
# What a data set holds. Steps are of 4 samples: in 5 or 9 the last step of an epoch leaves ranks without a row.
RECORDS = {
    "uneven tiles": [picture("wide.png"), TEXT, picture("small.png"), TEXT, TEXT],
    "one picture": [picture("wide.png"), *[TEXT] * 8],
    "no picture": [TEXT] * 5,
    "turns bad": [picture("goes.png"), picture("small.png"), *[TEXT] * 3],
    "all turn bad": [picture("goes.png")] * 5,
}


def train(folder: Path, name: str, records: str, flags: list[str]) -> dict:
    """What this rank saw in a run: tiles by micro-batch, bad samples; its losses, and a digest of what it trained."""
    here = folder / name
    if rank() == 0:
        here.mkdir()
        (here / "model").symlink_to(folder / "model")
        entry = {"root": str(folder), "annotation": str(here / "train.jsonl"), "repeat_time": 1, "data_augment": False}
        (here / "meta.json").write_text(json.dumps({name: entry}))
        (here / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS[records])))
        (folder / "goes.png").write_bytes((folder / "small.png").read_bytes())
    barrier()
    world = int(os.environ["WORLD_SIZE"])
    epochs = "--max_steps -1 --num_train_epochs 2 --max_bad_samples 99 --save_strategy no --no_smoke_save".split()
    trainer = prepare([*flags_of(here, here / "out", world), *epochs, *flags])
    barrier()
    (folder / "goes.png").unlink(missing_ok=True)  # it was there when it was measured
    seen, collate = [], trainer.data_collator

    def noting(rows: list[dict]) -> dict:
        seen.append(sum(len(row["pixel_values"]) for row in rows))
        return collate(rows)

    trainer.data_collator = noting
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = trainer.state.global_step, trainer.state.max_steps
    return {"tiles": seen, "bad": trainer.bad_samples, "losses": losses, "steps": steps, "digest": digest(trainer)}


def digest(trainer) -> str:
    """Of all that trains, as this rank has it."""
    import deepspeed

    sha = hashlib.sha256()
    for parameter in trainer.trained_parameters().values():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            sha.update(parameter.detach().float().numpy().tobytes())
    return sha.hexdigest()


def main(folder: Path, runs: dict[str, list[str]]) -> None:
    told = {}
    for name, (records, *flags) in runs.items():
        told[name] = gather_objects(train(folder, name, records, flags))
        unset_hf_deepspeed_config()
        gc.collect()
        if rank() == 0:
            (folder / "told.json").write_text(json.dumps(told))
            print(name, flush=True)


if __name__ == "__main__":
    with abort_all_ranks_on_error():
        join_process_group(["--ddp_timeout", "60"])
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    exit_process_group(0)
