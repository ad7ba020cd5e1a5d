"""LoRA in the chat model: vision encoder, projector and LLM.

`InternVLChatModel` inherits `wrap_backbone_lora`, `wrap_mlp_lora` and `wrap_llm_lora` from `LoraMixin`. They attach
adapters by `lora.add_adapters` and record the settings in the configuration. From there `from_pretrained` attaches the
same adapters when it loads a saved model.
"""

from dataclasses import asdict
from typing import Any

from internvl.model.lora import (
    LORA_RANK_FIELDS,
    PROJECTOR_TARGETS,
    VISION_TARGETS,
    LoraSettings,
    LoraTargets,
    add_adapters,
    find_llm_targets,
    is_peft_model,
    unwrap_peft,
)


class LoraMixin:
    """Methods that attach LoRA adapters to the parts of a chat model."""

    # Attributes of the model class that inherits from this mixin.
    config: Any
    language_model: Any
    get_expanded_tied_weights_keys: Any

    def wrap_backbone_lora(self, r: int = 128, lora_alpha: float = 256, lora_dropout: float = 0.05, **settings):
        """Add LoRA to the vision encoder and freeze its other parameters.

        Args:
            settings: `targets`, `layers` and `variant` of `LoraSettings`.

        Raises:
            ValueError: the vision encoder has adapters already, or the settings do not fit it.
        """
        self.add_part_adapters("vision_model", LoraSettings(r, lora_alpha, lora_dropout, **settings))

    def wrap_mlp_lora(self, r: int = 128, lora_alpha: float = 256, lora_dropout: float = 0.05, **settings):
        """Add LoRA to both linear layers of the projector, see `wrap_backbone_lora`."""
        self.add_part_adapters("mlp1", LoraSettings(r, lora_alpha, lora_dropout, **settings))

    def wrap_llm_lora(self, r: int = 128, lora_alpha: float = 256, lora_dropout: float = 0.05, **settings):
        """Add LoRA to the LLM, see `wrap_backbone_lora`.

        In a mixture of experts, attention and all experts get adapters, routers do not; see `lora.LLM_TARGETS`.
        """
        self.add_part_adapters("language_model", LoraSettings(r, lora_alpha, lora_dropout, **settings))

    def add_part_adapters(self, part: str, settings: LoraSettings, has_base_weights: bool = True):
        """Add LoRA to one part, a key of `lora.LORA_RANK_FIELDS`.

        `has_base_weights` is that of `lora.add_adapters`.
        """
        module, is_llm = getattr(self, part), part == "language_model"
        task_type = "CAUSAL_LM" if is_llm else None
        setattr(
            self, part, add_adapters(module, settings, self._get_default_targets(part), task_type, has_base_weights)
        )
        setattr(self.config, LORA_RANK_FIELDS[part], settings.r)
        self.config.lora_settings = {**(self.config.lora_settings or {}), part: asdict(settings)}
        if is_llm:
            # Under reentrant checkpointing, adapters get gradients only if the input of their layer requires grad.
            if not getattr(unwrap_peft(module), "_require_grads_hook", None):  # register the hook once
                unwrap_peft(module).enable_input_require_grads()
            if hasattr(self, "all_tied_weights_keys"):  # transformers 5; PEFT has changed the name of a tied head
                self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def add_configured_adapters(self, has_base_weights: bool = True):
        """Add the adapters of the configuration to parts that have none yet."""
        for part, rank_field in LORA_RANK_FIELDS.items():
            if getattr(self.config, rank_field) and not is_peft_model(getattr(self, part)):
                self.add_part_adapters(part, get_lora_settings(self.config, part), has_base_weights)

    def _get_default_targets(self, part: str) -> LoraTargets:
        if part == "language_model":
            return find_llm_targets(unwrap_peft(self.language_model))
        return VISION_TARGETS if part == "vision_model" else PROJECTOR_TARGETS


def get_lora_settings(config, part: str) -> LoraSettings:
    """Read the LoRA settings of a part from a chat configuration.

    Upstream's checkpoints store only the rank; their alpha is twice that.
    """
    rank, settings = getattr(config, LORA_RANK_FIELDS[part]), (config.lora_settings or {}).get(part)
    return LoraSettings(rank, 2 * rank) if settings is None else LoraSettings(**{**settings, "r": rank})
