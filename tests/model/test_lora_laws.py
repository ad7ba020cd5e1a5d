"""What must hold of adapters whatever the numbers: start, gradients, frozen weights, checkpointing, round trip."""

import copy
import itertools
import shutil

import pytest
import torch
from helpers.model_cases import Case
from safetensors.torch import load_file, save_file

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import unwrap_peft

PARTS = {"vision": ("vision_model",), "llm": ("language_model",), "both": ("vision_model", "language_model")}


def wrap(model: InternVLChatModel, parts: str, r: int = 4, dropout: float = 0.0) -> InternVLChatModel:
    if "vision_model" in PARTS[parts]:
        model.wrap_backbone_lora(r=r, lora_alpha=2 * r, lora_dropout=dropout)
        model.config.use_backbone_lora = r
    if "language_model" in PARTS[parts]:
        model.wrap_llm_lora(r=r, lora_alpha=2 * r, lora_dropout=dropout)
        model.config.use_llm_lora = r
    return model


def adapters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def disturb(model):
    """Gives every adapter an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.normal_(std=0.05, generator=generator)
    return model


@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_fresh_adapters_change_nothing(model_case, parts):
    before = model_case.model()(**model_case.batch)
    after = wrap(model_case.model(), parts)(**model_case.batch)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)


@pytest.mark.parametrize("parts", PARTS)
def test_every_adapter_gets_a_gradient(goldens, parts):
    """Whatever is frozen, whatever is checkpointed, and in whatever order the two were asked for."""
    case = Case(goldens / "models" / "qwen2")
    original, towers = case.model(), ("vision_model", "language_model", "mlp1")
    for frozen in itertools.chain.from_iterable(itertools.combinations(towers, n) for n in range(4)):
        for checkpointed, late in ((False, False), (True, False), (True, True))[: 3 if len(frozen) == 3 else 2]:
            model = copy.deepcopy(original)
            for tower in frozen:
                getattr(model, tower).requires_grad_(False)
            if checkpointed and not late:
                model.gradient_checkpointing_enable()
            disturb(wrap(model, parts)).train()
            if checkpointed and late:
                model.gradient_checkpointing_enable()
            model(**case.batch).loss.backward()
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert adapters(model).keys() <= trained.keys()
            silent = [
                n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
            ]
            # A bias of all keys moves every score of a query alike: softmax does not see it.
            assert [n for n in silent if "k_proj.bias" not in n] == [], (frozen, checkpointed, late)


def test_checkpointing_changes_no_number(model_case):
    results = []
    for checkpointed in (False, True):
        model = disturb(wrap(model_case.model(), "both")).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.vision_model.encoder.gradient_checkpointing
        loss = model(**model_case.batch).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (loss_checkpointed, grads_checkpointed) = results
    assert torch.equal(loss, loss_checkpointed) and grads.keys() == grads_checkpointed.keys()
    assert all(torch.equal(grads[n], grads_checkpointed[n]) for n in grads)


def test_frozen_weights_stay_bit_equal(goldens):
    case = Case(goldens / "models" / "internlm2")
    model = wrap(case.model(), "both", dropout=0.1).train()
    model.mlp1.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**case.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(adapters(model))


@pytest.mark.parametrize("parts", PARTS)
def test_save_and_reload(model_case, parts, tmp_path):
    """As training saves it: the whole model under wrapped names, the ranks in its config."""
    model = disturb(wrap(model_case.model(), parts))
    model.save_pretrained(tmp_path)
    reloaded = InternVLChatModel.from_pretrained(tmp_path)
    state, again = model.state_dict(), reloaded.state_dict()
    assert list(state) == list(again) and all(torch.equal(state[n], again[n]) for n in state)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in reloaded.named_parameters() if not p.requires_grad}
    reloaded.img_context_token_id = model.img_context_token_id
    with torch.no_grad():
        assert torch.equal(reloaded(**model_case.batch).logits, model(**model_case.batch).logits)


def test_adapters_alone_in_peft_format(model_case, tmp_path):
    from peft import PeftModel

    model = disturb(wrap(model_case.model(), "both"))
    model.base_checkpoint = describe_base_checkpoint(model_case.folder)
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))
    other = model_case.model()
    for part in PARTS["both"]:
        setattr(other, part, PeftModel.from_pretrained(getattr(other, part), tmp_path / part))
    merged = merge_adapters(model)
    with torch.no_grad():
        logits = other(**model_case.batch).logits
        torch.testing.assert_close(merged(**model_case.batch).logits, logits, atol=5e-5, rtol=1e-4)
    assert list(merged.state_dict()) == list(model_case.model().state_dict())


def test_a_part_is_wrapped_once(goldens):
    model = wrap(Case(goldens / "models" / "qwen2").model(), "both", r=2)
    for again in (model.wrap_backbone_lora, model.wrap_llm_lora):
        with pytest.raises(ValueError, match="already has LoRA adapters of rank 2"):
            again()


def test_default_settings(goldens):
    model = Case(goldens / "models" / "qwen2").model()
    model.wrap_backbone_lora()
    config = model.vision_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)


def test_an_unknown_language_model_is_adapted_in_all_linear_layers_but_its_head():
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
def test_checkpoints_of_older_peft_open_and_are_saved_under_todays_names(goldens, tmp_path, name):
    """Before PEFT 0.6, which upstream began with, the weight of an adapted layer kept its name."""
    model = InternVLChatModel.from_pretrained(goldens / "models" / name)
    wrap(model, "both", 2)
    model.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new/model.safetensors")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    older = {key.replace(".base_layer", ""): tensor for key, tensor in tensors.items()}
    save_file(older, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    assert len(older.keys() - tensors.keys()) > 20
    opened = InternVLChatModel.from_pretrained(tmp_path / "old")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in opened.state_dict().items())
    opened.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == tensors.keys()
