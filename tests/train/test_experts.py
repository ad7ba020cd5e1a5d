"""Mixtures of experts from the command line to a merged checkpoint: InternVL 3.5's Qwen3-MoE and GPT-OSS."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make as make_model
from helpers.training_runs import LORA, losses, run, weights, write_meta
from tools.merge_lora import main as merge_lora

from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def mixture(request, tiny, goldens, tmp_path) -> Path:
    """Like `tiny`, with another model."""
    folder = tmp_path / "tiny"
    make_model(folder / "model", goldens / "tokenizer", request.param)
    (folder / "train.jsonl").write_text((tiny / "train.jsonl").read_text())
    write_meta(folder, goldens / "dataset/images")
    return folder


def logits(model: InternVLChatModel, folder: Path) -> torch.Tensor:
    tokenizer = load_tokenizer(folder)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    ids = tokenizer(IMG_CONTEXT_TOKEN * model.num_image_token + "What is it?", return_tensors="pt").input_ids
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixels, ids).logits


def test_both_adapters_train_are_saved_and_merged(mixture, tmp_path):
    output = tmp_path / "out"
    run(mixture, output, *LORA, "--max_steps", "3", "--deepspeed", "zero_stage2_config.json")
    assert len(losses(output)) == 3
    base, trained = (InternVLChatModel.from_pretrained(folder) for folder in (mixture / "model", output))
    before = base.state_dict()
    for name, tensor in trained.state_dict().items():
        if "lora_" not in name:
            plain = name.replace("base_model.model.", "").replace("base_layer.", "")
            assert torch.equal(tensor, before[plain]), f"{name} is frozen and moved"
    moved = {name: bool(tensor.any()) for name, tensor in trained.state_dict().items() if "lora_B" in name}
    assert all(moved.values()), "an adapter did not train"
    for place in ("vision_model", "self_attn.q_proj", "mlp.experts"):
        assert any(place in name for name in moved), f"no adapter in {place}"

    adapted = logits(trained, output)
    assert not torch.allclose(adapted, logits(base, output), atol=1e-3)
    merge_lora([str(output), str(tmp_path / "merged"), "--dtype", "float32"])
    assert weights(tmp_path / "merged").keys() == weights(mixture / "model").keys()
    merged = InternVLChatModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, output), adapted, atol=1e-4, rtol=1e-4)


def test_experts_are_not_adapted_under_zero_3(mixture, tmp_path):
    done = run(mixture, tmp_path / "out", *LORA, "--deepspeed", "zero_stage3_config.json", status=1)
    assert "error: LoRA on experts does not run under ZeRO-3" in done.stderr
