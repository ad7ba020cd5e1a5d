"""Configurations: published ones, the saved form, InternLM2's rotary scaling, errors."""

import json

import pytest
import torch
from helpers.paths import REAL_CONFIGS
from safetensors import safe_open

from internvl.model.internlm2.configuration_internlm2 import InternLM2Config
from internvl.model.internvl_chat import InternVisionConfig, InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.modeling_intern_vit import DropPath, InternVisionModel

BILLION_PARAMETERS = {"internvl2_8b": 8.08, "internvl2_26b": 25.5, "internvl3_1b": 0.94}


def count_vision_parameters(c) -> int:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], c["qkv_bias"]
    embeddings = hidden * (3 * c["patch_size"] ** 2 + 1) + hidden * ((c["image_size"] // c["patch_size"]) ** 2 + 1 + 1)
    norms = 2 * hidden * (2 if c["norm_type"] == "layer_norm" else 1) + (2 * hidden if c["qk_normalization"] else 0)
    attention = 3 * hidden * (hidden + bias) + hidden * (hidden + 1)
    mlp = inner * (hidden + 1) + hidden * (inner + 1)
    return embeddings + c["num_hidden_layers"] * (norms + attention + mlp + 2 * hidden)


def count_llm_parameters(c) -> int:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    head_dim = hidden // c["num_attention_heads"]
    rows = head_dim * (c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    bias = rows if c["model_type"] == "qwen2" else 0
    layer = hidden * rows + bias + hidden * hidden + 3 * hidden * inner + 2 * hidden
    return 2 * c["vocab_size"] * hidden + c["num_hidden_layers"] * layer + hidden


@pytest.mark.parametrize("path", REAL_CONFIGS, ids=lambda path: path.stem)
def test_published_configurations_build_models_of_the_published_size(path):
    fields, config = json.loads(path.read_text()), InternVLChatConfig.from_pretrained(path)
    with torch.device("meta"):
        model = InternVLChatModel(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    vision_size, llm_size = 4 * fields["vision_config"]["hidden_size"], fields["llm_config"]["hidden_size"]
    assert counts == {
        "vision_model": count_vision_parameters(fields["vision_config"]),
        "language_model": count_llm_parameters(fields["llm_config"]),
        "mlp1": 2 * vision_size + (vision_size + 1) * llm_size + (llm_size + 1) * llm_size,
    }
    assert sum(counts.values()) == pytest.approx(BILLION_PARAMETERS[path.stem] * 1e9, rel=0.01)
    if fields["vision_config"]["hidden_size"] == 1024:
        assert counts["vision_model"] == pytest.approx(304e6, rel=0.005)
    assert model.num_image_token == 256
    assert model.system_message  # `system_message: null` means that of the template


def test_published_rope_scaling_is_saved_under_the_keys_of_transformers_4(real_config):
    assert real_config.llm_config.rope_theta if hasattr(real_config.llm_config, "rope_theta") else True
    saved = real_config.to_dict()["llm_config"]
    assert saved["rope_theta"] == 1000000 and set(saved["rope_scaling"]) == {"type", "factor"}
    assert saved["rope_scaling"]["type"] == "dynamic" and saved["rope_scaling"]["factor"] in (2.0, 3.0)


def test_auto_map_is_kept_and_never_run(real_config):
    assert real_config.to_dict()["auto_map"]["AutoModel"] == "modeling_internvl_chat.InternVLChatModel"
    assert type(real_config) is InternVLChatConfig


def test_saved_form(model_case, tmp_path):
    """It has all keys of upstream's file, sorted, and can be loaded."""
    model = model_case.model()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    ours, theirs = json.loads(text), model_case.read("config.json")
    assert list(ours) == sorted(ours)
    # Upstream's file has a `_commit_hash`, always null.
    assert ours.keys() >= theirs.keys() - {"_commit_hash"}
    differing = {key for key in theirs if key in ours and ours[key] != theirs[key]}
    assert differing <= {"transformers_version", "vision_config", "llm_config"}
    for part in ("vision_config", "llm_config"):
        same = {key: ours[part][key] for key in theirs[part] if key in ours[part]}
        shape = {
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "model_type",
            "architectures",
        }
        if part == "llm_config":
            shape |= {"vocab_size", "rope_theta", "attn_implementation", "tie_word_embeddings", "num_key_value_heads"}
            shape |= {"rope_scaling"} & theirs[part].keys()
        assert {key: same[key] for key in shape} == {key: theirs[part][key] for key in shape}
    reloaded = InternVLChatConfig.from_pretrained(tmp_path)
    assert json.loads(reloaded.to_json_string()) == ours
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} == files
    with safe_open(tmp_path / "model.safetensors", framework="pt") as saved:
        assert sorted(saved.keys()) == model_case.meta["state_dict_keys"]


def test_configuration_without_arguments():
    """Upstream's raises: its default LLM has no architecture."""
    config = InternVLChatConfig()
    assert config.llm_config.architectures == ["Qwen2ForCausalLM"]
    assert config.vision_config.hidden_size == 3200
    assert config.tie_word_embeddings is False and config.llm_config.tie_word_embeddings is False
    assert config.hidden_size == config.llm_config.hidden_size
    assert InternVLChatConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_unsupported_llm_is_refused_with_similar_names():
    with pytest.raises(
        ValueError, match="Unsupported architecture: 'Qwen2LM' is not .* similar names are Qwen2ForCausalLM"
    ):
        InternVLChatConfig(llm_config={"architectures": ["Qwen2LM"]})


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"]
)
def test_llms_of_transformers(architecture):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llm = {**small, "num_key_value_heads": 1, "vocab_size": 64, "architectures": [architecture], "pad_token_id": 0}
    config = InternVLChatConfig({**small, "image_size": 28, "patch_size": 14}, llm, template="internvl2_5")
    assert type(InternVLChatModel(config).language_model).__name__ == architecture


@pytest.mark.parametrize(
    "rope_scaling",
    [
        {"type": "yarn", "factor": 2.0},
        {"type": "linear"},
        {"type": "linear", "factor": 2},
        {"type": "dynamic", "factor": 0.5},
        {"type": "dynamic", "factor": 2.0, "more": 1},
        "dynamic",
    ],
)
def test_internlm2_refuses_unsupported_rope_scaling(rope_scaling):
    with pytest.raises(ValueError, match="rope_scaling"):
        InternLM2Config(rope_scaling=rope_scaling)


def test_internlm2_linear_rope():
    """Positions are divided by the factor.

    Twice the position at factor 2 equals the position without scaling.
    """
    from internvl.model.internlm2.modeling_internlm2 import InternLM2RotaryEmbedding

    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    plain = InternLM2RotaryEmbedding(InternLM2Config(**sizes))
    linear = InternLM2RotaryEmbedding(InternLM2Config(**sizes, rope_scaling={"type": "linear", "factor": 2.0}))
    x, positions = torch.zeros(1, 9, 32), torch.arange(9)[None]
    for actual, expected in zip(linear(x, 2 * positions), plain(x, positions), strict=True):
        torch.testing.assert_close(actual, expected)


def test_vision_configuration_of_a_chat_checkpoint():
    for path in REAL_CONFIGS:
        assert InternVisionConfig.from_pretrained(path).hidden_size in (1024, 3200)


def test_drop_path_rates_grow_linearly():
    config = InternVisionConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=5, drop_path_rate=0.2
    )
    with torch.device("meta"):
        layers = InternVisionModel(config).encoder.layers
    assert isinstance(layers[0].drop_path1, torch.nn.Identity)
    rates = [block.drop_path2.drop_prob for block in layers[1:] if isinstance(block.drop_path1, DropPath)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_vision_model_refuses_invalid_input():
    config = InternVisionConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
    model = InternVisionModel(config)
    with pytest.raises(ValueError, match="pixel_values or pixel_embeds"):
        model()
    with pytest.raises(ValueError, match=r"\(3, 28, 28\)"):
        model(torch.zeros(3, 28, 28))
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="hidden_size 8 .* num_attention_heads 3"):
        InternVisionModel(config)
