"""Varlen attention equals attention with a mask.

Packing is refused for LLMs that do not support it.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import ARCHITECTURES, RANDOM_IDS, build_tiny_model

from internvl.model import varlen_attention as varlen
from internvl.model.internvl_chat.documents import compute_cu_seqlens
from internvl.model.varlen_attention import compute_varlen_attention, use_varlen_attention

# Two rows: documents of 5 + 7 tokens, and of 12, which is longer than the sliding windows of 8.
POSITION_IDS = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])


@pytest.mark.parametrize(
    "architecture", [*ARCHITECTURES, "InternLM2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM"]
)
def test_logits_and_generation_equal_attention_with_a_mask(architecture):
    model = build_tiny_model(architecture).eval()
    llm, mask = model.language_model, torch.ones_like(RANDOM_IDS).index_fill(1, torch.tensor([0, 1]), 0)

    def compute_outputs(**kwargs) -> tuple:
        with torch.no_grad():
            logits = model(input_ids=RANDOM_IDS, position_ids=POSITION_IDS, **kwargs).logits
            generated = llm.generate(input_ids=RANDOM_IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return logits, generated

    expected = compute_outputs()
    use_varlen_attention(llm, packed=True)
    assert llm.config._attn_implementation == varlen.VARLEN_ATTENTION
    for kwargs in ({}, {"cu_seqlens": [0, 5, 12, 24]}):
        actual = compute_outputs(**kwargs)
        torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(actual[1], expected[1]), "generation with padding on the left"


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "GptOssForCausalLM", "InternLM2ForCausalLM"])
def test_documents_do_not_affect_each_other_in_training(architecture):
    """Gradient checkpointing is enabled."""
    model = build_tiny_model(architecture)
    use_varlen_attention(model.language_model, packed=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    row, positions = RANDOM_IDS.view(1, -1), torch.cat([torch.arange(9), torch.arange(15)])[None]
    labels = row.masked_fill(torch.arange(24) < 9, -100)
    results = []
    for ids in (row, torch.cat([row[:, :9] + 1, row[:, 9:]], dim=1)):
        model.zero_grad()
        loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        weight = model.language_model.get_input_embeddings().weight
        assert not weight.grad[list(set(ids[0, :9].tolist()) - set(row[0, 9:].tolist()))].any()
        results.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_each_document_is_computed_without_a_mask(monkeypatch):
    """Nothing of size L x L exists for L tokens."""
    model, calls = build_tiny_model("Qwen3ForCausalLM").eval(), []
    use_varlen_attention(model.language_model, packed=True)
    kernel = F.scaled_dot_product_attention

    def record_call(query, key, value, mask, *args, **kwargs):
        calls.append((query.shape[2], mask))
        return kernel(query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", record_call)
    with torch.no_grad():
        model(input_ids=RANDOM_IDS, position_ids=POSITION_IDS)
    assert [length for length, _ in calls] == [5, 7, 12] * 2 and all(mask is None for _, mask in calls)


@pytest.mark.parametrize("sinks", [False, True])
def test_sliding_window_in_blocks_equals_one_mask(sinks, monkeypatch):
    monkeypatch.setattr(varlen, "QUERY_BLOCK_SIZE", 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 70, 8, generator=generator) for heads in (4, 2, 2))
    options = {"s_aux": torch.randn(4, generator=generator)} if sinks else {"softcap": 5.0}
    output, _ = compute_varlen_attention(
        torch.nn.Identity(), query, key, value, None, sliding_window=9, cu_seq_lens_q=torch.tensor([0, 70]), **options
    )
    distance = torch.arange(70)[:, None] - torch.arange(70)
    score_options = {"scaling": None, "dropout": 0.0, "softcap": options.get("softcap"), "sinks": options.get("s_aux")}
    expected = varlen._compute_attention(query, key, value, (distance >= 0) & (distance < 9), **score_options)
    torch.testing.assert_close(output.transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("architecture", "llm_fields"),
    [
        ("BloomForCausalLM", {"n_head": 4}),
        ("FalconForCausalLM", {"new_decoder_architecture": False}),
        ("MambaForCausalLM", {"state_size": 4}),
    ],
)
def test_packing_is_refused_for_llms_without_varlen_attention(architecture, llm_fields):
    model = build_tiny_model(architecture, **llm_fields)
    before = model.language_model.config._attn_implementation
    use_varlen_attention(model.language_model, packed=False)
    assert model.language_model.config._attn_implementation == before
    with pytest.raises(ValueError, match="--use_packed_ds True is not supported for LLMs of type"):
        use_varlen_attention(model.language_model, packed=True)


def test_cu_seqlens_of_position_ids():
    assert compute_cu_seqlens(POSITION_IDS) == [0, 5, 12, 24]
    assert compute_cu_seqlens(torch.tensor([[3, 4, 0, 1]])) == [0, 2, 4], "a row may begin inside a document"
