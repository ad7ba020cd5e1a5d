"""Steps and disks that go wrong: a clear end or a counted skip, and never a checkpoint lost."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.training_runs import LORA, flags_of, history, prepare, run
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.checkpoint.manifest import find_checkpoint_errors, find_latest_valid_checkpoint
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.runtime.shutdown import describe_error

COSINE = [*LORA, "--lr_scheduler_type", "cosine", "--max_steps", "8"]
COSINE += ["--backbone_lora_dropout", "0", "--llm_lora_dropout", "0"]
STAGES = {"none": [], **{f"zero{n}": ["--deepspeed", f"zero_stage{n}_config.json"] for n in (1, 2, 3)}}
STAGES["offload"] = ["--deepspeed", "zero_stage3_config_100b_1e7_offload.json"]
SKIPPED = re.compile(r"step (\d+) is skipped: (.*)")


@pytest.fixture(scope="module")
def poisoned(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint with NaN in the embedding of a word that only one of 13 samples has."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    tokenizer, tensors = load_tokenizer(folder / "model"), load_file(folder / "model/model.safetensors")
    records = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    ids = [{i for turn in record["conversations"] for i in tokenizer(turn["value"]).input_ids} for record in records]
    word = next(i for i in ids[8] if sum(i in others for others in ids) == 1)
    tensors["language_model.model.embed_tokens.weight"][word] = torch.nan
    save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})
    return folder


def skipped(printed: str) -> dict[int, str]:
    return {int(step): why for step, why in SKIPPED.findall(printed)}


def finite(output: Path) -> bool:
    files = [*output.rglob("*.safetensors")]
    return bool(files) and all(bool(t.isfinite().all()) for file in files for t in load_file(file).values())


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_are_skipped_alike_by_all_ranks_at_every_stage(poisoned, tmp_path):
    """One rank of two has the sample that gives NaN; the largest gradient of all other steps is above the bound. The
    others' losses, norms and learning rates show that nothing else changed."""
    run(poisoned, tmp_path / "all", *COSINE, ranks=2)
    norms = [step["grad_norm"] for step in history(tmp_path / "all")]
    large = next(step for step, norm in enumerate(norms, 1) if norm == max(filter(math.isfinite, norms)))
    for stage, flags in STAGES.items():
        output = tmp_path / stage
        bound = ["--skip_above_grad_norm", str(0.999 * norms[large - 1])]
        found = skipped(run(poisoned, output, *COSINE, *flags, *bound, ranks=2).stdout)
        steps, others = history(output), history(tmp_path / "none")
        assert found[2] == found[6] == "the loss or its gradient is not finite", stage
        assert found[large] == f"the norm of the gradient is {norms[large - 1]:.4g}, above --skip_above_grad_norm"
        assert [math.isnan(step["loss"]) for step in steps] == [step["step"] in (2, 6) for step in steps]
        assert [step.get("skipped_steps", 0) for step in steps] == [
            sum(k <= step["step"] for k in found) for step in steps
        ]
        for number, (step, other) in enumerate(zip(steps, others, strict=True)):
            assert step["learning_rate"] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * number / len(steps))))
            for name, tolerance in {"loss": 1e-5, "grad_norm": 1e-4}.items():
                if math.isfinite(other[name]):
                    assert step[name] == pytest.approx(other[name], abs=tolerance), (stage, number, name)
        assert finite(output)
        assert math.isfinite(json.loads((output / "train_results.json").read_text())["train_loss"])


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """Train in this process on a folder's checkpoint; the trainer."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))

    def here(*flags: str, of: Path = tiny, at: TrainerCallback | None = None, checkpoint: str | None = None):
        trainer = prepare([*flags_of(of, tmp_path / "out"), *COSINE, *flags])
        if at:
            trainer.add_callback(at)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return here


def test_a_skipped_step_changes_no_weight(here, poisoned, tmp_path):
    here("--save_steps", "1", "--max_steps", "2", of=poisoned)
    folders = [tmp_path / f"out/checkpoint-{step}/vision_model" for step in (1, 2)]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(tensor.any() for tensor in before.values()), "the first step was none to skip"
    assert finite(tmp_path / "out")


def test_a_loss_that_is_infinite_though_its_gradient_is_not(here):
    trainer = here("--max_steps", "1")
    loss = torch.tensor(1.0, requires_grad=True)
    for factor, found in ((1.0, 1.0), (math.inf, math.nan)):
        (gradient,) = torch.autograd.grad(trainer.propagate_nonfinite_loss(loss + factor - factor), loss)
        assert gradient.item() == pytest.approx(found, nan_ok=True)


def test_too_many_in_a_row_end_the_run(here, tmp_path):
    """The first step throws the weights so far off that no other has a finite loss."""
    message = "4 steps in a row were skipped, step 5 because the loss .* is not finite; --max_skipped_steps allows 3. "
    message += "They changed no weight; the same command goes on from checkpoint-1"
    with pytest.raises(ValueError, match=message):
        here("--learning_rate", "1e25", "--max_skipped_steps", "3", "--save_steps", "1", "--save_total_limit", "1")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert finite(tmp_path / "out/checkpoint-1")


def test_weights_that_are_not_finite_are_not_written(here, tmp_path):
    with pytest.raises(ValueError, match="weights are not finite after step 1 .* and [0-9]+ more.: none are written"):
        here("--learning_rate", "1e39", "--save_steps", "1")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# -- dataloader workers ------------------------------------------------------------------------------------------------


def test_tmpdir_has_room_for_the_sockets_of_workers(tiny, tmp_path, monkeypatch):
    """In the longest folder that is let through, a socket can be; in the next longer one, none."""
    flags = [*flags_of(tiny, tmp_path / "out"), "--dataloader_num_workers"]
    for length, fits in ((75, True), (76, False)):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as of_worker:
            temporary = Path(folder, "a" * (length - len(folder) - 1))
            path = temporary / "pymp-12345678/listener-12345678"
            path.parent.mkdir(parents=True)
            monkeypatch.setattr(tempfile, "tempdir", str(temporary))
            validate_arguments(*parse_args([*flags, "0"]))
            if fits:
                of_worker.bind(str(path))
                validate_arguments(*parse_args([*flags, "1"]))
            else:
                with pytest.raises(OSError, match="AF_UNIX path too long"):
                    of_worker.bind(str(path))
                with pytest.raises(ValueError, match=f"TMPDIR {temporary} is 1 bytes too long .*workers 1: set TMPDIR"):
                    validate_arguments(*parse_args([*flags, "1"]))


class Wrong(torch.utils.data.Dataset):
    def __getitem__(self, index):
        try:
            raise ValueError("the cause: it is not told")
        except ValueError as error:
            raise (ValueError, KeyError)[index]("ValueError: 3 is not 4") from error


def test_an_error_in_a_worker_is_told_without_its_trace():
    for index, expected in enumerate(["ValueError: 3 is not 4", "KeyError: 'ValueError: 3 is not 4'"]):
        with pytest.raises((ValueError, KeyError)) as caught:
            next(iter(DataLoader(Wrong(), sampler=[index], num_workers=1)))
        assert describe_error(caught.value).words == expected


class Leaving(torch.utils.data.Dataset):
    """Its samples cannot be had: the worker waits at the first, is cut off in the middle of the second."""

    def __getitem__(self, index):
        return self if index else time.sleep(60)

    def __reduce__(self):
        return (cut_off, ())


def cut_off():
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_killed_worker_is_told_alike_whether_it_is_waited_for_or_not(waited_for):
    with pytest.raises(RuntimeError) as caught:
        batches = iter(DataLoader(Leaving(), sampler=[0], num_workers=1))
        worker = batches._workers[0].pid
        if waited_for:
            threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
            next(batches)
        os.kill(worker, signal.SIGKILL)
        time.sleep(60)
    words = describe_error(caught.value).words
    assert words.startswith(
        f"RuntimeError: DataLoader worker (pid {worker}) is killed by signal: Killed; a process that"
    )


def test_a_worker_killed_while_a_tensor_is_taken_from_it_is_told_as_such():
    with pytest.raises(ConnectionResetError) as caught:
        next(iter(DataLoader(Leaving(), sampler=[1], num_workers=1, collate_fn=list)))
    assert describe_error(caught.value).words.startswith(
        "[Errno 104] Connection reset by peer; a process that reads data has"
    )
    with pytest.raises(ConnectionResetError) as caught:
        cut_off()
    assert describe_error(caught.value).words == "[Errno 104] Connection reset by peer"


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB at the output folder: (mount options) -> mount or remount it."""

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path / "out"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    (tmp_path / "out").mkdir()
    mount("size=1m")
    yield mount
    subprocess.run(["umount", "--lazy", tmp_path / "out"], check=True)


class At(TrainerCallback):
    """Does something behind a step, before its log and its checkpoint."""

    def __init__(self, step: int, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def fill(folder: Path) -> None:
    """Leave 20 kB."""
    (folder / "of_somebody_else").write_bytes(b"0" * (shutil.disk_usage(folder).free - 20_000))


SAVE = ["--save_steps", "2", "--save_total_limit", "1"]
FULL = (
    "checkpoint-4 cannot be written: .*; [0-9,]+ bytes are free there; the same command goes on from checkpoint-2 when"
)


def test_a_full_disk(here, disk, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match=FULL):
        here(*SAVE, at=At(3, lambda: fill(out)))
    (out / "of_somebody_else").unlink()
    assert find_checkpoint_errors(out / "checkpoint-2") == []
    trainer = here(*SAVE, checkpoint=str(out / "checkpoint-2"))
    assert trainer.state.global_step == 8
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-8"] and not (out / "unfinished").exists()


def test_a_disk_that_has_become_read_only(here, disk, tmp_path):
    with pytest.raises(OSError, match="Read-only file system"):
        here(*SAVE, at=At(3, lambda: disk("remount,ro")))
    assert find_checkpoint_errors(tmp_path / "out/checkpoint-2") == []


def test_a_read_only_disk_is_known_before_the_first_step(here, disk):
    disk("remount,ro")
    with pytest.raises(OSError, match="no checkpoint can be written to .*: .*Read-only file system"):
        here(*SAVE)


def test_the_output_folder_is_removed(here, tmp_path, caplog):
    """What is in memory is saved at once, and the run goes on, TensorBoard included."""
    out = tmp_path / "out"
    trainer = here(*SAVE, "--max_steps", "3", "--report_to", "tensorboard", at=At(3, lambda: shutil.rmtree(out)))
    assert f"{out} was removed while the run was writing to it" in caplog.text
    assert trainer.state.global_step == 3
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert find_checkpoint_errors(out / "checkpoint-3") == [] and list(out.glob("runs/*/events*"))


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_with_one_sentence(tiny, disk, tmp_path):
    disk("remount,size=700k")
    done = run(tiny, tmp_path / "out", *COSINE, "--save_steps", "1", ranks=2, status=1)
    assert re.search(
        "error on rank 0: checkpoint-[0-9] cannot be written: .*; the same command goes on from checkpoint-",
        done.stderr,
    )
    newest = find_latest_valid_checkpoint(tmp_path / "out", tell=print)
    assert newest and newest.name == done.stderr.split("goes on from ")[1].split()[0]
