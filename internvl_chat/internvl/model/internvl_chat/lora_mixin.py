"""LoRA in the parts of the chat model: vision encoder, projector and language model, each with settings of its own.

The mixin that gives `InternVLChatModel` its `wrap_backbone_lora`, `wrap_mlp_lora` and `wrap_llm_lora`. What a part was
wrapped with is in `config.lora_settings`, and its rank where upstream reads it, so that checkpoints open as saved.
"""

from dataclasses import asdict

from internvl.model.lora import (
    LORA_RANK_FIELDS,
    PROJECTOR_TARGETS,
    VISION_TARGETS,
    LoraSettings,
    LoraTargets,
    add_adapters,
    is_peft_model,
    llm_targets,
    unwrap_peft,
)


class LoraMixin:
    """Adds adapters to the parts of a chat model, by PEFT."""

    def wrap_backbone_lora(self, r: int = 128, lora_alpha: float = 256, lora_dropout: float = 0.05, **settings):
        """Adds LoRA to the vision encoder; of it, only the adapters train from then on.

        Args:
            settings: `targets`, `layers` and `variant` of `LoraSettings`.

        Raises:
            ValueError: it has adapters already, or settings that do not fit it.
        """
        self.add_part_adapters("vision_model", LoraSettings(r, lora_alpha, lora_dropout, **settings))

    def wrap_mlp_lora(self, r: int = 128, lora_alpha: float = 256, lora_dropout: float = 0.05, **settings):
        """Adds LoRA to both linear layers of the projector, else as `wrap_backbone_lora`."""
        self.add_part_adapters("mlp1", LoraSettings(r, lora_alpha, lora_dropout, **settings))

    def wrap_llm_lora(self, r: int = 128, lora_alpha: float = 256, lora_dropout: float = 0.05, **settings):
        """Adds LoRA to the language model, else as `wrap_backbone_lora`.

        In a mixture of experts, attention and all experts are adapted, routers are not; see `lora.LLM_TARGETS`.
        """
        self.add_part_adapters("language_model", LoraSettings(r, lora_alpha, lora_dropout, **settings))

    def add_part_adapters(self, part: str, settings: LoraSettings, loaded: bool = True):
        """Adds LoRA to one part, a key of `lora.LORA_RANK_FIELDS`; `loaded` is of `lora.add_adapters`."""
        module, is_llm = getattr(self, part), part == "language_model"
        task_type = "CAUSAL_LM" if is_llm else None
        setattr(self, part, add_adapters(module, settings, self._usual_targets(part), task_type, loaded))
        setattr(self.config, LORA_RANK_FIELDS[part], settings.r)
        self.config.lora_settings = {**(self.config.lora_settings or {}), part: asdict(settings)}
        if is_llm:
            # Under reentrant checkpoints adapters only get gradients if what they read asks for some. Once is enough.
            if not getattr(unwrap_peft(module), "_require_grads_hook", None):
                unwrap_peft(module).enable_input_require_grads()
            if hasattr(self, "all_tied_weights_keys"):  # transformers 5: a tied head has another name now
                self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def add_configured_adapters(self, loaded: bool = True):
        """Adds the adapters that the configuration speaks of to the parts that have none."""
        for part, rank in LORA_RANK_FIELDS.items():
            if getattr(self.config, rank) and not is_peft_model(getattr(self, part)):
                self.add_part_adapters(part, lora_settings_of(self.config, part), loaded)

    def _usual_targets(self, part: str) -> LoraTargets:
        if part == "language_model":
            return llm_targets(unwrap_peft(self.language_model))
        return VISION_TARGETS if part == "vision_model" else PROJECTOR_TARGETS


def lora_settings_of(config, part: str) -> LoraSettings:
    """The settings of a part's adapters. Upstream's checkpoints tell the rank alone; alpha is twice that."""
    rank, settings = getattr(config, LORA_RANK_FIELDS[part]), (config.lora_settings or {}).get(part)
    return LoraSettings(rank, 2 * rank) if settings is None else LoraSettings(**{**settings, "r": rank})
