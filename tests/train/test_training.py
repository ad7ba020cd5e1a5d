"""Real runs of the entry point on a tiny checkpoint: gloo ranks, DeepSpeed, files. One run serves many laws."""

import shutil

import numpy as np
import psutil
import pytest
import torch
from helpers.training_runs import (
    FULL,
    LORA,
    composed,
    flags_of,
    history,
    losses,
    prepare,
    run,
    run_here,
    weights,
    without_image_tokens,
    write_meta,
)

from internvl.constants import SPECIAL_TOKENS
from internvl.model.tokenizers.loading import load_tokenizer


@pytest.fixture(scope="module")
def lora_run(tiny, tmp_path_factory):
    """Two ranks that torchrun started, both adapters, no DeepSpeed."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    return output, run(tiny, output, *LORA, ranks=2, launcher=True).stdout


def test_a_lora_run_moves_adapters_and_nothing_else(tiny, lora_run):
    output, _ = lora_run
    base, trained = weights(tiny / "model"), weights(output)
    frozen = {name: t for name, t in trained.items() if "lora_" not in name}
    assert len(frozen) == len(base)
    for name, tensor in frozen.items():
        plain = name.replace("base_model.model.", "").replace("base_layer.", "")
        assert torch.equal(tensor, base[plain]), f"{name} is frozen and moved"
    lora_b = [tensor for name, tensor in trained.items() if "lora_B" in name]
    assert lora_b
    assert all(tensor.any() for tensor in lora_b), "an adapter did not train"


def test_a_run_tells_what_it_does(lora_run):
    output, printed = lora_run
    assert "vision encoder" in printed
    assert "LoRA rank" in printed
    steps = history(output)
    assert len(steps) == 6
    for key in ("grad_norm", "learning_rate", "tokens_per_second"):
        assert all(entry[key] > 0 for entry in steps), key
    assert any(entry["tiles_per_second"] > 0 for entry in steps)
    assert (output / "train_results.json").exists()
    assert (output / "checkpoint-3").is_dir()


def test_zero_3_composes_resizes_and_grows_alike(tiny, parts, tmp_path):
    """Parts of which every rank holds a slice: an untied head, a projector, nine new tokens and larger tiles."""
    flags = [*composed(parts), "--mlp_path", f"{parts}/mlp_projector.pth", "--force_image_size", "112"]
    flags += ["--max_steps", "3", "--unfreeze_vit_layers", "-1", *FULL]
    run(tiny, tmp_path / "whole", *flags, ranks=2)
    run(tiny, tmp_path / "sliced", *flags, "--deepspeed", "zero_stage3_config.json", ranks=2)
    torch.testing.assert_close(losses(tmp_path / "sliced"), losses(tmp_path / "whole"), atol=1e-5, rtol=0)
    sliced, whole = weights(tmp_path / "sliced"), weights(tmp_path / "whole")
    assert {name: tensor.shape for name, tensor in sliced.items()} == {n: tensor.shape for n, tensor in whole.items()}


def test_the_number_of_ranks_and_of_workers_changes_no_loss(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    trainer = prepare([*flags_of(tiny, tmp_path / "one"), *FULL, "--dataloader_num_workers", "2"])
    before = psutil.Process().children()
    trainer.train()
    trainer.save_state()
    assert psutil.Process().children() == before, "workers end when the training does"
    run(tiny, tmp_path / "two", *FULL, ranks=2)
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5, rtol=0)


def test_resume_equals_unbroken(tiny, lora_run, tmp_path):
    shutil.copytree(lora_run[0] / "checkpoint-3", tmp_path / "out/checkpoint-3")
    printed = run(tiny, tmp_path / "out", *LORA, ranks=2).stdout
    assert "resuming from" in printed
    assert losses(tmp_path / "out") == losses(lora_run[0])
    resumed = weights(tmp_path / "out")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(lora_run[0]).items())


def test_going_on_at_an_epochs_beginning_equals_unbroken(tiny, tmp_path, monkeypatch):
    """Workers live as long as a run: one that goes on starts them where the unbroken one has them."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    flags = [*LORA, "--dataloader_num_workers", "1", "--save_steps", "4"]
    run_here(tiny, tmp_path / "whole", *flags)
    last = history(tmp_path / "whole")[3]
    assert last["epoch"] == 1
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "broken/checkpoint-4")
    for file in (tmp_path / "whole").glob("data-*"):
        shutil.copy(file, tmp_path / "broken")
    run(tiny, tmp_path / "broken", *flags)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_bad_image_found_while_training_is_left_out(tiny, goldens, tmp_path):
    """The header is whole, so measuring does not see it; the pixels are cut off."""
    images = tmp_path / "images"
    shutil.copytree(goldens / "dataset/images", images)
    (images / "im0.png").write_bytes((images / "im0.png").read_bytes()[:200])
    shutil.copytree(tiny, tmp_path / "tiny")
    write_meta(tmp_path / "tiny", images)
    printed = run(tmp_path / "tiny", tmp_path / "out", *LORA, "--max_bad_samples", "8", "--num_train_epochs", "2")
    assert "left out: tiny line 1" in printed.stdout
    assert all(loss > 0 for loss in losses(tmp_path / "out"))
    refused = run(tmp_path / "tiny", tmp_path / "refused", *LORA, "--max_bad_samples", "1", ranks=2, status=1)
    assert "samples cannot be used, --max_bad_samples allows 1" in refused.stderr


WRONG = {
    "no such model": (["--model_name_or_path", "/nowhere/model"], "/nowhere/model"),
    "no such meta file": (["--meta_path", "/nowhere/meta.json"], "/nowhere/meta.json"),
    "nothing to train": (["--freeze_backbone", "--freeze_llm", "--freeze_mlp"], "nothing is left to train"),
    "unknown template": (["--conv_style", "vicuna"], "--conv_style vicuna: known templates are"),
    "another pixel shuffle": (["--down_sample_ratio", "0.25"], "--down_sample_ratio 0.25 differs"),
    "rows that hold nothing": (["--use_packed_ds", "True", "--max_packed_tokens", "9"], "do not fit into a row"),
    "a negative rank": (["--use_llm_lora", "-3"], "--use_llm_lora -3"),
    "tokens too few for one tile": (["--max_seq_length", "40"], "samples cannot be used"),
    "no such checkpoint": (["--resume_from_checkpoint", "/nowhere/checkpoint-3"], "no checkpoint"),
    "no tile at all": (["--max_dynamic_patch", "0"], "--max_dynamic_patch 0: fewest and most tiles"),
    "tiles that do not divide": (["--force_image_size", "70"], "70 pixels does not divide"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_refused_before_the_first_step(tiny, flags, message, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        prepare([*flags_of(tiny, tmp_path / "out"), *flags])


def test_an_error_is_one_sentence_on_every_launcher(tiny, tmp_path):
    done = run(tiny, tmp_path / "out", "--use_llm_lora", "-3", ranks=2, status=1)
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: --use_llm_lora -3: a LoRA rank is positive, or 0 for none."
    ]
    assert "Traceback" not in done.stderr


def test_missing_image_tokens_and_another_tile_size_are_fitted(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny / "model", tmp_path / "model")
    without_image_tokens(tmp_path / "model")
    assert not set(SPECIAL_TOKENS) & load_tokenizer(tmp_path / "model").get_vocab().keys()
    flags = [*flags_of(tiny, tmp_path / "out"), "--model_name_or_path", str(tmp_path / "model")]
    trainer = prepare([*flags, "--force_image_size", "112", *FULL])
    ids = [trainer.processing_class.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == load_tokenizer(tiny / "model").convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert trainer.model.num_image_token == 16
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[(0, 0)]]))
    assert (batch["input_ids"] == trainer.model.img_context_token_id).sum() % 16 == 0
    assert torch.isfinite(trainer.model(**batch).loss)


def test_a_finished_model_is_not_overwritten(tiny, tmp_path):
    done = run(tiny, tiny / "model", *LORA, status=1)
    assert "holds a finished model and no checkpoint to resume from" in done.stderr
    assert weights(tiny / "model")


def test_the_last_step_of_an_epoch_counts_its_samples_in_full(tiny, tmp_path, monkeypatch):
    """13 samples in steps of 4: the fourth step holds one, whose loss the mean over 4 micro-batches must not shrink."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    trainer = prepare([*flags_of(tiny, tmp_path / "out"), *FULL])
    plan = trainer.schedule.plan(0)
    last = np.append(plan.samples, -1)[plan.steps[3]]
    assert last.tolist() == [[[last.max()]], [[-1]], [[-1]], [[-1]]]
    batch = trainer.data_collator([trainer.train_dataset[(0, last.max())]])
    batch = trainer._prepare_inputs(batch)
    trainer.model.train()
    for step, scale in ((2, 1), (3, 4)):
        trainer.state.global_step = step
        assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(
            scale * trainer.model(**batch).loss.item(), rel=1e-6
        )
