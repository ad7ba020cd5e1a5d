"""Mixtures of experts, from training to a merged checkpoint: Qwen3-MoE and GPT-OSS."""

from pathlib import Path

import pytest
import torch
from helpers.agreement import compute_probe_logits
from helpers.tiny_models import make_tiny_checkpoint as make_model
from helpers.training_runs import TRAIN_ADAPTERS, load_weights, read_losses, run_training, write_meta_file

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.merge_lora import main as merge_lora

pytestmark = pytest.mark.multiprocess


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def mixture(request, tiny_inputs, goldens, tmp_path) -> Path:
    """Make a folder like `tiny`, with a mixture of experts."""
    folder = tmp_path / "tiny"
    make_model(folder / "model", goldens / "tokenizer", request.param)
    (folder / "train.jsonl").write_text((tiny_inputs / "train.jsonl").read_text())
    write_meta_file(folder, goldens / "dataset/images")
    return folder


def test_both_adapters_are_trained_saved_and_merged(mixture, tmp_path):
    output = tmp_path / "out"
    run_training(mixture, output, *TRAIN_ADAPTERS, "--max_steps", "3", "--deepspeed", "zero_stage2_config.json")
    assert len(read_losses(output)) == 3
    base, trained = (InternVLChatModel.from_pretrained(folder) for folder in (mixture / "model", output))
    before = base.state_dict()
    for name, tensor in trained.state_dict().items():
        if "lora_" not in name:
            base_name = name.replace("base_model.model.", "").replace("base_layer.", "")
            assert torch.equal(tensor, before[base_name]), f"{name} is frozen but changed"
    changed = {name: bool(tensor.any()) for name, tensor in trained.state_dict().items() if "lora_B" in name}
    assert all(changed.values()), "an adapter was not trained"
    for place in ("vision_model", "self_attn.q_proj", "mlp.experts"):
        assert any(place in name for name in changed), f"no adapter in {place}"

    tokenizer = load_tokenizer(output)
    adapted = compute_probe_logits(trained, tokenizer)
    assert not torch.allclose(adapted, compute_probe_logits(base, tokenizer), atol=1e-3)
    merge_lora([str(output), str(tmp_path / "merged"), "--dtype", "float32"])
    assert load_weights(tmp_path / "merged").keys() == load_weights(mixture / "model").keys()
    merged = InternVLChatModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(compute_probe_logits(merged, tokenizer), adapted, atol=1e-4, rtol=1e-4)


def test_lora_on_experts_is_refused_under_zero_3(mixture, tmp_path):
    done = run_training(mixture, tmp_path / "out", *TRAIN_ADAPTERS, "--deepspeed", "zero_stage3_config.json", status=1)
    assert "error: LoRA on experts is not supported under ZeRO-3" in done.stderr
