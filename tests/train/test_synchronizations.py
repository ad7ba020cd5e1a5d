"""Micro-batches of a training run never make the CPU wait for the GPU."""

import json
from pathlib import Path

import pytest
import torch
from helpers.model_cases import ModelCase
from helpers.synchronizations import SynchronizationCounter, assert_one_synchronization_a_step, fake_device, make_fake
from helpers.training_runs import TRAIN_ADAPTERS, build_run_flags, prepare_trainer
from packaging.version import Version

from internvl.data.collators import collate_rows, move_batch
from internvl.model.varlen_attention import use_varlen_attention

# `nn.Dropout` is random on the device. Its replacement on CPUs draws a number of random numbers.
NO_DROPOUT = "--backbone_lora_dropout 0 --llm_lora_dropout 0".split()
TWO_STEPS = "--max_steps 2 --gradient_accumulation_steps 2 --save_strategy no --no_smoke_save".split()
PACKED = "--use_packed_ds True --max_packed_tokens 400 --num_images_expected 16 --strict_mode False".split()
RUNS = {
    "packed": PACKED,
    "padded": ["--per_device_train_batch_size", "2"],
    "loss over all ranks": [*PACKED, *"--loss_reduction_all_gather True --loss_reduction square".split()],
    "recomputed layers": [*PACKED, "--grad_checkpoint", "True"],
}


@pytest.fixture
def text_inputs(tiny_inputs, tmp_path) -> Path:
    """Return a folder like `tiny_inputs`, whose samples have no images."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_inputs / "model")
    [meta] = json.loads((tiny_inputs / "meta.json").read_text()).values()
    lines = Path(meta["annotation"]).read_text().splitlines()
    texts = [line for line in lines if not {"image", "video"} & json.loads(line).keys()]
    (folder / "train.jsonl").write_text("\n".join(texts))
    (folder / "meta.json").write_text(json.dumps({"text": meta | {"annotation": f"{folder}/train.jsonl"}}))
    return folder


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_micro_batches_do_not_synchronize(tiny_inputs, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = [*build_run_flags(tiny_inputs, tmp_path / "out"), *TRAIN_ADAPTERS, *NO_DROPOUT, *TWO_STEPS, *flags]
    assert_one_synchronization_a_step(prepare_trainer(flags))


def test_micro_batches_of_text_do_not_synchronize(text_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    flags = [*build_run_flags(text_inputs, tmp_path / "out"), *TRAIN_ADAPTERS, *NO_DROPOUT, *TWO_STEPS, *PACKED]
    assert_one_synchronization_a_step(prepare_trainer(flags))


# -- without values ----------------------------------------------------------------------------------------------------


def make_batch(case: ModelCase, kind: str) -> dict:
    row = case.packed_batch
    row |= {key: row[key][0] for key in ("input_ids", "labels", "position_ids")}
    row["pixel_values"] = row["pixel_values"].to(torch.uint8)
    if kind == "text":
        row["pixel_values"], row["image_flags"] = row["pixel_values"][:0], row["image_flags"][:0]
        row["input_ids"] = row["input_ids"].clamp(max=case.meta["img_context_token_id"] - 1)
    batch = collate_rows([row], image_token_id=case.meta["img_context_token_id"])
    assert ("tile_indices" in batch) == (kind == "blank tiles"), "the recorded row has one blank tile"
    return batch


@pytest.mark.parametrize("kind", ["blank tiles", "text"])
@pytest.mark.parametrize("name", ["qwen2", "internlm2", "llama", "phi3"])
def test_forward_and_backward_pass_read_no_values(goldens, name, kind):
    """Fake tensors have none."""
    case = ModelCase(goldens / "models" / name)
    model, batch = case.model().train(), make_batch(case, kind)
    use_varlen_attention(model.language_model, packed=True)
    with fake_device(model, "cpu"):
        loss = model(**move_batch(make_fake(batch), torch.device("cpu"), (0.5,) * 3, (0.2,) * 3)).loss
        loss.backward()
        assert loss.shape == () and all(p.grad is not None for p in model.mlp1.parameters())


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 needs a driver for fake CUDA tensors"
)
@pytest.mark.parametrize("kind", ["blank tiles", "text"])
@torch.no_grad()
def test_copies_to_the_device_do_not_block(goldens, kind):
    case = ModelCase(goldens / "models/qwen2")
    model, batch = case.model(), make_batch(case, kind)
    use_varlen_attention(model.language_model, packed=True)
    counter = SynchronizationCounter()
    with fake_device(model, "cuda"), counter:
        on_device = move_batch(make_fake(batch), torch.device("cuda"), (0.5,) * 3, (0.2,) * 3)
        assert {v.device.type for v in on_device.values() if isinstance(v, torch.Tensor)} == {"cuda"}
        assert model.train()(**on_device).loss.device.type == "cuda"
        losses, _ = model.eval()(**on_device, per_token_loss=True)
        assert len(losses) == len(batch["loss_indices"])
        assert not counter.counts
        torch.zeros(1, device="cuda").to("cpu")
        torch.zeros(1).to("cuda")
    assert counter.counts.total() == 2, "the counter recognizes blocking copies"


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_gpu_does_not_synchronize_in_micro_batches(tiny_inputs, tmp_path, monkeypatch, flags):
    """CUDA raises an error if anything waits, from the second step on: libraries initialize themselves in the first."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = [*build_run_flags(tiny_inputs, tmp_path / "out"), *TRAIN_ADAPTERS, *TWO_STEPS, *flags, "--bf16", "True"]
    trainer = prepare_trainer(flags)
    training_step = trainer.training_step

    def run_without_waiting(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.global_step else "default")
        try:
            return training_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.training_step = run_without_waiting
    trainer.train()
    assert trainer.state.global_step == 2
