"""Train small runs on data that falls unevenly on the ranks.

    torchrun --nproc_per_node=2 uneven_ranks.py FOLDER '{"name": ["one image", "--use_llm_lora", "4", ...], ...}'

FOLDER holds `model` and the images of `RECORDS`. Each run trains two epochs. Rank 0 writes `FOLDER/results.json`: the
results of each rank, by run.
"""

import gc
import json
import os
import sys
from pathlib import Path

from helpers.training_runs import build_run_flags, hash_trainable_parameters, prepare_trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from internvl.checkpoint.manager import barrier
from internvl.dist_utils import gather_objects, get_rank
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group

TEXT_RECORD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def make_image_record(image: str) -> dict:
    question = {"from": "human", "value": "<image>\nWhat is it?"}
    return {"image": image, "conversations": [question, {"from": "gpt", "value": "A thing."}]}


# A step has 4 samples: with 5 or 9 samples, the last step of an epoch leaves ranks without a row. `deleted.png` exists
# when sample lengths are measured, not when it is loaded.
RECORDS = {
    "uneven tiles": [make_image_record("wide.png"), TEXT_RECORD, make_image_record("small.png"), *[TEXT_RECORD] * 2],
    "one image": [make_image_record("wide.png"), *[TEXT_RECORD] * 8],
    "no image": [TEXT_RECORD] * 5,
    "one image deleted": [make_image_record("deleted.png"), make_image_record("small.png"), *[TEXT_RECORD] * 3],
    "all images deleted": [make_image_record("deleted.png")] * 5,
}


def train(folder: Path, name: str, records: str, flags: list[str]) -> dict:
    """Train a run and return the results of this rank.

    These are the number of tiles of each micro-batch, the unusable samples, losses, steps and a digest of the trainable
    parameters.
    """
    here = folder / name
    if get_rank() == 0:
        here.mkdir()
        (here / "model").symlink_to(folder / "model")
        entry = {"root": str(folder), "annotation": str(here / "train.jsonl"), "repeat_time": 1, "data_augment": False}
        (here / "meta.json").write_text(json.dumps({name: entry}))
        (here / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS[records])))
        (folder / "deleted.png").write_bytes((folder / "small.png").read_bytes())
    barrier()
    world = int(os.environ["WORLD_SIZE"])
    epochs = "--max_steps -1 --num_train_epochs 2 --max_bad_samples 99 --save_strategy no --no_smoke_save".split()
    trainer = prepare_trainer([*build_run_flags(here, here / "out", world), *epochs, *flags])
    barrier()
    (folder / "deleted.png").unlink(missing_ok=True)
    num_tiles, collate = [], trainer.data_collator

    def count_and_collate(rows: list[dict]) -> dict:
        num_tiles.append(sum(len(row["pixel_values"]) for row in rows))
        return collate(rows)

    trainer.data_collator = count_and_collate
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = trainer.state.global_step, trainer.state.max_steps
    return {
        "tiles": num_tiles,
        "bad": trainer.skipped_samples.skipped,
        "losses": losses,
        "steps": steps,
        "digest": hash_trainable_parameters(trainer),
    }


def main(folder: Path, runs: dict[str, list[str]]) -> None:
    results = {}
    for name, (records, *flags) in runs.items():
        results[name] = gather_objects(train(folder, name, records, flags))
        unset_hf_deepspeed_config()
        gc.collect()
        if get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(results))
            print(name, flush=True)


if __name__ == "__main__":
    with abort_all_ranks_on_error():
        join_process_group(["--ddp_timeout", "60"])
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    exit_process_group(0)
