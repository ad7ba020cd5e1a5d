"""Non-finite steps, dead DataLoader workers and failing disks lose no checkpoint."""

import json
import math
import multiprocessing
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    ZERO_FLAGS,
    build_run_flags,
    prepare_trainer,
    read_step_logs,
    run_training,
)
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.checkpoint.manifest import find_checkpoint_errors, find_latest_valid_checkpoint
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.runtime.shutdown import make_exit_report

COSINE = [*TRAIN_ADAPTERS, "--lr_scheduler_type", "cosine", "--max_steps", "8"]
COSINE += ["--backbone_lora_dropout", "0", "--llm_lora_dropout", "0"]
STRATEGIES = ZERO_FLAGS | {"offload": ["--deepspeed", "zero_stage3_config_100b_1e7_offload.json"]}
SKIPPED_STEP = re.compile(r"Skipped step (\d+): (.*)")


@pytest.fixture(scope="module")
def nan_inputs(tiny_inputs, tmp_path_factory) -> Path:
    """Write inputs whose model has NaN in one word's embedding.

    Only one of the 13 samples has the word.
    """
    folder = tmp_path_factory.mktemp("nan")
    shutil.copytree(tiny_inputs, folder, dirs_exist_ok=True)
    tokenizer, tensors = load_tokenizer(folder / "model"), load_file(folder / "model/model.safetensors")
    records = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    sample_ids = [
        {i for turn in record["conversations"] for i in tokenizer(turn["value"]).input_ids} for record in records
    ]
    rare_id = next(i for i in sample_ids[8] if sum(i in ids for ids in sample_ids) == 1)
    tensors["language_model.model.embed_tokens.weight"][rare_id] = torch.nan
    save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})
    return folder


def parse_skipped_steps(output: str) -> dict[int, str]:
    """Parse skipped steps and their reasons from a run's output."""
    return {int(step): reason for step, reason in SKIPPED_STEP.findall(output)}


def are_saved_weights_finite(output: Path) -> bool:
    files = [*output.rglob("*.safetensors")]
    return bool(files) and all(bool(t.isfinite().all()) for file in files for t in load_file(file).values())


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_all_ranks_skip_the_same_steps_under_every_strategy(nan_inputs, tmp_path):
    """Two steps are non-finite on one rank, one is above the bound.

    Losses, norms and learning rates of the other steps show that nothing else changed.
    """
    run_training(nan_inputs, tmp_path / "no_bound", *COSINE, ranks=2)
    norms = [entry["grad_norm"] for entry in read_step_logs(tmp_path / "no_bound")]
    max_norm = max(filter(math.isfinite, norms))
    large_step = 1 + norms.index(max_norm)
    bound = 0.999 * max_norm
    for strategy, flags in STRATEGIES.items():  # "none", without DeepSpeed, is the first
        output = tmp_path / strategy
        bound_flags = ["--skip_above_grad_norm", str(bound)]
        skipped = parse_skipped_steps(run_training(nan_inputs, output, *COSINE, *flags, *bound_flags, ranks=2).stdout)
        entries, expected_entries = read_step_logs(output), read_step_logs(tmp_path / "none")
        assert skipped[2] == skipped[6] == "non-finite loss or gradient", strategy
        assert skipped[large_step] == f"gradient norm {max_norm:.4g} is above --skip_above_grad_norm {bound:g}"
        assert [math.isnan(entry["loss"]) for entry in entries] == [entry["step"] in (2, 6) for entry in entries]
        assert [entry.get("skipped_steps", 0) for entry in entries] == [
            sum(step <= entry["step"] for step in skipped) for entry in entries
        ]
        for steps_before, (entry, expected) in enumerate(zip(entries, expected_entries, strict=True)):
            # The cosine schedule counts skipped steps, too.
            learning_rate = 0.5e-3 * (1 + math.cos(math.pi * steps_before / len(entries)))
            assert entry["learning_rate"] == pytest.approx(learning_rate)
            for name, tolerance in {"loss": 1e-5, "grad_norm": 1e-4}.items():
                if math.isfinite(expected[name]):
                    assert entry[name] == pytest.approx(expected[name], abs=tolerance), (strategy, steps_before, name)
        assert are_saved_weights_finite(output)
        assert math.isfinite(json.loads((output / "train_results.json").read_text())["train_loss"])


@pytest.fixture
def train(tiny_inputs, tmp_path, monkeypatch):
    """Return a function that trains in this process and returns the trainer.

    The output folder is `tmp_path / "out"`.
    """
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))

    def train(
        *flags: str,
        inputs: Path = tiny_inputs,
        callback: TrainerCallback | None = None,
        checkpoint: str = "",
        learning_rate: float | None = None,  # also one that the flag does not allow
    ):
        trainer = prepare_trainer([*build_run_flags(inputs, tmp_path / "out"), *COSINE, *flags])
        trainer.args.learning_rate = learning_rate or trainer.args.learning_rate
        if callback:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint or None)
        return trainer

    return train


def test_skipped_step_changes_no_weight(train, nan_inputs, tmp_path):
    train("--save_steps", "1", "--max_steps", "2", inputs=nan_inputs)  # step 2 is skipped
    folders = [tmp_path / f"out/checkpoint-{step}/vision_model" for step in (1, 2)]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(tensor.any() for tensor in before.values()), "step 1 is not skipped"
    assert are_saved_weights_finite(tmp_path / "out")


def test_nonfinite_loss_with_a_finite_gradient_is_propagated(train):
    trainer = train("--max_steps", "1")
    loss = torch.tensor(1.0, requires_grad=True)
    for offset, expected in ((1.0, 1.0), (math.inf, math.nan)):  # the gradient of x + inf - inf is 1
        (gradient,) = torch.autograd.grad(trainer.guard.propagate_nonfinite_loss(loss + offset - offset), loss)
        assert gradient.item() == pytest.approx(expected, nan_ok=True)


def test_too_many_skipped_steps_in_a_row_end_the_run(train, tmp_path):
    message = (
        "4 steps in a row were skipped, step 5 because of: non-finite loss or gradient. --max_skipped_steps allows 3. "
        "They changed no weight; the same command resumes from checkpoint-1"
    )
    # After a step at this learning rate no loss is finite.
    flags = ["--max_skipped_steps", "3", "--save_steps", "1", "--save_total_limit", "1"]
    with pytest.raises(ValueError, match=message):
        train(*flags, learning_rate=1e25)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert are_saved_weights_finite(tmp_path / "out/checkpoint-1")


def test_nonfinite_weights_are_not_saved(train, tmp_path):
    with pytest.raises(ValueError, match="Non-finite weights after step 1 .* and [0-9]+ more.: nothing is saved"):
        train("--save_steps", "1", learning_rate=1e39)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# -- dataloader workers ------------------------------------------------------------------------------------------------


def test_tmpdir_too_long_for_worker_sockets_is_an_error(tiny_inputs, tmp_path, monkeypatch):
    """The longest TMPDIR that validation accepts is the longest that works."""
    flags = [*build_run_flags(tiny_inputs, tmp_path / "out"), "--dataloader_num_workers"]
    for length, fits in ((75, True), (76, False)):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as worker_socket:
            tmpdir = Path(folder, "a" * (length - len(folder) - 1))
            path = tmpdir / "pymp-12345678/listener-12345678"  # as multiprocessing names them
            path.parent.mkdir(parents=True)
            monkeypatch.setattr(tempfile, "tempdir", str(tmpdir))
            validate_arguments(*parse_args([*flags, "0"]))
            if fits:
                worker_socket.bind(str(path))
                validate_arguments(*parse_args([*flags, "1"]))
            else:
                with pytest.raises(OSError, match="AF_UNIX path too long"):
                    worker_socket.bind(str(path))
                with pytest.raises(ValueError, match=f"TMPDIR {tmpdir} is 1 bytes too long .*workers 1: set TMPDIR"):
                    validate_arguments(*parse_args([*flags, "1"]))


class FailingDataset(torch.utils.data.Dataset):
    """Raises a ValueError for sample 0, a KeyError for sample 1."""

    def __getitem__(self, index):
        try:
            raise ValueError("the cause, which is not reported")
        except ValueError as error:
            raise (ValueError, KeyError)[index]("ValueError: 3 is not 4") from error


def test_error_in_a_worker_is_reported_without_its_traceback():
    for index, expected in enumerate(["ValueError: 3 is not 4", "KeyError: 'ValueError: 3 is not 4'"]):
        with pytest.raises((ValueError, KeyError)) as caught:
            next(iter(DataLoader(FailingDataset(), sampler=[index], num_workers=1)))
        assert make_exit_report(caught.value).message == expected


class UnavailableDataset(torch.utils.data.Dataset):
    """Dataset whose worker hangs at sample 0; unpickling sample 1 fails."""

    def __getitem__(self, index):
        return self if index else time.sleep(60)

    def __reduce__(self):
        return (reset_connection, ())


def reset_connection():
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("is_waiting", [True, False])
def test_killed_worker_is_reported_whether_or_not_the_run_waits_for_it(is_waiting):
    with pytest.raises(RuntimeError) as caught:
        other_processes = set(multiprocessing.active_children())
        batches = iter(DataLoader(UnavailableDataset(), sampler=[0], num_workers=1))
        (worker,) = set(multiprocessing.active_children()) - other_processes
        if is_waiting:
            threading.Timer(0.5, worker.kill).start()
            next(batches)
        worker.kill()
        time.sleep(60)  # until torch's SIGCHLD handler raises
    message = (
        f"RuntimeError: DataLoader worker (pid {worker.pid}) is killed by signal: Killed; a DataLoader worker died"
    )
    assert make_exit_report(caught.value).message.startswith(message)


def test_worker_killed_while_a_tensor_is_received_is_reported():
    with pytest.raises(ConnectionResetError) as caught:
        next(iter(DataLoader(UnavailableDataset(), sampler=[1], num_workers=1, collate_fn=list)))
    message = "[Errno 104] Connection reset by peer; a DataLoader worker died"
    assert make_exit_report(caught.value).message.startswith(message)
    # Outside of a DataLoader the same error has another cause.
    with pytest.raises(ConnectionResetError) as caught:
        reset_connection()
    assert make_exit_report(caught.value).message == "[Errno 104] Connection reset by peer"


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of 1 MB at the output folder.

    Returns a function that mounts it again, with other options.
    """

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path / "out"]
        completed = subprocess.run(command, capture_output=True, text=True)
        if completed.returncode:
            pytest.skip(f"mounting a file system is not permitted here: {completed.stderr.strip()}")

    (tmp_path / "out").mkdir()
    mount("size=1m")
    yield mount
    subprocess.run(["umount", "--lazy", tmp_path / "out"], check=True)


class CallAtStep(TrainerCallback):
    """Calls a function after an optimizer step, before logging and saving."""

    def __init__(self, step: int, function: Callable[[], object]):
        self.step, self.function = step, function

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.function()


def fill_disk(folder: Path) -> None:
    """Leave 20 kB free."""
    (folder / "large_file").write_bytes(b"0" * (shutil.disk_usage(folder).free - 20_000))


SAVE_FLAGS = ["--save_steps", "2", "--save_total_limit", "1"]
DISK_FULL_MESSAGE = (
    "checkpoint-4 cannot be written: .*; [0-9,]+ bytes are free there; the same command resumes from checkpoint-2 once"
)


def test_run_resumes_after_a_full_disk(train, disk, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match=DISK_FULL_MESSAGE):
        train(*SAVE_FLAGS, callback=CallAtStep(3, lambda: fill_disk(out)))
    (out / "large_file").unlink()
    assert find_checkpoint_errors(out / "checkpoint-2") == []
    trainer = train(*SAVE_FLAGS, checkpoint=str(out / "checkpoint-2"))
    assert trainer.state.global_step == 8
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-8"] and not (out / "unfinished").exists()


def test_disk_that_becomes_read_only_keeps_the_checkpoint(train, disk, tmp_path):
    with pytest.raises(OSError, match="Read-only file system"):
        train(*SAVE_FLAGS, callback=CallAtStep(3, lambda: disk("remount,ro")))
    assert find_checkpoint_errors(tmp_path / "out/checkpoint-2") == []


def test_read_only_disk_is_reported_before_the_first_step(train, disk):
    disk("remount,ro")
    with pytest.raises(OSError, match="no checkpoint can be written to .*: .*Read-only file system"):
        train(*SAVE_FLAGS)


def test_run_continues_after_its_output_folder_was_removed(train, tmp_path, caplog):
    """A checkpoint is saved at once; TensorBoard's logs continue, too."""
    out = tmp_path / "out"
    trainer = train(
        *SAVE_FLAGS,
        "--max_steps",
        "3",
        "--report_to",
        "tensorboard",
        callback=CallAtStep(3, lambda: shutil.rmtree(out)),
    )
    assert f"{out} was removed while the run was writing to it" in caplog.text
    assert trainer.state.global_step == 3
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert find_checkpoint_errors(out / "checkpoint-3") == [] and list(out.glob("runs/*/events*"))


@pytest.mark.multiprocess
def test_full_disk_ends_all_ranks_with_one_message(tiny_inputs, disk, tmp_path):
    disk("remount,size=700k")
    failed = run_training(tiny_inputs, tmp_path / "out", *COSINE, "--save_steps", "1", ranks=2, status=1)
    assert re.search(
        "error: rank 0 failed: checkpoint-[0-9] cannot be written: .*; the same command resumes from checkpoint-",
        failed.stderr,
    )
    latest = find_latest_valid_checkpoint(tmp_path / "out", print)
    assert latest and latest.name == failed.stderr.split("resumes from ")[1].split()[0]
