"""Configuration of an InternVL chat model in a checkpoint's own code."""

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig

from internvl.model.remote_code.configuration_intern_vit import InternVisionConfig
from internvl.model.remote_code.configuration_internlm2 import InternLM2Config

DEFAULTS: dict[str, Any] = {
    "select_layer": -1,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "template": "internvl2_5",
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "ps_version": "v1",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
# InternLM3 has the blocks and names of Llama. Other LLMs are those of transformers.
LLM_CONFIGS = {"InternLM2ForCausalLM": InternLM2Config, "InternLM3ForCausalLM": LlamaConfig}


class InternVLChatConfig(PretrainedConfig):
    """Configuration of vision encoder, LLM (`llm_config`) and their connection; more fields are in `DEFAULTS`."""

    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, tie_word_embeddings=False, **fields):
        super().__init__(**{**DEFAULTS, **fields})
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = InternVisionConfig(**(vision_config or {}))
        if not isinstance(llm_config, PretrainedConfig):
            llm_config = build_llm_config(llm_config or {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
        self.vision_config, self.llm_config = vision_config, llm_config
        self.hidden_size = llm_config.hidden_size
        # Some checkpoints have an arbitrary value in `llm_config`: both fields must agree.
        self.tie_word_embeddings = bool(tie_word_embeddings and llm_config.tie_word_embeddings)
        llm_config.tie_word_embeddings = self.tie_word_embeddings

    def to_diff_dict(self):
        """Return all fields: engines read defaults, too."""
        return self.to_dict()


def build_llm_config(fields):
    """Build the configuration of the LLM that `fields["architectures"]` names."""
    architecture, model_type = fields["architectures"][0], fields.get("model_type")
    if architecture not in LLM_CONFIGS and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers {transformers.__version__} does not support {architecture} ({model_type}): install a newer "
            "version"
        )
    config_class = LLM_CONFIGS.get(architecture) or CONFIG_MAPPING[model_type]
    fields = {key: value for key, value in fields.items() if key != "attn_implementation"}  # of another machine
    rope = fields.get("rope_scaling") or {}
    if rope.get("type") in ("su", "yarn") and model_type == "phi3" and hasattr(config_class, "rope_scaling"):
        # The older names of a kind that transformers 5, where `rope_scaling` is a property, accepts as `longrope` only.
        fields["rope_scaling"] = {**rope, "rope_type": "longrope"}
    return config_class(**fields)
