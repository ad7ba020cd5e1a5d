"""Properties of adapters: start, gradients, frozen weights, gradient checkpointing, saving."""

import copy
import itertools
import shutil

import pytest
import torch
from helpers.lora_models import ADAPTED_PARTS, add_lora, get_adapters, randomize_adapters
from helpers.model_cases import ModelCase
from safetensors.torch import load_file, save_file

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import unwrap_peft


@pytest.mark.parametrize("parts", ADAPTED_PARTS)
@torch.no_grad()
def test_new_adapters_have_no_effect(model_case, parts):
    before = model_case.model()(**model_case.batch)
    after = add_lora(model_case.model(), parts)(**model_case.batch)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)


@pytest.mark.parametrize("parts", ADAPTED_PARTS)
def test_every_adapter_gets_a_gradient(goldens, parts):
    """Try all combinations of frozen parts.

    Gradient checkpointing is off, or enabled before or after the adapters are attached.
    """
    case = ModelCase(goldens / "models" / "qwen2")
    original, parts_to_freeze = case.model(), ("vision_model", "language_model", "mlp1")
    for frozen in itertools.chain.from_iterable(itertools.combinations(parts_to_freeze, n) for n in range(4)):
        for is_checkpointed, is_late in ((False, False), (True, False), (True, True))[: 3 if len(frozen) == 3 else 2]:
            model = copy.deepcopy(original)
            for part in frozen:
                getattr(model, part).requires_grad_(False)
            if is_checkpointed and not is_late:
                model.gradient_checkpointing_enable()
            randomize_adapters(add_lora(model, parts)).train()
            if is_checkpointed and is_late:
                model.gradient_checkpointing_enable()
            model(**case.batch).loss.backward()
            trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert get_adapters(model).keys() <= trainable.keys()
            without_gradient = [
                n for n, p in trainable.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
            ]
            # The bias of keys adds the same number to all scores of a query: softmax ignores it.
            assert [n for n in without_gradient if "k_proj.bias" not in n] == [], (frozen, is_checkpointed, is_late)


def test_gradient_checkpointing_changes_no_result(model_case):
    results = []
    for is_checkpointed in (False, True):
        model = randomize_adapters(add_lora(model_case.model(), "both")).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
            assert model.vision_model.encoder.gradient_checkpointing
        loss = model(**model_case.batch).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (checkpointed_loss, checkpointed_grads) = results
    assert torch.equal(loss, checkpointed_loss) and grads.keys() == checkpointed_grads.keys()
    assert all(torch.equal(grads[n], checkpointed_grads[n]) for n in grads)


def test_frozen_weights_stay_bit_equal(goldens):
    case = ModelCase(goldens / "models" / "internlm2")
    model = add_lora(case.model(), "both", dropout=0.1).train()
    model.mlp1.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**case.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(get_adapters(model))


@pytest.mark.parametrize("parts", ADAPTED_PARTS)
def test_save_and_reload(model_case, parts, tmp_path):
    """Save the full model, with adapters under PEFT's names."""
    model = randomize_adapters(add_lora(model_case.model(), parts))
    model.save_pretrained(tmp_path)
    reloaded = InternVLChatModel.from_pretrained(tmp_path)
    state, reloaded_state = model.state_dict(), reloaded.state_dict()
    assert list(state) == list(reloaded_state)
    assert all(torch.equal(state[n], reloaded_state[n]) for n in state)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in reloaded.named_parameters() if not p.requires_grad}
    reloaded.img_context_token_id = model.img_context_token_id
    with torch.no_grad():
        assert torch.equal(reloaded(**model_case.batch).logits, model(**model_case.batch).logits)


def test_peft_loads_the_adapters_of_an_adapter_checkpoint(model_case, tmp_path):
    from peft import PeftModel

    model = randomize_adapters(add_lora(model_case.model(), "both"))
    model.base_checkpoint = describe_base_checkpoint(model_case.folder)
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))
    other = model_case.model()
    for part in ADAPTED_PARTS["both"]:
        setattr(other, part, PeftModel.from_pretrained(getattr(other, part), tmp_path / part))
    merged = merge_adapters(model)
    with torch.no_grad():
        logits = other(**model_case.batch).logits
        torch.testing.assert_close(merged(**model_case.batch).logits, logits, atol=5e-5, rtol=1e-4)
    assert list(merged.state_dict()) == list(model_case.model().state_dict())


def test_adding_adapters_twice_is_refused(goldens):
    model = add_lora(ModelCase(goldens / "models" / "qwen2").model(), "both", r=2)
    for wrap_method in (model.wrap_backbone_lora, model.wrap_llm_lora):
        with pytest.raises(ValueError, match="already has LoRA adapters of rank 2"):
            wrap_method()


def test_default_settings(goldens):
    model = ModelCase(goldens / "models" / "qwen2").model()
    model.wrap_backbone_lora()
    config = model.vision_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)


def test_other_llms_get_adapters_in_all_linear_layers_except_the_head():
    from transformers import MistralConfig

    from internvl.model.internvl_chat import InternVLChatConfig

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llm = MistralConfig(**small, num_key_value_heads=1, vocab_size=32, architectures=["MistralForCausalLM"])
    model = InternVLChatModel(InternVLChatConfig({**small, "patch_size": 14}, llm, template="internvl2_5"))
    model.wrap_llm_lora(r=2)
    adapted = {n.split(".")[-4] for n, p in model.language_model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("lora" in n for n, _ in unwrap_peft(model.language_model).lm_head.named_parameters())


@pytest.mark.parametrize("name", ["qwen2", "internlm2", "phi3", "llama"])
def test_checkpoints_of_peft_before_0_6_load_and_are_saved_under_current_names(goldens, tmp_path, name):
    """PEFT < 0.6, upstream's first version, did not rename adapted weights."""
    model = InternVLChatModel.from_pretrained(goldens / "models" / name)
    add_lora(model, "both", 2)
    model.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new/model.safetensors")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    legacy = {key.replace(".base_layer", ""): tensor for key, tensor in tensors.items()}
    save_file(legacy, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    assert len(legacy.keys() - tensors.keys()) > 20
    reloaded = InternVLChatModel.from_pretrained(tmp_path / "old")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in reloaded.state_dict().items())
    reloaded.save_pretrained(tmp_path / "resaved")
    assert load_file(tmp_path / "resaved/model.safetensors").keys() == tensors.keys()
