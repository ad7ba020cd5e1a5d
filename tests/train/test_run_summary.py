"""The output folder says from the start what a run is."""

import json

import pytest
from helpers.samples import make_turns
from helpers.training_runs import TRAIN_ADAPTERS, build_run_flags, prepare_trainer

from internvl.train.build_data import build_data
from internvl.train.run_summary import count_samples, write_run_summary


@pytest.fixture
def trainer_and_data(tiny_inputs, tmp_path, parse_flags):
    """Build the trainer and the data of a run with an unusable sample and oversized ones, which are split."""
    records = (tiny_inputs / "train.jsonl").read_text().splitlines()
    records.append(json.dumps({"image": "gone.png", "conversations": make_turns("<image>\nWhat?", "Gone.")}))
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    meta = json.loads((tiny_inputs / "meta.json").read_text())
    meta["tiny"] |= {"annotation": str(tmp_path / "train.jsonl"), "repeat_time": 2}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    flags = ["--meta_path", str(tmp_path / "meta.json"), "--max_bad_samples", "2", *TRAIN_ADAPTERS]
    flags += "--use_packed_ds True --max_packed_tokens 100 --allow_overflow True --llm_lr 2e-4".split()
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *flags])
    _, data_args, training_args = parse_flags(*flags)
    data = build_data(data_args, training_args, trainer.processing_class, trainer.model.num_image_token)
    return trainer, data


def test_summary_of_a_run(trainer_and_data, tmp_path):
    trainer, data = trainer_and_data
    write_run_summary(trainer, data, is_resumed=False)
    summary = json.loads((tmp_path / "out/run.json").read_text())
    assert summary["max_steps"] == 6 and summary["flags"]["use_llm_lora"] == 4 and summary["changes"] == []
    ranks = {row["part"]: (row["lora_rank"], row["learning_rate"]) for row in summary["trainable"]}
    assert ranks == {"vision encoder": ("4", "0.001"), "projector": ("-", "-"), "LLM": ("4", "0.0002")}
    trainable = {row["part"]: row["trainable"] for row in summary["trainable"]}
    assert sum(trainable.values()) == sum(p.numel() for p in trainer.get_trainable_parameters().values())
    lines = (tmp_path / "out/skipped_samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "gone.png does not exist" in json.loads(lines[0])["sample"]


def test_samples_are_counted_once_although_some_are_split(trainer_and_data):
    _, data = trainer_and_data
    [counts] = count_samples(data).values()
    assert data.dataset.pieces, "some samples are split"
    assert counts["samples"] == len(data.dataset.datasets[0]) and counts["usable"] == counts["samples"] - 2
    assert counts["tokens"] == data.lengths["tokens"].sum()
    assert counts["loss_tokens"] == data.lengths["loss_tokens"].sum()
