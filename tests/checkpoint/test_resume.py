"""Resume from the latest valid checkpoint of a run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    ZERO_FLAGS,
    load_weights,
    read_losses,
    run_training,
)

from internvl.arguments.training import parse_args
from internvl.checkpoint.manifest import MANIFEST_FILE, find_checkpoint_errors, write_manifest
from internvl.checkpoint.resume import choose_resume_checkpoint

pytestmark = pytest.mark.multiprocess

ADAPTER = "vision_model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished_run(tiny_inputs, tmp_path_factory) -> Path:
    """Return the output folder of a run with checkpoint-2, -4 and -6."""
    output = tmp_path_factory.mktemp("resume") / "finished"
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, "--save_steps", "2")
    return output


# Each of these returns a function that damages a checkpoint.


def truncate(name: str, share: float = 0.5):
    """Keep the beginning of a file."""

    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip_bit(name: str):
    """Flip a bit in the middle of a file."""

    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return damage


def remove(name: str):
    return lambda checkpoint: (checkpoint / name).unlink()


def without_manifest(damage_fn):
    """Damage a checkpoint of another program: one without a manifest."""

    def damage(checkpoint: Path) -> None:
        damage_fn(checkpoint)
        (checkpoint / MANIFEST_FILE).unlink()

    return damage


DAMAGES = {
    "adapter truncated": (truncate(ADAPTER), f"{ADAPTER} has [0-9,]+ bytes, expected"),
    "adapter with a flipped bit": (flip_bit(ADAPTER), f"{ADAPTER}: checksum mismatch"),
    "adapter missing": (remove(ADAPTER), f"{ADAPTER} is missing"),
    "optimizer with a flipped bit": (flip_bit("optimizer.pt"), "optimizer.pt: checksum mismatch"),
    "optimizer empty": (truncate("optimizer.pt", 0), "optimizer.pt has 0 bytes"),
    "trainer state empty": (truncate("trainer_state.json", 0), "trainer_state.json has 0 bytes"),
    "trainer state missing": (remove("trainer_state.json"), "trainer_state.json is missing"),
    "manifest truncated": (truncate(MANIFEST_FILE), f"{MANIFEST_FILE} is damaged"),
    "manifest empty": (truncate(MANIFEST_FILE, 0), f"{MANIFEST_FILE} is damaged"),
    "no manifest, adapter truncated": (without_manifest(truncate(ADAPTER)), f"{ADAPTER} is damaged"),
    "no manifest, adapter empty": (without_manifest(truncate(ADAPTER, 0)), f"{ADAPTER} is damaged"),
    "no manifest, empty JSON": (without_manifest(truncate("data_state.json", 0)), "data_state.json is damaged"),
}


@pytest.fixture
def choose_checkpoint(tiny_inputs, finished_run, tmp_path):
    """Return a function that chooses the checkpoint to resume from.

    It looks at a copy of the finished run. Its arguments: flags; a function that damages a checkpoint; the steps of the
    checkpoints to damage.
    """
    shutil.copytree(finished_run, tmp_path / "out")

    def choose_checkpoint(*flags: str, damage_fn=None, steps: tuple[int, ...] = ()) -> str | None:
        for step in steps:
            damage_fn(tmp_path / f"out/checkpoint-{step}")
        flags = ["--model_name_or_path", str(tiny_inputs / "model"), "--output_dir", str(tmp_path / "out"), *flags]
        return choose_resume_checkpoint(parse_args(flags)[2])

    return choose_checkpoint


@pytest.mark.parametrize(("damage_fn", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_skipped(choose_checkpoint, tmp_path, caplog, damage_fn, reason):
    assert Path(choose_checkpoint(damage_fn=damage_fn, steps=(6,))).name == "checkpoint-4"
    assert Path(choose_checkpoint("--resume_from_checkpoint", "auto")).name == "checkpoint-4"
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith(f"Skipped invalid checkpoint {tmp_path}/out/checkpoint-6: ")
    assert re.search(reason, message)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*checkpoint-6.*({reason}|no checkpoint)"):
        choose_checkpoint("--resume_from_checkpoint", str(tmp_path / "out/checkpoint-6"))


def test_no_valid_checkpoint_is_an_error(choose_checkpoint):
    message = "None of the 3 checkpoints in .* is valid .checkpoint-2: .*starts from the beginning"
    with pytest.raises(ValueError, match=message):
        choose_checkpoint(damage_fn=truncate(ADAPTER), steps=(2, 4, 6))


def test_checkpoints_are_ordered_by_step_number(choose_checkpoint, tmp_path):
    newest = (tmp_path / "out/checkpoint-2").rename(tmp_path / "out/checkpoint-10")
    state = json.loads((newest / "trainer_state.json").read_text()) | {"global_step": 10}
    (newest / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(newest, is_writer=True)
    (tmp_path / "out/checkpoint-best").mkdir()
    assert Path(choose_checkpoint()).name == "checkpoint-10"
    assert choose_checkpoint("--overwrite_output_dir", "True") is None


def test_large_files_have_a_checksum_per_block(finished_run, tmp_path):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(finished_run / "checkpoint-6", folder)
    write_manifest(folder, is_writer=True, block=1000)
    entry = json.loads((folder / MANIFEST_FILE).read_text())["files"][ADAPTER]
    assert len(entry["crc32"]) == -(-entry["size"] // 1000) > 3
    assert find_checkpoint_errors(folder) == []
    flip_bit(ADAPTER)(folder)
    assert find_checkpoint_errors(folder) == [f"{ADAPTER}: checksum mismatch"]
    flip_bit(ADAPTER)(folder)
    assert find_checkpoint_errors(folder) == []


def test_two_ranks_skip_the_damaged_checkpoint_and_equal_the_unbroken_run(tiny_inputs, tmp_path):
    """With a limit of one checkpoint, too: the damaged one is removed."""
    unbroken = tmp_path / "unbroken"
    run_training(tiny_inputs, unbroken, *TRAIN_ADAPTERS, "--save_steps", "2", ranks=2)
    shutil.copytree(unbroken, tmp_path / "out")
    flip_bit("optimizer.pt")(tmp_path / "out/checkpoint-6")
    flags = [*TRAIN_ADAPTERS, "--save_steps", "1", "--save_total_limit", "1", "--max_steps", "5"]
    printed = run_training(tiny_inputs, tmp_path / "out", *flags, ranks=2).stdout
    assert printed.count("checkpoint-6: optimizer.pt: checksum mismatch") == 1
    assert f"Latest valid checkpoint: {tmp_path / 'out/checkpoint-4'}" in printed
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, ranks=2)
    assert read_losses(tmp_path / "out") == read_losses(unbroken)
    weights, expected = load_weights(tmp_path / "out"), load_weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


# -- runs whose steps are all trained ----------------------------------------------------------------------------------


def read_results(output: Path) -> dict[str, bytes]:
    """Read the final model, trainer state and metrics of a run."""
    names = [ADAPTER, "language_model/adapter_model.safetensors", "config.json", "trainer_state.json"]
    return {name: (output / name).read_bytes() for name in [*names, "metrics.jsonl", "train_results.json"]}


@pytest.mark.parametrize(
    "flags", ["--max_steps 6", "--max_steps 4", "--max_steps -1 --num_train_epochs 1.5", "--max_steps -1 "
    "--num_train_epochs 1", "--do_train False", "--max_steps 3 --deepspeed zero_stage2_config.json"]
)  # fmt: skip
def test_finished_run_is_left_as_it_is(tiny_inputs, finished_run, tmp_path, flags):
    """The last checkpoint is at the end of the run or beyond, in the middle of an epoch."""
    shutil.copytree(finished_run, tmp_path / "out")
    before = read_results(tmp_path / "out")
    printed = run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *flags.split()).stdout
    assert read_results(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))[-1] == "checkpoint-6"
    if "do_train" not in flags:
        assert "Training has finished: " in printed
        assert f"Nothing to do: the model is in {tmp_path / 'out'}" in printed


@pytest.mark.parametrize("strategy", ["none", "zero3"])
def test_missing_final_model_is_saved_without_a_step(tiny_inputs, tmp_path, strategy):
    """The run was killed after its last checkpoint. A model of an earlier, shorter run is replaced."""
    flags = [*TRAIN_ADAPTERS, *ZERO_FLAGS[strategy]]
    run_training(tiny_inputs, tmp_path / "out", *flags, "--max_steps", "3")
    short = read_results(tmp_path / "out")
    run_training(tiny_inputs, tmp_path / "out", *flags)
    finished = read_results(tmp_path / "out")
    assert finished[ADAPTER] != short[ADAPTER]
    for name in (ADAPTER, "config.json", "trainer_state.json", "train_results.json"):
        (tmp_path / "out" / name).write_bytes(short[name])
    printed = run_training(tiny_inputs, tmp_path / "out", *flags).stdout
    assert "Training has finished: " in printed
    assert "Saved the model of step 6" in printed
    after = read_results(tmp_path / "out")
    assert all(after[name] == finished[name] for name in finished if name.endswith(("safetensors", "jsonl")))
    assert read_losses(tmp_path / "out") == [
        entry["loss"] for entry in map(json.loads, after["metrics.jsonl"].splitlines())
    ]
    # No step was trained, so there is no mean loss to report.
    assert after["train_results.json"] == short["train_results.json"]
    assert b"train_loss" not in after["trainer_state.json"]


def test_model_of_another_run_is_not_taken_for_the_final_one(tiny_inputs, finished_run, tmp_path):
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, "--learning_rate", "1e-4")
    flags = ["--resume_from_checkpoint", str(finished_run / "checkpoint-6")]
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *flags)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (finished_run / ADAPTER).read_bytes()


def test_finished_run_can_be_extended(tiny_inputs, finished_run, tmp_path):
    run_training(tiny_inputs, tmp_path / "long", *TRAIN_ADAPTERS, "--max_steps", "8")
    shutil.copytree(finished_run, tmp_path / "out")
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, "--max_steps", "8")
    assert read_losses(tmp_path / "out") == read_losses(tmp_path / "long")


def test_finished_run_without_checkpoints(tiny_inputs, tmp_path):
    """The same command has nothing to do. Another command would need a checkpoint."""
    flags = [*TRAIN_ADAPTERS, "--save_strategy", "no", "--max_steps", "2"]
    run_training(tiny_inputs, tmp_path / "out", *flags)
    before = read_results(tmp_path / "out")
    printed = run_training(tiny_inputs, tmp_path / "out", *flags, "--logging_steps", "2").stdout
    assert f"Training has finished: nothing to do, the model is in {tmp_path / 'out'}" in printed
    refused = run_training(tiny_inputs, tmp_path / "out", *flags, "--max_steps", "3", status=1)
    assert "holds a finished model and no checkpoint to resume from" in refused.stderr
    assert read_results(tmp_path / "out") == before


def test_full_deepspeed_checkpoint_is_not_resumed_without_its_states(tiny_inputs, tmp_path):
    """transformers would start with empty optimizer states, without a word."""
    flags = ["--freeze_backbone", "True", "--max_steps", "3"]
    run_training(tiny_inputs, tmp_path / "out", *flags, "--deepspeed", "zero_stage2_config.json")
    refused = run_training(tiny_inputs, tmp_path / "out", *flags, "--max_steps", "6", status=1)
    assert "resume with --deepspeed" in refused.stderr
