"""Train a tiny model with the real entry point, ranks and DeepSpeed."""

import json
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    build_composition_flags,
    build_run_flags,
    load_weights,
    prepare_batch,
    prepare_trainer,
    read_losses,
    read_step_logs,
    remove_image_tokens,
    run_training,
    train_in_process,
    write_meta_file,
)
from transformers import TrainerCallback

from internvl.constants import SPECIAL_TOKENS
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.runtime.signals import PreemptionListener
from internvl.train import graceful_stop


@pytest.fixture(scope="module")
def lora_run(tiny_inputs, tmp_path_factory):
    """Train both adapters on two ranks under torchrun.

    Returns the output folder and what was printed.
    """
    output = tmp_path_factory.mktemp("runs") / "lora"
    return output, run_training(tiny_inputs, output, *TRAIN_ADAPTERS, ranks=2, launcher=True).stdout


@pytest.mark.multiprocess
def test_lora_run_changes_only_adapters(tiny_inputs, lora_run):
    output, _ = lora_run
    base, trained = load_weights(tiny_inputs / "model"), load_weights(output)
    frozen = {name: t for name, t in trained.items() if "lora_" not in name}
    assert len(frozen) == len(base)
    for name, tensor in frozen.items():
        base_name = name.replace("base_model.model.", "").replace("base_layer.", "")
        assert torch.equal(tensor, base[base_name]), f"{name} is frozen and has changed"
    lora_b = [tensor for name, tensor in trained.items() if "lora_B" in name]
    assert lora_b
    assert all(tensor.any() for tensor in lora_b), "an adapter has not changed"


@pytest.mark.multiprocess
def test_run_logs_its_parameters_and_metrics(lora_run):
    output, printed = lora_run
    assert "vision encoder" in printed
    assert "LoRA rank" in printed
    steps = read_step_logs(output)
    assert len(steps) == 6
    for key in ("grad_norm", "learning_rate", "tokens_per_second"):
        assert all(entry[key] > 0 for entry in steps), key
    assert any(entry["tiles_per_second"] > 0 for entry in steps)
    assert (output / "train_results.json").exists()
    assert (output / "checkpoint-3").is_dir()


@pytest.mark.multiprocess
def test_zero3_composes_and_resizes_a_model_as_without(tiny_inputs, model_parts, tmp_path):
    """Every rank holds a shard of each part.

    The head is untied from the embedding, the projector is loaded, nine tokens are added and tiles are larger.
    """
    flags = [
        *build_composition_flags(model_parts),
        "--mlp_path",
        f"{model_parts}/mlp_projector.pth",
        "--force_image_size",
        "112",
    ]
    flags += ["--max_steps", "3", "--unfreeze_vit_layers", "-1", *TRAIN_LLM_AND_PROJECTOR]
    run_training(tiny_inputs, tmp_path / "reference", *flags, ranks=2)
    run_training(tiny_inputs, tmp_path / "zero3", *flags, "--deepspeed", "zero_stage3_config.json", ranks=2)
    torch.testing.assert_close(read_losses(tmp_path / "zero3"), read_losses(tmp_path / "reference"), atol=1e-5, rtol=0)
    zero3, reference = load_weights(tmp_path / "zero3"), load_weights(tmp_path / "reference")
    assert {name: tensor.shape for name, tensor in zero3.items()} == {
        n: tensor.shape for n, tensor in reference.items()
    }


@pytest.mark.multiprocess
def test_number_of_ranks_and_workers_does_not_change_losses(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    trainer = prepare_trainer(
        [*build_run_flags(tiny_inputs, tmp_path / "one"), *TRAIN_LLM_AND_PROJECTOR, "--dataloader_num_workers", "2"]
    )
    before = psutil.Process().children()
    trainer.train()
    trainer.save_state()
    assert psutil.Process().children() == before, "dataloader workers are still running"
    run_training(tiny_inputs, tmp_path / "two", *TRAIN_LLM_AND_PROJECTOR, ranks=2)
    torch.testing.assert_close(read_losses(tmp_path / "one"), read_losses(tmp_path / "two"), atol=1e-5, rtol=0)


@pytest.mark.multiprocess
def test_resumed_run_equals_unbroken_run(tiny_inputs, lora_run, tmp_path):
    shutil.copytree(lora_run[0] / "checkpoint-3", tmp_path / "out/checkpoint-3")
    printed = run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, ranks=2).stdout
    assert "Resuming from" in printed
    assert read_losses(tmp_path / "out") == read_losses(lora_run[0])
    resumed = load_weights(tmp_path / "out")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in load_weights(lora_run[0]).items())


@pytest.mark.multiprocess
def test_resuming_at_the_start_of_an_epoch_equals_unbroken_run(tiny_inputs, tmp_path, monkeypatch):
    """A resumed run starts its workers as the unbroken run has them.

    Dataloader workers are persistent: they live through all epochs.
    """
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = [*TRAIN_ADAPTERS, "--dataloader_num_workers", "1", "--save_steps", "4"]
    train_in_process(tiny_inputs, tmp_path / "unbroken", *flags)
    last = read_step_logs(tmp_path / "unbroken")[3]
    assert last["epoch"] == 1
    shutil.copytree(tmp_path / "unbroken/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    for file in (tmp_path / "unbroken").glob("data-*"):
        shutil.copy(file, tmp_path / "resumed")
    run_training(tiny_inputs, tmp_path / "resumed", *flags)
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "unbroken")


CONSTANT_RATE = "--lr_scheduler_type constant_with_warmup --warmup_steps 2 --save_steps 1".split()
ROW_FLAGS = {
    "samples": [],
    "samples from workers": ["--dataloader_num_workers", "2"],
    "packed rows from workers": "--use_packed_ds True --max_packed_tokens 200 --dataloader_num_workers 1".split(),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("rows", ROW_FLAGS)
def test_resuming_anywhere_equals_the_unbroken_run(tiny_inputs, tmp_path, rows):
    """The run ends within an epoch, at a constant learning rate: a step too many or too few would show."""
    flags = [*TRAIN_ADAPTERS, *CONSTANT_RATE, *ROW_FLAGS[rows], "--max_steps", "7"]
    run_training(tiny_inputs, tmp_path / "unbroken", *flags)
    expected, losses = load_weights(tmp_path / "unbroken"), read_losses(tmp_path / "unbroken")
    assert len(losses) == 7
    assert read_step_logs(tmp_path / "unbroken")[-1]["epoch"] % 1
    for step in (1, 3, 6, 7):
        output = tmp_path / f"from_{step}"
        shutil.copytree(tmp_path / f"unbroken/checkpoint-{step}", output / f"checkpoint-{step}")
        run_training(tiny_inputs, output, *flags)
        assert read_losses(output) == losses
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(output).items())
        assert max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")) == 7


def test_unusable_samples_are_reported_before_each_checkpoint(tiny_inputs, goldens, tmp_path, monkeypatch, caplog):
    """The run ends at its checkpoint, long before the next report. The resumed run does not read them again."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(goldens / "dataset/images", tmp_path / "images")
    (tmp_path / "images/im0.png").write_bytes((tmp_path / "images/im0.png").read_bytes()[:200])
    shutil.copytree(tiny_inputs, tmp_path / "tiny")
    write_meta_file(tmp_path / "tiny", tmp_path / "images")
    flags = ["--max_bad_samples", "8", "--logging_steps", "100", "--save_steps", "4", "--max_steps", "8"]
    trainer = prepare_trainer([*build_run_flags(tmp_path / "tiny", tmp_path / "out"), *TRAIN_ADAPTERS, *flags])

    def get_reported() -> list[str]:
        return [record.getMessage() for record in caplog.records if "Skipped sample" in record.getMessage()]

    class StopAtCheckpoint(TrainerCallback):
        def on_save(self, *args, **kwargs):
            raise InterruptedError

    before = get_reported()
    trainer.add_callback(StopAtCheckpoint())
    with pytest.raises(InterruptedError):
        trainer.train()
    assert trainer.state.global_step == 4
    assert any("tiny line 1" in message for message in set(get_reported()) - set(before))


def test_interrupted_run_logs_the_steps_since_the_last_report(tiny_inputs, tmp_path, monkeypatch):
    """They would be missing from the metrics of the resumed run."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    listener = PreemptionListener()
    monkeypatch.setattr(graceful_stop, "preemption", listener)
    flags = ["--logging_steps", "100", "--save_steps", "100"]
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *TRAIN_ADAPTERS, *flags])

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                listener.record_signal(signal.SIGUSR1, time.monotonic())

    trainer.add_callback(Interrupt())
    trainer.train()
    assert trainer.graceful_stop.has_stopped
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2]


def test_adapters_are_saved_with_the_projector_of_mlp_path(tiny_inputs, tmp_path, monkeypatch):
    """It is frozen, and the base model has another one."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    projector = {n: t for n, t in load_weights(tiny_inputs / "model").items() if n.startswith("mlp1.")}
    doubled = {name.removeprefix("mlp1."): 2 * tensor for name, tensor in projector.items()}
    torch.save(doubled, tmp_path / "projector.pth")
    flags = ["--mlp_path", str(tmp_path / "projector.pth"), "--max_steps", "1"]
    train_in_process(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *flags)
    saved = load_weights(tmp_path / "out")
    assert all(torch.equal(saved[f"mlp1.{name}"], tensor) for name, tensor in doubled.items())


@pytest.mark.multiprocess
def test_save_steps_of_the_command_line_act_on_resume(tiny_inputs, lora_run, tmp_path):
    shutil.copytree(lora_run[0] / "checkpoint-3", tmp_path / "out/checkpoint-3")
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, "--save_steps", "2", ranks=2)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (3, 4, 6)
    ]


@pytest.mark.multiprocess
def test_unusable_image_is_skipped_during_training(tiny_inputs, goldens, tmp_path):
    """A truncated image is noticed only when it is decoded.

    Measuring sample lengths reads just its header, which is valid.
    """
    images = tmp_path / "images"
    shutil.copytree(goldens / "dataset/images", images)
    (images / "im0.png").write_bytes((images / "im0.png").read_bytes()[:200])
    shutil.copytree(tiny_inputs, tmp_path / "tiny")
    write_meta_file(tmp_path / "tiny", images)
    printed = run_training(
        tmp_path / "tiny", tmp_path / "out", *TRAIN_ADAPTERS, "--max_bad_samples", "8", "--num_train_epochs", "2"
    )
    assert "Skipped sample: tiny line 1" in printed.stdout
    assert all(loss > 0 for loss in read_losses(tmp_path / "out"))
    refused = run_training(
        tmp_path / "tiny", tmp_path / "refused", *TRAIN_ADAPTERS, "--max_bad_samples", "1", ranks=2, status=1
    )
    assert "samples are unusable, --max_bad_samples allows 1" in refused.stderr


INVALID_INPUTS = {
    "missing model": (["--model_name_or_path", "/nowhere/model"], "/nowhere/model"),
    "missing meta file": (["--meta_path", "/nowhere/meta.json"], "/nowhere/meta.json"),
    "no trainable parameters": (["--freeze_backbone", "--freeze_llm", "--freeze_mlp"], "no trainable parameters"),
    "unknown template": (["--conv_style", "vicuna"], "--conv_style vicuna is invalid: expected one of"),
    "pixel shuffle of another model": (
        ["--down_sample_ratio", "0.25"],
        "--down_sample_ratio 0.25 is invalid: expected 0.5",
    ),
    "rows too short for a sample": (["--use_packed_ds", "True", "--max_packed_tokens", "9"], "do not fit into a row"),
    "negative LoRA rank": (["--use_llm_lora", "-3"], "--use_llm_lora -3"),
    "too few tokens for a tile": (["--max_seq_length", "40"], "samples are unusable"),
    "missing checkpoint": (["--resume_from_checkpoint", "/nowhere/checkpoint-3"], "no checkpoint"),
    "no tiles": (["--max_dynamic_patch", "0"], "--max_dynamic_patch 0 is invalid: expected at least --min"),
    "tile size not divisible": (["--force_image_size", "70"], "70 pixels is invalid"),
}


@pytest.mark.parametrize(("flags", "message"), INVALID_INPUTS.values(), ids=INVALID_INPUTS)
def test_invalid_inputs_are_errors_before_the_first_step(tiny_inputs, flags, message, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *flags])


@pytest.mark.multiprocess
def test_error_of_all_ranks_is_printed_once(tiny_inputs, tmp_path):
    done = run_training(tiny_inputs, tmp_path / "out", "--use_llm_lora", "-3", ranks=2, status=1)
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: --use_llm_lora -3 is invalid: expected an integer from 0 to 65,536."
    ]
    assert "Traceback" not in done.stderr


def test_missing_image_tokens_and_another_tile_size_are_adapted(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    remove_image_tokens(tmp_path / "model")
    assert not set(SPECIAL_TOKENS) & load_tokenizer(tmp_path / "model").get_vocab().keys()
    flags = [*build_run_flags(tiny_inputs, tmp_path / "out"), "--model_name_or_path", str(tmp_path / "model")]
    trainer = prepare_trainer([*flags, "--force_image_size", "112", *TRAIN_LLM_AND_PROJECTOR])
    ids = [trainer.processing_class.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == load_tokenizer(tiny_inputs / "model").convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert trainer.model.num_image_token == 16
    batch = prepare_batch(trainer, trainer.data_collator([trainer.train_dataset[(0, 0)]]))
    assert (batch["input_ids"] == trainer.model.img_context_token_id).sum() % 16 == 0
    assert torch.isfinite(trainer.model(**batch).loss)


@pytest.mark.multiprocess
def test_finished_model_is_not_overwritten(tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "model", tmp_path / "out")
    done = run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, status=1)
    assert "holds a finished model and no checkpoint to resume from" in done.stderr
    assert load_weights(tmp_path / "out")


def test_last_step_of_an_epoch_is_averaged_over_its_own_samples(tiny_inputs, tmp_path, monkeypatch):
    """The fourth step has one sample: it is not divided by 4."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *TRAIN_LLM_AND_PROJECTOR])
    plan = trainer.schedule.plan(0)
    last = np.append(plan.samples, -1)[plan.steps[3]]
    assert last.tolist() == [[[last.max()]], [[-1]], [[-1]], [[-1]]]
    batch = trainer.data_collator([trainer.train_dataset[(0, last.max())]])
    batch = prepare_batch(trainer, batch)
    trainer.model.train()
    for step, scale in ((2, 1), (3, 4)):
        trainer.state.global_step = step
        assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(
            scale * trainer.model(**batch).loss.item(), rel=1e-6
        )


@pytest.mark.parametrize("tokens", [("pad_token",), ("pad_token", "eos_token")])
def test_a_tokenizer_without_a_padding_token_gives_the_same_losses(tiny_inputs, tmp_path, monkeypatch, tokens):
    """Rows of a micro-batch are padded with the end-of-text token or with 0. Padding is masked."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = [*TRAIN_ADAPTERS, *"--max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1".split()]
    train_in_process(tiny_inputs, tmp_path / "expected", *flags)
    model = shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    for file in (model / "tokenizer_config.json", model / "special_tokens_map.json"):
        fields = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in fields.items() if key not in tokens}))
    assert load_tokenizer(model).pad_token_id != load_tokenizer(tiny_inputs / "model").pad_token_id
    train_in_process(tiny_inputs, tmp_path / "out", *flags, "--model_name_or_path", str(model))
    assert read_losses(tmp_path / "out") == read_losses(tmp_path / "expected")
