"""Attention document by document equals attention under a mask, in every family; what cannot do it is refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import LLM, VITS
from model.test_architectures import FAMILIES, IDS

from internvl.model import varlen_attention as varlen
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.documents import document_bounds
from internvl.model.varlen_attention import use_varlen_attention, varlen_attention

# 5 + 7 tokens, and 12; windows of 8 slide over the last.
POSITIONS = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])


def model_of(architecture: str, **more) -> InternVLChatModel:
    llm = LLM | FAMILIES.get(architecture, {}) | {"architectures": [architecture]} | more
    torch.manual_seed(0)
    model = InternVLChatModel(InternVLChatConfig(VITS["300M"], llm, template="internvl2_5", force_image_size=56))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize("architecture", [*FAMILIES, "InternLM2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM"])
def test_by_document_equals_by_mask(architecture):
    model = model_of(architecture)
    llm, mask = model.language_model, torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)

    def outcome(**kwargs) -> tuple:
        with torch.no_grad():
            logits = model(input_ids=IDS, position_ids=POSITIONS, **kwargs).logits
            chat = llm.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return logits, chat

    expected = outcome()
    use_varlen_attention(llm, packed=True)
    assert llm.config._attn_implementation == varlen.NAME
    for kwargs in ({}, {"cu_seqlens": [0, 5, 12, 24]}):
        found = outcome(**kwargs)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(found[1], expected[1]), "generating, with padding on the left"


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "GptOssForCausalLM", "InternLM2ForCausalLM"])
def test_no_document_feels_another_in_training(architecture):
    """Also with activations computed again in the backward pass."""
    model = model_of(architecture)
    use_varlen_attention(model.language_model, packed=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    row, positions = IDS.view(1, -1), torch.cat([torch.arange(9), torch.arange(15)])[None]
    labels = row.masked_fill(torch.arange(24) < 9, -100)
    found = []
    for ids in (row, torch.cat([row[:, :9] + 1, row[:, 9:]], dim=1)):
        model.zero_grad()
        loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        weight = model.language_model.get_input_embeddings().weight
        assert not weight.grad[list(set(ids[0, :9].tolist()) - set(row[0, 9:].tolist()))].any()
        found.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_no_mask_is_made(monkeypatch):
    """Of a row of L tokens nothing of L x L numbers exists: each kernel sees one document."""
    model, seen = model_of("Qwen3ForCausalLM"), []
    use_varlen_attention(model.language_model, packed=True)
    kernel = F.scaled_dot_product_attention

    def watched(query, key, value, mask, *args, **kwargs):
        seen.append((query.shape[2], mask))
        return kernel(query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        model(input_ids=IDS, position_ids=POSITIONS)
    assert [length for length, _ in seen] == [5, 7, 12] * 2 and all(mask is None for _, mask in seen)


@pytest.mark.parametrize("sinks", [False, True])
def test_windows_in_blocks_equal_one_mask(sinks, monkeypatch):
    monkeypatch.setattr(varlen, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 70, 8, generator=generator) for heads in (4, 2, 2))
    more = {"s_aux": torch.randn(4, generator=generator)} if sinks else {"softcap": 5.0}
    found, _ = varlen_attention(
        torch.nn.Identity(), query, key, value, None, sliding_window=9, cu_seq_lens_q=torch.tensor([0, 70]), **more
    )
    distance = torch.arange(70)[:, None] - torch.arange(70)
    score = {"scaling": None, "dropout": 0.0, "softcap": more.get("softcap"), "sinks": more.get("s_aux")}
    expected = varlen._attend(query, key, value, (distance >= 0) & (distance < 9), **score)
    torch.testing.assert_close(found.transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("BloomForCausalLM", {"n_head": 4}),
        ("FalconForCausalLM", {"new_decoder_architecture": False}),
        ("MambaForCausalLM", {"state_size": 4}),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused(architecture, more):
    model = model_of(architecture, **more)
    before = model.language_model.config._attn_implementation
    use_varlen_attention(model.language_model, packed=False)
    assert model.language_model.config._attn_implementation == before
    with pytest.raises(ValueError, match="--use_packed_ds True: in language models of type .* see each other"):
        use_varlen_attention(model.language_model, packed=True)


def test_bounds_of_documents():
    assert document_bounds(POSITIONS) == [0, 5, 12, 24]
    assert document_bounds(torch.tensor([[3, 4, 0, 1]])) == [0, 2, 4], "a row may begin in the middle of a sample"
