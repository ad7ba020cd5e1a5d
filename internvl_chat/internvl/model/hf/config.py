"""The configuration of a chat checkpoint as transformers' own InternVL class states it, and back.

The companion of `hf_format`, which does the same for the weights; `hf_processor` adds what reads text and pictures.
"""

from transformers import AutoConfig, InternVLConfig, LlamaConfig, PretrainedConfig

from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.lora import LORA_RANK_FIELDS

# Fields of the vision encoder, ours to transformers'.
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
INTERNLM2_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id"
).split()
# What transformers' class has no field for. It keeps them under `internvl_chat` in its config.json, so that the way
# back finds them again; of a checkpoint that was never ours they are guessed.
CHAT_FIELDS = (
    "template system_message pad2square dynamic_image_size use_thumbnail min_dynamic_patch max_dynamic_patch"
).split()
GUESSED = {"dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12}
GUESSED_TEMPLATES = {"gpt_oss": "internvl3_5_gpt_oss"}

# The only settings of transformers' class that a chat model can have.
FIXED = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
FIXED_VISION = {
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
    "hidden_dropout_prob": 0.0,
}
SQUARE = ("image_size", "patch_size")
QK_NORM_EPS = 1e-6  # a constant in transformers' class


def to_hf_config(config: InternVLChatConfig, image_token_id: int, tied: bool) -> InternVLConfig:
    """What transformers' class needs to be the same model; `tied`: the head is the embeddings.

    Raises:
        ValueError: transformers' class cannot be this model; the message says why.
    """
    if ranks := [f"{name} {rank}" for name in LORA_RANK_FIELDS.values() if (rank := getattr(config, name))]:
        raise ValueError(
            f"the checkpoint carries LoRA adapters ({', '.join(ranks)}): merge them first, with tools/merge_lora.py"
        )
    vision = config.vision_config
    if config.ps_version != "v2":
        raise ValueError(
            f"ps_version is {config.ps_version!r}: it orders a tile's image tokens column by column, transformers' "
            "class row by row, and no rearrangement of weights makes up for that"
        )
    if vision.qk_normalization and vision.layer_norm_eps != QK_NORM_EPS:
        raise ValueError(f"layer_norm_eps is {vision.layer_norm_eps}: transformers' q/k norm has {QK_NORM_EPS} always")
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config={hf: getattr(vision, ours) for ours, hf in VISION_FIELDS.items()},
        text_config=_text_config(config.llm_config, tied).to_dict(),
        image_token_id=image_token_id,
        image_seq_length=count_image_tokens(config),
        downsample_ratio=config.downsample_ratio,
        vision_feature_layer=config.select_layer,
        tie_word_embeddings=tied,
        dtype=config.dtype,
        internvl_chat={name: getattr(config, name, None) for name in CHAT_FIELDS},
        **FIXED,
    )


def to_chat_config(hf: InternVLConfig, reference: InternVLChatConfig | None = None) -> InternVLChatConfig:
    """What our class needs to be the same model as transformers'.

    Args:
        reference: tells what transformers' configuration does not, and whether the Llama is an InternLM2.

    Raises:
        ValueError: our class cannot be this model, or the reference's InternLM2 is another; the message names settings.
    """
    vision = hf.vision_config
    settings = [(hf, name, value) for name, value in FIXED.items()]
    settings += [(vision, name, value) for name, value in FIXED_VISION.items()]
    wrong = [f"{name} is {getattr(c, name)!r}" for c, name, value in settings if getattr(c, name) != value]
    wrong += [f"{name} is {value}" for name in SQUARE if len(set(value := getattr(vision, name))) > 1]
    if not isinstance(hf.vision_feature_layer, int):
        wrong.append(f"vision_feature_layer is {hf.vision_feature_layer}")
    if wrong:
        raise ValueError(f"no chat model can be this one: {', '.join(wrong)}")
    fields = {ours: getattr(vision, name) for ours, name in VISION_FIELDS.items()}
    fields |= {name: fields[name][0] for name in SQUARE}
    text = hf.text_config.to_dict()
    template = GUESSED_TEMPLATES.get(text["model_type"], "internvl2_5")
    known = getattr(hf, "internvl_chat", None) or {**GUESSED, "template": template}
    llm_config = {**text, "architectures": None}  # the chat config finds the one of this model type
    if reference is not None:
        known = {name: getattr(reference, name, None) for name in CHAT_FIELDS}
        if reference.llm_config.architectures[0] == "InternLM2ForCausalLM":
            llm_config = _internlm2(reference.llm_config, text)
    return InternVLChatConfig(
        architectures=["InternVLChatModel"],
        vision_config={**fields, "architectures": ["InternVisionModel"]},
        llm_config=llm_config,
        select_layer=hf.vision_feature_layer,
        downsample_ratio=hf.downsample_ratio,
        force_image_size=_tile_size(hf, fields["patch_size"]),
        ps_version="v2",
        dtype=hf.dtype,
        **{name: value for name, value in known.items() if value is not None},
    )


def _text_config(llm_config: PretrainedConfig, tied: bool) -> PretrainedConfig:
    """transformers' own configuration of the language model; InternLM2 becomes a Llama."""
    if llm_config.architectures[0] != "InternLM2ForCausalLM":
        fields = llm_config.to_dict() | {"tie_word_embeddings": tied}
        fields.pop("attn_implementation", None)  # what the writer's machine had
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
        tie_word_embeddings=tied,
        dtype=llm_config.dtype,
        **{name: getattr(llm_config, name) for name in INTERNLM2_FIELDS},
    )


def _internlm2(llm_config: PretrainedConfig, text: dict) -> PretrainedConfig:
    """`llm_config`, an InternLM2's, if that is the Llama of `text`."""
    llama = _text_config(llm_config, tied=False).to_dict()
    differing = [
        f"{name} ({text.get(name)}, not {llama[name]})"
        for name in ("model_type", "attention_bias", "rope_parameters", *INTERNLM2_FIELDS)
        if text.get(name) != llama[name]
    ]
    if differing:
        raise ValueError(f"the language model is not the reference's: it differs in {', '.join(differing)}")
    return llm_config


def _tile_size(hf: InternVLConfig, patch_size: int) -> int:
    """Side of a tile of `image_seq_length` tokens."""
    return round((hf.image_seq_length / hf.downsample_ratio**2) ** 0.5) * patch_size
