"""Tests of the small patch with upstream's pins, run by `test_small_patch`.

They train as upstream's entry does, and chat.
"""

import json

import peft
import pytest
import timm
import torch
import transformers
from helpers.model_cases import ModelCase, assert_close
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters


def test_pinned_versions_are_installed():
    versions = transformers.__version__, peft.__version__, timm.__version__
    assert versions == ("4.37.2", "0.10.0", "0.9.12")


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_train_save_reload_merge(goldens, tmp_path, name):
    """Train as upstream's entry does.

    Frozen parts, LoRA in both, gradient checkpointing, HF Trainer, bfloat16.
    """
    case = ModelCase(goldens / "models" / name)
    config = InternVLChatConfig.from_pretrained(case.folder)
    config.llm_config.attn_implementation = "eager"
    config.vision_config.drop_path_rate, config.select_layer = 0.1, -1
    model = case.model(config=config, torch_dtype=torch.bfloat16)
    model.config.use_cache = model.language_model.config.use_cache = False
    model.vision_model.gradient_checkpointing = model.vision_model.encoder.gradient_checkpointing = True
    model.language_model._set_gradient_checkpointing()
    for part in (model.vision_model, model.language_model, model.mlp1):
        part.requires_grad_(False)
    model.wrap_backbone_lora(r=4, lora_alpha=8)
    model.wrap_llm_lora(r=4, lora_alpha=8)
    model.config.use_backbone_lora = model.config.use_llm_lora = 4

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = "--per_device_train_batch_size 1 --max_steps 4 --learning_rate 1e-2 --report_to none --use_cpu --bf16"
    (args,) = transformers.HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*flags.split(), "--output_dir", str(tmp_path / "out"), "--lr_scheduler_type", "constant"]
    )
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in case.batch.items()}
    trainer = Trainer(model, args, data_collator=lambda rows: rows[0], train_dataset=[batch] * 4)
    losses = [trainer.train().training_loss, model.eval()(**batch).loss.item()]
    assert losses[1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}

    trainer.save_model()
    reloaded = case.model(tmp_path / "out", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
        adapted = reloaded.float()(**case.batch).logits
        merged = merge_adapters(reloaded)(**case.batch).logits
    real = case.batch["attention_mask"].bool()
    assert_close(merged[real], adapted[real])


@pytest.mark.parametrize("is_late", [False, True])
def test_adapters_of_the_llm_alone_get_gradients(goldens, is_late):
    """Checkpoints are reentrant: the input of the LLM must require grad."""
    case = ModelCase(goldens / "models" / "qwen2")
    model = case.model().train().requires_grad_(False)
    if not is_late:
        model.language_model._set_gradient_checkpointing()
    model.wrap_llm_lora(r=4, lora_alpha=8)
    if is_late:
        model.language_model.get_base_model()._set_gradient_checkpointing()
    model(**case.batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_chat_answers_equal_upstreams(goldens):
    golden = json.loads((goldens / "e2e/qwen2/expected.json").read_text())
    model = InternVLChatModel.from_pretrained(goldens / "e2e/qwen2")
    tokenizer = AutoTokenizer.from_pretrained(goldens / golden["tokenizer"])
    pixels = load_file(goldens / "e2e/chat_pixels.safetensors")
    (pixels,) = pixels.values()
    for row in golden["chat"]:
        if "response" in row:
            tiles = pixels[: row["n_tiles"]] if row["n_tiles"] else None
            settings = {"max_new_tokens": 6, "do_sample": False}
            history = row["history"] and [tuple(pair) for pair in row["history"]]
            answer = model.chat(
                tokenizer, tiles, row["question"], settings, history, num_patches_list=row["num_patches_list"]
            )
            assert answer == row["response"], row


def test_rows_of_documents_without_a_mask_are_refused(goldens):
    """This version of transformers would treat the row as one document."""
    case = ModelCase(goldens / "models" / "qwen2")
    with pytest.raises(ValueError, match="attention_mask"):
        case.model()(**case.packed_batch)
