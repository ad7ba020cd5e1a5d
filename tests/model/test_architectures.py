"""Properties of every LLM architecture, for LLMs that the goldens lack.

Their LoRA targets come from `LLM_TARGETS` or are inferred. Training of mixtures of experts is in
`tests/train/test_experts.py`.
"""

import pytest
import torch
from helpers.lora_models import get_adapters
from helpers.tiny_models import ARCHITECTURES, RANDOM_IDS, build_tiny_model
from transformers import DynamicCache

from internvl.model.internlm2 import modeling_internlm2 as internlm2
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.decoder import CACHE_NAME
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import is_peft_model, unwrap_peft
from internvl.model.phi3 import modeling_phi3 as phi3


@pytest.fixture(params=[*ARCHITECTURES, "InternLM2ForCausalLM", "Phi3ForCausalLM"])
def model(request) -> InternVLChatModel:
    return build_tiny_model(request.param).eval()


def compute_logits(model: InternVLChatModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=RANDOM_IDS).logits


def test_logits_and_loss_equal_those_of_the_llm(model):
    with torch.no_grad():
        llm_logits = model.language_model(input_ids=RANDOM_IDS, use_cache=False).logits
    torch.testing.assert_close(compute_logits(model), llm_logits, atol=1e-6, rtol=1e-6)
    model.train()
    loss = model(input_ids=RANDOM_IDS, labels=RANDOM_IDS).loss
    expected = torch.nn.functional.cross_entropy(llm_logits[:, :-1].flatten(0, 1), RANDOM_IDS[:, 1:].flatten())
    if not any("dropout" in type(m).__name__.lower() and m.p for m in model.language_model.modules()):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_have_no_effect_at_first_then_train_save_and_merge(model, tmp_path):
    before = compute_logits(model)
    model.wrap_backbone_lora(r=2, lora_alpha=4)
    model.wrap_llm_lora(r=2, lora_alpha=4, lora_dropout=0.0)
    assert torch.equal(compute_logits(model), before)
    head = unwrap_peft(model.language_model).get_output_embeddings()
    routers = ("router", "mlp.gate.", "block_sparse_moe.gate.")
    assert not any("lora" in name for name, _ in head.named_parameters())
    adapters = get_adapters(model.language_model)
    assert adapters and not any(router in name for name in adapters for router in routers)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)

    model.train()
    model(input_ids=RANDOM_IDS, labels=RANDOM_IDS).loss.backward()
    # A gradient may be 0: that of an expert to which no token is routed.
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad is None for name, p in model.language_model.named_parameters() if "lora_" not in name)

    model.eval().save_pretrained(tmp_path)
    reloaded = InternVLChatModel.from_pretrained(tmp_path).eval()
    assert {n for n, p in reloaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    changed = compute_logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(compute_logits(reloaded), changed, atol=1e-6, rtol=1e-6)
    merged = merge_adapters(reloaded)
    assert not is_peft_model(merged.language_model)
    torch.testing.assert_close(compute_logits(merged), changed, atol=1e-4, rtol=1e-4)


def test_documents_of_a_row_do_not_affect_each_other(model):
    row, positions = RANDOM_IDS.view(1, -1), torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        before = model(input_ids=row, position_ids=positions).logits
        changed = torch.cat([row[:, :12] + 1, row[:, 12:]], dim=1)
        after = model(input_ids=changed, position_ids=positions).logits
    assert not torch.allclose(after[:, :12], before[:, :12], atol=1e-3)
    torch.testing.assert_close(after[:, 12:], before[:, 12:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before.view(2, 12, -1), compute_logits(model), atol=1e-5, rtol=1e-5)


def test_experts_have_adapters():
    for architecture in ("Qwen3MoeForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM"):
        model = build_tiny_model(architecture)
        model.wrap_llm_lora(r=2)
        (config,) = model.language_model.peft_config.values()
        assert {name.split(".")[-1] for name in config.target_parameters} == {"gate_up_proj", "down_proj"}


def test_upstreams_public_names_exist():
    for classes in (internlm2.INTERNLM2_ATTENTION_CLASSES, phi3.PHI3_ATTENTION_CLASSES):
        assert {"eager", "flash_attention_2"} <= classes.keys()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = internlm2.InternLM2Config(**small, vocab_size=1009, num_labels=3, pad_token_id=2)
    classifier = internlm2.InternLM2ForSequenceClassification(config)
    assert classifier(input_ids=RANDOM_IDS).logits.shape == (2, 3)


def test_generation_is_the_same_with_and_without_a_cache(model):
    llm, settings = model.language_model, {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    llm.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = RANDOM_IDS
        for _ in range(settings["max_new_tokens"]):
            next_ids = llm(input_ids=expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, next_ids], dim=1)
    for use_cache in (False, True):
        assert torch.equal(llm.generate(RANDOM_IDS, use_cache=use_cache, **settings), expected)
    assert torch.equal(model.generate(input_ids=RANDOM_IDS, **settings), expected[:, RANDOM_IDS.shape[1] :])


def test_the_chat_model_continues_from_past_key_values(model):
    whole = compute_logits(model)
    with torch.no_grad():
        start = model(input_ids=RANDOM_IDS[:, :4], use_cache=True)
        rest = model(input_ids=RANDOM_IDS[:, 4:], past_key_values=start[CACHE_NAME], use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_internlm2_attention_knows_both_names_of_the_cache(name):
    model = build_tiny_model("InternLM2ForCausalLM").language_model.eval()
    attention = model.model.layers[0].attention
    states = torch.randn(2, 5, model.config.hidden_size)
    positions = model.model.rotary_emb(states, torch.arange(5)[None])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        attention(states[:, :4], tuple(p[:, :4] for p in positions), **{name: cache})
        attention(states[:, 4:], tuple(p[:, 4:] for p in positions), **{name: cache})
    assert cache.get_seq_length() == 5


def test_internlm2_attention_refuses_unknown_arguments():
    model = build_tiny_model("InternLM2ForCausalLM").language_model
    with pytest.raises(TypeError, match="does not support the arguments kv_store"):
        model(input_ids=RANDOM_IDS, kv_store=object())
