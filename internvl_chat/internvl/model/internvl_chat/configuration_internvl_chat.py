"""A chat checkpoint's `config.json`: the vision encoder's, the language model's and how the two are joined.

`LLM_CONFIGS` and transformers' registry decide which configuration class a language model has; the model classes are
looked up the same way in `modeling_internvl_chat`.
"""

from difflib import get_close_matches

import transformers
from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from internvl.model.internlm2.configuration_internlm2 import InternLM2Config
from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig
from internvl.model.phi3.configuration_phi3 import Phi3Config

# Language models this repository brings along; every other causal language model comes from transformers' registry.
LLM_CONFIGS = {
    "InternLM2ForCausalLM": InternLM2Config,
    "InternLM3ForCausalLM": LlamaConfig,
    "Phi3ForCausalLM": Phi3Config,
}


class InternVLChatConfig(PretrainedConfig):
    """Configuration of an InternVL chat model, with upstream's keys and defaults.

    Args:
        vision_config, llm_config: dicts as in `config.json`, or configuration objects. Without `llm_config`: Qwen2.
        use_backbone_lora, use_llm_lora, use_mlp_lora: LoRA rank of a part; above 0 the constructor of the model wraps
            that part.
        lora_settings: part (`vision_model`, `mlp1`, `language_model`) -> fields of `lora.LoraSettings`; a part that has
            none here has upstream's: alpha is twice the rank.
        template: name of the conversation template, see `internvl.conversation`.
        tie_word_embeddings: whether the language model's head is its input embedding, not stored again. Small models of
            InternVL 3.5 say so, here and in `llm_config`; only both together count. Everything before is not tied.

    Raises:
        ValueError: the language model's architecture is not known; the message has the names most like it.
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = InternVisionConfig(**(vision_config or {"architectures": ["InternVisionModel"]}))
        self.vision_config = vision_config
        self.llm_config = _llm_config(llm_config or {"architectures": ["Qwen2ForCausalLM"]})
        self.use_backbone_lora = use_backbone_lora
        self.use_llm_lora = use_llm_lora
        self.use_mlp_lora = use_mlp_lora
        self.lora_settings = lora_settings
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
        # By itself, what the language model did before does not count: upstream's older files say anything there.
        tied = bool(tie_word_embeddings and self.llm_config.tie_word_embeddings)
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings = tied

    def to_dict(self) -> dict:
        """Everything, defaults included, spelled as transformers 4 reads it: upstream's pin must load what we save."""
        output = super().to_dict()
        for part in ("vision_config", "llm_config"):
            output[part] = _older_spelling(
                {**getattr(self, part).to_dict(), "model_type": getattr(self, part).model_type}
            )
        output.pop("_commit_hash", None)
        return _older_spelling({**output, "model_type": self.model_type})

    def to_diff_dict(self) -> dict:
        """`config.json` states every key, as upstream's does."""
        return self.to_dict()


def tile_size(config: InternVLChatConfig) -> int:
    """Side of a tile in pixels."""
    return config.force_image_size or config.vision_config.image_size


def count_image_tokens(config: InternVLChatConfig) -> int:
    """Tokens of one tile."""
    return int((tile_size(config) // config.vision_config.patch_size) ** 2 * config.downsample_ratio**2)


def llm_registry() -> dict[str, str]:
    """Causal language models of the installed transformers: architecture -> model type."""
    pairs = ((names, model_type) for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    return {name: kind for names, kind in pairs for name in ([names] if isinstance(names, str) else names)}


def _llm_config(llm_config) -> PretrainedConfig:
    """Configuration object of a language model, its class chosen by `architectures[0]` (or else `model_type`)."""
    fields = llm_config.to_dict() if isinstance(llm_config, PretrainedConfig) else llm_config
    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(fields.get("model_type"), "")
    architecture = (fields.get("architectures") or [by_type])[0]
    registry = llm_registry()
    if architecture not in LLM_CONFIGS and architecture not in registry:
        alike = ", ".join(get_close_matches(architecture, sorted({*LLM_CONFIGS, *registry}), cutoff=0))
        raise ValueError(
            f"Unsupported architecture: {architecture!r} is no causal language model that this repository or "
            f"transformers {transformers.__version__} knows; the nearest names are {alike}"
        )
    if not isinstance(llm_config, PretrainedConfig):
        config_class = LLM_CONFIGS.get(architecture) or CONFIG_MAPPING[registry[architecture]]
        llm_config = config_class(**llm_config)
    llm_config.architectures = [architecture]
    return llm_config


def _older_spelling(fields: dict) -> dict:
    """transformers 5 writes `dtype` and `rope_parameters` where 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`.

    Read by 4, the newer spelling would silently mean the default rotary base, or number of experts. 5 reads both.
    """
    if "num_local_experts" in fields:
        fields.setdefault("num_experts", fields["num_local_experts"])
    if "dtype" in fields:
        fields["torch_dtype"] = fields.pop("dtype")
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" in rope:  # else there is none, or one for each kind of layer, which 4 does not know
        del fields["rope_parameters"]
        kind = rope.pop("rope_type", "default")
        kind = rope.pop("type", kind)  # Phi-3's own name, `su`, stays beside transformers 5's `longrope`
        fields["rope_theta"] = rope.pop("rope_theta")
        rope = {key: value for key, value in rope.items() if fields.get(key) != value}
        if (factor := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
            fields["partial_rotary_factor"] = factor
        fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return fields
