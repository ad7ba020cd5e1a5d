"""Configuration of the chat model: vision encoder, LLM and their connection.

The architecture of the LLM selects its configuration class from `LLM_CONFIGS` or transformers' registry;
`modeling_internvl_chat` selects its model class likewise.
"""

from difflib import get_close_matches
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from internvl.model.internlm2.configuration_internlm2 import InternLM2Config
from internvl.model.internvl_chat.config_values import check_chat_config, describe_config_file
from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig
from internvl.model.internvl_chat.safe_loading import one_line_file_errors
from internvl.model.phi3.configuration_phi3 import Phi3Config

# LLMs implemented here; every other causal language model comes from transformers' registry.
LLM_CONFIGS = {
    "InternLM2ForCausalLM": InternLM2Config,
    "InternLM3ForCausalLM": LlamaConfig,
    "Phi3ForCausalLM": Phi3Config,
}


class InternVLChatConfig(PretrainedConfig):
    """Configuration of an InternVL chat model, with upstream's keys and defaults.

    Args:
        vision_config, llm_config: dicts as in `config.json`, or configuration objects; default LLM: Qwen2.
        use_backbone_lora, use_llm_lora, use_mlp_lora: LoRA rank of a part; if it is above 0, the constructor of the
            model attaches adapters.
        lora_settings: part (`vision_model`, `mlp1`, `language_model`) -> fields of `lora.LoraSettings`. A part without
            an entry has upstream's settings: alpha is twice the rank.
        template: name of the conversation template, see `internvl.conversation`.
        attn_implementation: of both parts, see `decoder.get_requested_attention`; it is not saved.
        tie_word_embeddings: whether the LLM's head shares its weight with the input embedding. It must also be set in
            `llm_config`, as in the small models of InternVL 3.5; older models are not tied.

    Raises:
        ValueError: the architecture of the LLM is not supported; the message lists similar names.
    """

    model_type = "internvl_chat"
    is_composition = True

    def __init__(
        self,
        vision_config=None,
        llm_config=None,
        use_backbone_lora=0,
        use_llm_lora=0,
        pad2square=False,
        select_layer=-1,
        force_image_size=None,
        downsample_ratio=0.5,
        template=None,
        dynamic_image_size=False,
        use_thumbnail=False,
        ps_version="v1",
        min_dynamic_patch=1,
        max_dynamic_patch=6,
        tie_word_embeddings=False,
        use_mlp_lora=0,
        lora_settings=None,
        attn_implementation=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = InternVisionConfig(**(vision_config or {"architectures": ["InternVisionModel"]}))
        self.vision_config: Any = vision_config
        self.llm_config: Any = _build_llm_config(llm_config or {"architectures": ["Qwen2ForCausalLM"]})
        self.use_backbone_lora = use_backbone_lora
        self.use_llm_lora = use_llm_lora
        self.use_mlp_lora = use_mlp_lora
        self.lora_settings = lora_settings
        self.attn_implementation = attn_implementation
        self.pad2square = pad2square
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.ps_version = ps_version
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.hidden_size = self.llm_config.hidden_size  # DeepSpeed sizes its ZeRO-3 buckets by it
        # Older checkpoints of upstream have arbitrary values in `llm_config`: both fields must agree.
        is_tied = bool(tie_word_embeddings and self.llm_config.tie_word_embeddings)
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings = is_tied

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a chat configuration of unknown origin.

        Raises:
            ValueError, OSError: the file or a value in it is invalid; in one line.
        """
        with one_line_file_errors(describe_config_file(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read and check the fields of a chat configuration."""
        source = describe_config_file(pretrained_model_name_or_path)
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_chat_config(fields, source)
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Create a configuration from the fields of `config.json`."""
        # A choice for the machine that wrote the file.
        fields = {key: value for key, value in config_dict.items() if key != "attn_implementation"}
        if isinstance(llm_fields := fields.get("llm_config"), dict):
            fields["llm_config"] = {k: value for k, value in llm_fields.items() if k != "attn_implementation"}
        return super().from_dict(fields, **kwargs)

    def to_dict(self) -> dict:
        """Return all fields, defaults included, under the keys of transformers 4.

        Upstream pins transformers 4 and must be able to load saved checkpoints.
        """
        output = super().to_dict()
        for part in ("vision_config", "llm_config"):
            config = getattr(self, part)
            output[part] = to_transformers4_keys({**config.to_dict(), "model_type": config.model_type})
        for key in ("_commit_hash", "attn_implementation"):
            output.pop(key, None)
        return to_transformers4_keys({**output, "model_type": self.model_type})

    def to_diff_dict(self) -> dict:
        """Return the fields of `config.json`: all of them, defaults included, as in upstream's."""
        output = self.to_dict()
        uses_flash_attn = self.vision_config.use_flash_attn
        # Upstream's key, which has these two values.
        output["llm_config"]["attn_implementation"] = "flash_attention_2" if uses_flash_attn else "eager"
        return output


def get_tile_size(config: InternVLChatConfig) -> int:
    """Return the side of a tile in pixels."""
    return config.force_image_size or config.vision_config.image_size


def count_image_tokens(config: InternVLChatConfig) -> int:
    """Count the image tokens of one tile."""
    return int((get_tile_size(config) // config.vision_config.patch_size) ** 2 * config.downsample_ratio**2)


def get_transformers_llms() -> dict[str, str]:
    """Map architecture to model type for the causal language models of transformers."""
    # A model type may have one architecture or a tuple of them.
    items = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {name: kind for kind, names in items for name in ([names] if isinstance(names, str) else names)}


def _build_llm_config(llm_config) -> PretrainedConfig:
    """Build the LLM's configuration object, its class selected by `architectures[0]` or `model_type`."""
    fields = llm_config.to_dict() if isinstance(llm_config, PretrainedConfig) else llm_config
    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(fields.get("model_type", ""), "")
    architecture = (fields.get("architectures") or [by_type])[0]
    registry = get_transformers_llms()
    if architecture not in LLM_CONFIGS and architecture not in registry:
        similar = ", ".join(get_close_matches(architecture, sorted({*LLM_CONFIGS, *registry}), cutoff=0))
        raise ValueError(
            f"Unsupported architecture: {architecture!r} is not a causal language model of this repository or "
            f"transformers {transformers.__version__}; similar names are {similar}"
        )
    if not isinstance(llm_config, PretrainedConfig):
        config_class = LLM_CONFIGS.get(architecture) or CONFIG_MAPPING[registry[architecture]]
        llm_config = config_class(**llm_config)
        if requested := fields.get("attn_implementation"):
            llm_config.attn_implementation = requested  # transformers keeps it under a private name
    llm_config.architectures = [architecture]
    return llm_config


def to_transformers4_keys(fields: dict) -> dict:
    """Rename keys of transformers 5 to those of transformers 4.

    transformers 5 writes `dtype` and `rope_parameters` where 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`. 4
    would silently use the default rotary base and number of experts instead. 5 reads both.
    """
    if "num_local_experts" in fields:
        fields.setdefault("num_experts", fields["num_local_experts"])
    if "dtype" in fields:
        fields["torch_dtype"] = fields.pop("dtype")
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" in rope:  # not if there is one for each type of layer, which 4 does not support
        del fields["rope_parameters"]
        kind = rope.pop("rope_type", "default")
        kind = rope.pop("type", kind)  # Phi-3 calls it `su`, transformers 5 `longrope`
        fields["rope_theta"] = rope.pop("rope_theta")
        rope = {key: value for key, value in rope.items() if fields.get(key) != value}
        if (factor := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
            fields["partial_rotary_factor"] = factor
        fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return fields
