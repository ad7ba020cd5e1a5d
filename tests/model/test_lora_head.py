"""LoRA in the LM head: tied and untied heads, merging, dropout."""

import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.tiny_models import RANDOM_IDS, TINY_LLM, TINY_LLMS, TINY_VITS, build_tiny_model, randomize_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_VARIANTS, LoraSettings

HEADS = {"qwen2": "lm_head", "internlm2": "output", "GPT2LMHeadModel": "lm_head"}


@pytest.fixture
def tied_model() -> InternVLChatModel:
    llm_fields = TINY_LLM | TINY_LLMS["qwen2"] | {"tie_word_embeddings": True}
    config = InternVLChatConfig(TINY_VITS["300M"], llm_fields, template="internvl2_5", tie_word_embeddings=True)
    torch.manual_seed(0)
    model = InternVLChatModel(config).eval()
    randomize_weights(model.language_model, 0.2)
    llm = model.language_model
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_adapters_of_a_tied_head_are_refused(tied_model, variant):
    with pytest.raises(ValueError, match="LoRA target 'lm_head' is not supported: this LLM ties"):
        tied_model.add_part_adapters("language_model", LoraSettings(4, 8, targets=["lm_head"], variant=variant))


def test_merging_refuses_a_weight_that_another_layer_uses(tied_model):
    """Adapters of a tied head could still come from elsewhere, such as PEFT itself."""
    llm = get_peft_model(tied_model.language_model, LoraConfig(target_modules=["lm_head"]))
    tied_model.language_model = randomize_adapters(llm)
    with pytest.raises(ValueError, match="shares its weight with .*embed_tokens"):
        merge_adapters(tied_model)


def test_merging_refuses_a_layer_whose_output_changes(monkeypatch):
    model = build_tiny_model("qwen2")
    model.wrap_llm_lora(r=2, lora_alpha=4)
    randomize_adapters(model)
    merge = Linear.merge

    def merge_wrongly(layer, *args, **kwargs):
        merge(layer, *args, **kwargs)
        layer.get_base_layer().weight.data[0] += 0.1

    monkeypatch.setattr(Linear, "merge", merge_wrongly)
    with pytest.raises(ValueError, match="Merging failed: a merged layer .* in float32"):
        merge_adapters(model)


@pytest.mark.parametrize("llm", HEADS)
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.6])
def test_an_untied_head_trains_and_merges(llm, dropout):
    model = build_tiny_model(llm)
    model.add_part_adapters("language_model", LoraSettings(4, 8, dropout, targets=[HEADS[llm]]))
    model.train()(input_ids=RANDOM_IDS, labels=RANDOM_IDS).loss.backward()
    randomize_adapters(model.eval())
    with torch.no_grad():
        expected = model(input_ids=RANDOM_IDS).logits
        torch.testing.assert_close(merge_adapters(model)(input_ids=RANDOM_IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
@torch.no_grad()
def test_rows_of_single_tokens_are_adapted_and_merged(tied_model, is_tied):
    model, token_ids = (tied_model if is_tied else build_tiny_model("qwen2")), [5, 7]
    ids = RANDOM_IDS.clone()
    ids[:, 2] = 5
    embeddings = model.get_input_embeddings().weight.clone()
    before = model(input_ids=ids).logits
    model.add_part_adapters("language_model", LoraSettings(4, 8, trainable_token_ids=token_ids))
    assert torch.equal(model.eval()(input_ids=ids).logits, before)
    deltas = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert len(deltas) == 2 - is_tied and all(p.requires_grad and len(p) == 2 for p in deltas.values())
    randomize_adapters(model)
    for delta in deltas.values():
        delta.normal_()
    expected = model(input_ids=ids).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    is_kept = [index not in token_ids for index in range(len(embeddings))]
    assert torch.equal(model.get_input_embeddings().weight[is_kept], embeddings[is_kept])
    llm = model.language_model
    assert (llm.get_output_embeddings().weight is llm.get_input_embeddings().weight) == is_tied
