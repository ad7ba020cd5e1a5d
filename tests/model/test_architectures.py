"""Language models beyond those of the goldens: the same laws hold of every family, by table row or by rule.

Tiny, random, in one chat model each. Training of the mixtures of experts is in `tests/train/test_experts.py`.
"""

import pytest
import torch
from helpers.tiny_models import EXPERTS, LLM, VITS

from internvl.model.internlm2 import modeling_internlm2 as internlm2
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import is_peft_model, unwrap_peft
from internvl.model.phi3 import modeling_phi3 as phi3

MIXTURE = {**EXPERTS, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24}
# architecture -> what its configuration has beyond LLM
FAMILIES = {
    # those of InternVL 3.5 and their table rows
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Qwen3MoeForCausalLM": MIXTURE,
    "GptOssForCausalLM": {**MIXTURE, "sliding_window": 8},
    # dense ones, found by the rule
    "CohereForCausalLM": {"logit_scale": 0.5},
    "GPT2LMHeadModel": {"n_head": 4, "n_layer": 2, "n_embd": 32, "n_positions": 512},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "MistralForCausalLM": {"head_dim": 8},
    "Olmo2ForCausalLM": {},
    "PhiForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    # mixtures of experts, found by the rule
    "GraniteMoeForCausalLM": {**MIXTURE, "logits_scaling": 4.0},
    "MixtralForCausalLM": MIXTURE,
    "Qwen2MoeForCausalLM": {**MIXTURE, "shared_expert_intermediate_size": 24},
}
IDS = torch.randint(3, 1000, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def model(request) -> InternVLChatModel:
    llm = LLM | FAMILIES[request.param] | {"architectures": [request.param]}
    torch.manual_seed(0)
    model = InternVLChatModel(InternVLChatConfig(VITS["300M"], llm, template="internvl2_5", force_image_size=56))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


def logits(model: InternVLChatModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapters(model: InternVLChatModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name}


def test_logits_are_the_language_models_own(model):
    with torch.no_grad():
        own = model.language_model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits(model), own, atol=1e-6, rtol=1e-6)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    expected = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    if not any("dropout" in type(m).__name__.lower() and m.p for m in model.language_model.modules()):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_start_at_nothing_learn_survive_and_merge(model, tmp_path):
    before = logits(model)
    model.wrap_backbone_lora(r=2, lora_alpha=4)
    model.wrap_llm_lora(r=2, lora_alpha=4, lora_dropout=0.0)
    model.config.use_backbone_lora = model.config.use_llm_lora = 2
    assert torch.equal(logits(model), before)
    head, routers = (
        unwrap_peft(model.language_model).get_output_embeddings(),
        ("router", "mlp.gate.", "block_sparse_moe.gate."),
    )
    assert not any("lora" in name for name, _ in head.named_parameters())
    assert adapters(model) and not any(router in name for name in adapters(model) for router in routers)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.normal_(std=0.1)

    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    # A bias of all keys, and an expert that no token chose, move nothing.
    assert [name for name, p in adapters(model).items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad is None for name, p in model.language_model.named_parameters() if "lora_" not in name)

    model.eval().save_pretrained(tmp_path)
    again = InternVLChatModel.from_pretrained(tmp_path).eval()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits(again), changed, atol=1e-6, rtol=1e-6)
    merged = merge_adapters(again)
    assert not is_peft_model(merged.language_model)
    torch.testing.assert_close(logits(merged), changed, atol=1e-4, rtol=1e-4)


def test_documents_of_a_row_do_not_feel_each_other(model):
    row, positions = IDS.view(1, -1), torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        before = model(input_ids=row, position_ids=positions).logits
        changed = torch.cat([row[:, :12] + 1, row[:, 12:]], dim=1)
        after = model(input_ids=changed, position_ids=positions).logits
    assert not torch.allclose(after[:, :12], before[:, :12], atol=1e-3)
    torch.testing.assert_close(after[:, 12:], before[:, 12:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before.view(2, 12, -1), logits(model), atol=1e-5, rtol=1e-5)


def test_experts_have_adapters():
    """The experts are where a mixture has its weights."""
    for architecture in ("Qwen3MoeForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM"):
        llm = LLM | MIXTURE | {"architectures": [architecture]}
        model = InternVLChatModel(InternVLChatConfig(VITS["300M"], llm, template="internvl2_5"))
        model.wrap_llm_lora(r=2)
        (config,) = model.language_model.peft_config.values()
        assert {name.split(".")[-1] for name in config.target_parameters} == {"gate_up_proj", "down_proj"}


def test_upstreams_names_of_attention():
    for classes in (internlm2.INTERNLM2_ATTENTION_CLASSES, phi3.PHI3_ATTENTION_CLASSES):
        assert {"eager", "flash_attention_2"} <= classes.keys()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = internlm2.InternLM2Config(**small, vocab_size=1009, num_labels=3, pad_token_id=2)
    classifier = internlm2.InternLM2ForSequenceClassification(config)
    assert classifier(input_ids=IDS).logits.shape == (2, 3)
