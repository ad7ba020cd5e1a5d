"""Conversion of configurations between the custom and the HF format.

`hf/weights.py` converts the weights and explains the two formats; `hf/processor.py` writes tokenizer and processor.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, InternVLConfig, LlamaConfig, PretrainedConfig

from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.config_values import check_common_values, describe_config_file
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens, to_transformers4_keys
from internvl.model.internvl_chat.safe_loading import one_line_file_errors, refuse_unsafe_files
from internvl.model.lora import LORA_RANK_FIELDS
from internvl.model.tokenizers.v4_compat import update_json
from internvl.regular_files import read_json_object

# Fields of the vision encoder: custom name -> HF name.
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "num_channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "projection_dropout",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "initializer_factor": "layer_scale_init_value",
}
# Fields that InternLM2 and Llama share under one name.
INTERNLM2_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id"
).split()
# Fields without a counterpart in the HF configuration. They are saved under `internvl_chat` in its config.json for the
# conversion back. A checkpoint that transformers created has none, and gets the defaults below.
CHAT_FIELDS = (
    "template system_message pad2square dynamic_image_size use_thumbnail min_dynamic_patch max_dynamic_patch"
).split()
DEFAULT_CHAT_FIELDS = {
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
}
DEFAULT_TEMPLATE, DEFAULT_TEMPLATES = "internvl2_5", {"gpt_oss": "internvl3_5_gpt_oss"}  # the latter by LLM model type

# HF settings of which InternVLChatModel supports one value only.
REQUIRED_HF_SETTINGS = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
REQUIRED_HF_VISION_SETTINGS = {
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
    "hidden_dropout_prob": 0.0,
}
HEIGHT_WIDTH_FIELDS = ("image_size", "patch_size")  # (height, width) in the HF vision configuration
HF_QK_NORM_EPS = 1e-6  # a constant in transformers' InternVLVisionRMSNorm


def load_hf_config(path: str | Path) -> InternVLConfig:
    """Load the configuration of an HF checkpoint of unknown origin.

    Raises:
        ValueError, OSError: a file is unsafe, or the configuration is invalid; in one line.
    """
    refuse_unsafe_files(path)
    source = describe_config_file(path)
    with one_line_file_errors(source):
        fields = InternVLConfig.get_config_dict(path)[0]
        check_common_values(fields, source)
        return InternVLConfig.from_dict(fields)


def convert_config_to_hf(config: InternVLChatConfig, image_token_id: int, is_tied: bool) -> InternVLConfig:
    """Convert a chat configuration to the HF format.

    Args:
        image_token_id: id of `<IMG_CONTEXT>`.
        is_tied: the LM head is the embedding.

    Raises:
        ValueError: a setting that transformers' class does not support.
    """
    if ranks := [f"{name} {rank}" for name in LORA_RANK_FIELDS.values() if (rank := getattr(config, name))]:
        raise ValueError(
            f"the checkpoint holds LoRA adapters ({', '.join(ranks)}): merge them first with `internvl merge`"
        )
    vision = config.vision_config
    if config.ps_version != "v2":
        raise ValueError(
            f"ps_version {config.ps_version!r} is not supported by transformers' class: it orders the image tokens of "
            "a tile column by column, transformers row by row, and no permutation of weights makes them equal"
        )
    if vision.qk_normalization and vision.layer_norm_eps != HF_QK_NORM_EPS:
        raise ValueError(
            f"layer_norm_eps {vision.layer_norm_eps} is not supported by transformers' class: the epsilon of its q/k "
            f"norm is {HF_QK_NORM_EPS}"
        )
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config={hf_name: getattr(vision, name) for name, hf_name in VISION_FIELDS.items()},
        text_config=_convert_llm_config(config.llm_config, is_tied).to_dict(),
        image_token_id=image_token_id,
        image_seq_length=count_image_tokens(config),
        downsample_ratio=config.downsample_ratio,
        vision_feature_layer=config.select_layer,
        tie_word_embeddings=is_tied,
        dtype=config.dtype,
        # pyrefly: ignore[unexpected-keyword]  # a configuration keeps unknown fields as attributes
        internvl_chat={name: getattr(config, name, None) for name in CHAT_FIELDS},
        **REQUIRED_HF_SETTINGS,
    )


def save_hf_config(config: InternVLConfig, folder: Path) -> None:
    """Save an HF configuration that transformers 4.52 to 5 read alike."""
    config.save_pretrained(folder)
    fields = read_json_object(folder / "config.json")
    text_fields = to_transformers4_keys(fields["text_config"])
    if rope := text_fields.get("rope_scaling"):
        kind = rope.pop("type")
        # Both versions read `rope_type`. Phi-3's configuration of version 4 reads only `type`; 5 does not know `su`.
        is_phi3 = kind in ("su", "longrope")
        text_fields["rope_scaling"] = ({"type": "longrope"} if is_phi3 else {"rope_type": kind}) | rope
    update_json(folder / "config.json", text_config=text_fields, torch_dtype=fields.get("dtype"))


def convert_config_to_custom(
    hf_config: InternVLConfig, reference: InternVLChatConfig | None = None
) -> InternVLChatConfig:
    """Convert an HF configuration to a chat configuration.

    Args:
        reference: source of the fields that the HF format lacks. If its LLM is an InternLM2, so is the result's.

    Raises:
        ValueError: settings that InternVLChatModel does not support, or another LLM than the reference's InternLM2.
    """
    _check_hf_settings(hf_config)
    vision = hf_config.vision_config
    vision_fields = {name: getattr(vision, hf_name) for name, hf_name in VISION_FIELDS.items()}
    vision_fields |= {name: vision_fields[name][0] for name in HEIGHT_WIDTH_FIELDS}
    text_fields = hf_config.text_config.to_dict()  # pyrefly: ignore[missing-attribute]  # never None once built
    template = DEFAULT_TEMPLATES.get(text_fields["model_type"], DEFAULT_TEMPLATE)
    chat_fields = getattr(hf_config, "internvl_chat", None) or {**DEFAULT_CHAT_FIELDS, "template": template}
    llm_config = {**text_fields, "architectures": None}  # InternVLChatConfig finds the class of this model type
    if reference is not None:
        chat_fields = {name: getattr(reference, name, None) for name in CHAT_FIELDS}
        if reference.llm_config.architectures[0] == "InternLM2ForCausalLM":
            llm_config = _require_same_llm(reference.llm_config, text_fields)
    return InternVLChatConfig(
        architectures=["InternVLChatModel"],
        vision_config={**vision_fields, "architectures": ["InternVisionModel"]},
        llm_config=llm_config,
        select_layer=hf_config.vision_feature_layer,
        downsample_ratio=hf_config.downsample_ratio,
        force_image_size=_compute_tile_size(hf_config, vision_fields["patch_size"]),
        ps_version="v2",
        dtype=hf_config.dtype,
        **{name: value for name, value in chat_fields.items() if value is not None},
    )


def _check_hf_settings(hf_config: InternVLConfig) -> None:
    """Raise a ValueError with the settings that InternVLChatModel does not support."""
    vision = hf_config.vision_config
    required = [(hf_config, name, value) for name, value in REQUIRED_HF_SETTINGS.items()]
    required += [(vision, name, value) for name, value in REQUIRED_HF_VISION_SETTINGS.items()]
    unsupported = [f"{name} {getattr(c, name)!r}" for c, name, value in required if getattr(c, name) != value]
    unsupported += [f"{name} {size}" for name in HEIGHT_WIDTH_FIELDS if len(set(size := getattr(vision, name))) > 1]
    if not isinstance(hf_config.vision_feature_layer, int):
        unsupported.append(f"vision_feature_layer {hf_config.vision_feature_layer}")
    if unsupported:
        raise ValueError(f"settings that InternVLChatModel does not support: {', '.join(unsupported)}")


def _convert_llm_config(llm_config: Any, is_tied: bool) -> PretrainedConfig:
    """Return transformers' configuration of the LLM; an InternLM2 becomes a Llama."""
    if llm_config.architectures[0] != "InternLM2ForCausalLM":
        fields = llm_config.to_dict() | {"tie_word_embeddings": is_tied}
        fields.pop("attn_implementation", None)  # a choice of the machine that wrote the checkpoint
        return AutoConfig.for_model(**fields)
    scaling = llm_config.rope_scaling or {"type": "default"}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        attention_bias=llm_config.bias,
        mlp_bias=False,
        rope_parameters={
            "rope_type": scaling["type"],
            "rope_theta": float(llm_config.rope_theta),
            **{name: value for name, value in scaling.items() if name != "type"},
        },
        tie_word_embeddings=is_tied,
        dtype=llm_config.dtype,
        **{name: getattr(llm_config, name) for name in INTERNLM2_FIELDS},
    )


def _require_same_llm(internlm2_config: PretrainedConfig, llama_fields: dict) -> PretrainedConfig:
    """Return the InternLM2 configuration if the Llama is the same model.

    Raises:
        ValueError: they differ.
    """
    expected = _convert_llm_config(internlm2_config, is_tied=False).to_dict()
    differences = [
        f"{name} (expected {expected[name]}, got {llama_fields.get(name)})"
        for name in ("model_type", "attention_bias", "rope_parameters", *INTERNLM2_FIELDS)
        if llama_fields.get(name) != expected[name]
    ]
    if differences:
        raise ValueError(f"the LLM differs from the reference's in {', '.join(differences)}")
    return internlm2_config


def _compute_tile_size(hf_config: InternVLConfig, patch_size: int) -> int:
    """Return the side in pixels of a tile of `image_seq_length` tokens."""
    return round((hf_config.image_seq_length / hf_config.downsample_ratio**2) ** 0.5) * patch_size
