"""What loaders of engines that do not run here expect, read in their published packages; our results satisfy it.

Of SGLang `srt/models/internvl.py` and `srt/configs/internvl.py`, of lmdeploy `pytorch/models/internvl.py`,
`pytorch/models/internvl3_hf.py`, `turbomind/models/internvl.py` and `vl/model/internvl.py`.
"""

import json
import re
from typing import NamedTuple

import pytest
from helpers.lora_models import add_lora, randomize_adapters
from helpers.tiny_models import make_tiny_checkpoint
from safetensors import safe_open

from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.merge_lora import main as merge

CHAT_FIELDS = "force_image_size downsample_ratio ps_version select_layer template dynamic_image_size use_thumbnail"
CHAT_FIELDS += " min_dynamic_patch max_dynamic_patch llm_config vision_config"
VISION_FIELDS = "hidden_size num_attention_heads num_hidden_layers intermediate_size num_channels image_size patch_size"
VISION_FIELDS += " layer_norm_eps norm_type qk_normalization qkv_bias initializer_factor hidden_act"
CHAT_WEIGHTS = r"""vision_model\.embeddings\.(class_embedding|position_embedding|patch_embedding\.(weight|bias))
vision_model\.encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|norm[12])\.(weight|bias)
vision_model\.encoder\.layers\.\d+\.(attn\.[qk]_norm\.weight|ls[12])
mlp1\.[013]\.(weight|bias)
language_model\.model\.(embed_tokens|tok_embeddings|norm)\.weight
language_model\.model\.layers\.\d+\.(self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj)\.(weight|bias)
language_model\.model\.layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.w[123])\.weight
language_model\.model\.layers\.\d+\.((input|post_attention)_layernorm|attention_norm|ffn_norm)\.weight
language_model\.(lm_head|output)\.weight"""
HF_WEIGHTS = r"""model\.vision_tower\.embeddings\.(cls_token|position_embeddings)
model\.vision_tower\.embeddings\.patch_embeddings\.projection\.(weight|bias)
model\.vision_tower\.encoder\.layer\.\d+\.(attention\.([qkv]_proj|projection_layer)|mlp\.fc[12])\.(weight|bias)
model\.vision_tower\.encoder\.layer\.\d+\.(layernorm_(before|after)\.(weight|bias)|lambda_[12])
model\.vision_tower\.encoder\.layer\.\d+\.attention\.[qk]_norm\.weight
model\.multi_modal_projector\.(layer_norm|linear_[12])\.(weight|bias)
model\.language_model\.(embed_tokens|norm)\.weight
model\.language_model\.layers\.\d+\.(self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj)\.(weight|bias)
model\.language_model\.layers\.\d+\.(input|post_attention)_layernorm\.weight
lm_head\.weight"""


class Expectation(NamedTuple):
    """What an engine reads.

    Args:
        fields: names in config.json, read as attributes or keys: a missing one is an error.
        vision_fields: names in its `vision_config`.
        weights: patterns of all names that the loader has parameters for; it fails at others.
        llms: values of `llm_config.architectures` that it has classes for; None for those of its own registry.
    """

    architecture: str
    fields: str
    vision_fields: str
    weights: str
    llms: tuple[str, ...] | None = None


SGLANG_LLMS = ("Qwen2", "InternLM2", "Qwen3Moe", "GptOss", "Qwen3")
EXPECTATIONS = {
    "SGLang 0.5.23": Expectation(
        "InternVLChatModel",
        CHAT_FIELDS,
        VISION_FIELDS,
        CHAT_WEIGHTS,
        tuple(f"{name}ForCausalLM" for name in SGLANG_LLMS),
    ),
    "lmdeploy 0.18.0": Expectation("InternVLChatModel", CHAT_FIELDS, VISION_FIELDS, CHAT_WEIGHTS),
    # The PyTorch engine only: TurboMind looks for `language_model.model.`, which transformers wrote before 4.52.
    "lmdeploy 0.18.0, HF layout": Expectation(
        "InternVLForConditionalGeneration",
        "downsample_ratio image_seq_length text_config vision_config",
        "hidden_size num_attention_heads num_hidden_layers intermediate_size num_channels image_size patch_size "
        "layer_norm_eps norm_type use_qk_norm attention_bias",
        HF_WEIGHTS,
    ),
}


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "internlm2"])
def results(request, goldens, tmp_path_factory):
    """A merged result in both layouts: architecture -> folder."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), goldens / "tokenizer"
    model = make_tiny_checkpoint(folder / "base", tokenizer, llm=request.param)
    randomize_adapters(add_lora(model, "both")).save_pretrained(folder / "run")
    load_tokenizer(tokenizer).save_pretrained(folder / "run")
    merge([str(folder / "run"), str(folder / "merged"), "--dtype", "float32", "--with_remote_code"])
    custom2hf(["--custom_path", str(folder / "merged"), "--save_path", str(folder / "native")])
    return {"InternVLChatModel": folder / "merged", "InternVLForConditionalGeneration": folder / "native"}


@pytest.mark.parametrize("engine", EXPECTATIONS)
def test_results_satisfy_the_loader(engine, results):
    expected = EXPECTATIONS[engine]
    folder = results[expected.architecture]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [expected.architecture]
    assert set(expected.fields.split()) <= config.keys()
    assert set(expected.vision_fields.split()) <= config["vision_config"].keys()
    if expected.architecture == "InternVLChatModel":
        [llm] = config["llm_config"]["architectures"]
        assert expected.llms is None or llm in expected.llms
        # lmdeploy: `assert select_layer == -1`, and TurboMind requires this order of pixels.
        assert (config["select_layer"], config["ps_version"]) == (-1, "v2")
        assert config["auto_map"]["AutoConfig"] == "configuration_internvl_chat.InternVLChatConfig"
    patterns = [re.compile(line) for line in expected.weights.splitlines()]
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert [name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)] == []
    # SGLang takes every head as untied.
    assert any(re.search(r"(lm_head|output)\.weight$", name) for name in names)
