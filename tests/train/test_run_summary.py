"""The output folder says from the start what a run is."""

import json
import tempfile
from pathlib import Path

import pytest
from helpers.forked_ranks import ForkedRanks
from helpers.paths import FINETUNE_PROGRAM
from helpers.samples import make_turns
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    build_run_environment,
    build_run_flags,
    prepare_trainer,
    read_losses,
    run_training,
)

import internvl
from internvl.arguments.run_file import format_run_file
from internvl.arguments.training import FINETUNE_ARGUMENTS, list_given_flags
from internvl.launchers import find_free_port
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


# -- run.yaml ----------------------------------------------------------------------------------------------------------


def repeat_run(tiny_inputs, tmp_path, *argv: str, ranks: int, entry: Path = FINETUNE_PROGRAM) -> None:
    """Run a program with these flags alone."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    command, env = [str(entry), *argv], build_run_environment(tiny_inputs)
    done = ForkedRanks(command, env, ranks, find_free_port(), folder).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "flags",
    [(), (*TRAIN_ADAPTERS, *"--llm_lora_dropout 0.2 --use_packed_ds True --seed 7".split())],
    ids=["full", "lora"],
)
def test_run_repeated_from_its_file_has_the_same_losses(tiny_inputs, tmp_path, flags):
    first, second = tmp_path / "first", tmp_path / "second"
    run_training(tiny_inputs, first, *flags, ranks=2)
    header = (first / "run.yaml").read_text().splitlines()[:4]
    assert header[2] == f"#   internvl train --config {first}/run.yaml --nproc 2 --output_dir NEW_FOLDER"
    assert header[3].startswith(f"# Started with internvl {internvl.__version__} at 20")
    assert header[3].endswith(" on 2 ranks.")
    repeat_run(tiny_inputs, tmp_path, f"--config={first}/run.yaml", "--output_dir", str(second), ranks=2)
    assert read_losses(second) == read_losses(first) and len(read_losses(first)) == 6
    flags_of_runs = [list_given_flags([f"--config={run}/run.yaml"], FINETUNE_ARGUMENTS) for run in (first, second)]
    assert flags_of_runs[0] | {"output_dir": str(second)} == flags_of_runs[1]


@pytest.mark.multiprocess
def test_resumed_run_keeps_its_file_unless_a_flag_differs(tiny_inputs, tmp_path):
    output = tmp_path / "out"
    file = output / "run.yaml"
    file.parent.mkdir()
    base = list_given_flags(build_run_flags(tiny_inputs, output), FINETUNE_ARGUMENTS)
    written = format_run_file(base | {"max_steps": "3"}, ["my comment"])
    file.write_text(written)
    repeat_run(tiny_inputs, tmp_path, "--config", str(file), ranks=1)
    assert file.read_text() == written and len(read_losses(output)) == 3
    repeat_run(tiny_inputs, tmp_path, "--config", str(file), "--max_steps", "6", ranks=1)
    assert "max_steps: 6" in file.read_text() and len(read_losses(output)) == 6
    run_training(tiny_inputs, tmp_path / "unbroken")
    assert read_losses(output) == read_losses(tmp_path / "unbroken")
