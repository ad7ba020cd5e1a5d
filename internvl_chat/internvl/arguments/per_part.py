"""Flags for each part of the model: LoRA settings, learning rates.

The prefix of a flag names the part: `backbone_` for the vision encoder, `mlp_` for the projector, `llm_` for the LLM.
A flag that is not set is None. Then the checkpoint's setting, the flag without prefix, or a default applies.
"""

from dataclasses import dataclass, fields

from internvl.arguments.flags import option

# Prefix of the flags -> name of the part in logs and messages. `model.lora.PART_FLAGS` has the modules' names.
PART_NAMES = {"backbone": "vision encoder", "mlp": "projector", "llm": "LLM"}


@dataclass(kw_only=True)
class LoraArguments:
    """LoRA settings of each part, without the ranks (`ModelArguments`)."""

    backbone_lora_alpha: float | None = option(None, "lora_alpha of the vision encoder; default: 2 * rank")
    backbone_lora_dropout: float | None = option(None, "LoRA dropout of the vision encoder; default: 0.05")
    backbone_lora_targets: list[str] | None = option(
        None, "LoRA target modules of the vision encoder, as suffixes of names; default: all its linear layers"
    )
    backbone_lora_layers: str | None = option(
        None, "vision encoder layers with LoRA, START:STOP as in a slice; default: all"
    )
    backbone_lora_variant: str | None = option(
        None, "LoRA variant of the vision encoder: lora, rslora, dora or pissa; default: lora"
    )

    # No mlp_lora_layers: the projector is not a stack of layers.
    mlp_lora_alpha: float | None = option(None, "lora_alpha of the projector; default: 2 * rank")
    mlp_lora_dropout: float | None = option(None, "LoRA dropout of the projector; default: 0.05")
    mlp_lora_targets: list[str] | None = option(
        None, "LoRA target modules of the projector, as suffixes of names; default: all its linear layers"
    )
    mlp_lora_variant: str | None = option(
        None, "LoRA variant of the projector: lora, rslora, dora or pissa; default: lora"
    )

    llm_lora_alpha: float | None = option(None, "lora_alpha of the LLM; default: 2 * rank")
    llm_lora_dropout: float | None = option(None, "LoRA dropout of the LLM; default: 0.05")
    llm_lora_targets: list[str] | None = option(
        None, "LoRA target modules of the LLM, as suffixes of names; default: all its linear layers"
    )
    llm_lora_layers: str | None = option(None, "LLM layers with LoRA, START:STOP as in a slice; default: all")
    llm_lora_variant: str | None = option(None, "LoRA variant of the LLM: lora, rslora, dora or pissa; default: lora")


@dataclass(kw_only=True)
class PartRateArguments:
    """Learning rate and weight decay of each part."""

    backbone_lr: float | None = option(None, "learning rate of the vision encoder; default: --learning_rate")
    backbone_weight_decay: float | None = option(None, "weight decay of the vision encoder; default: --weight_decay")
    backbone_loraplus_lr_ratio: float | None = option(
        None, "LoRA+ in the vision encoder: learning rate of the adapters' B matrices / that of their A; default: 1"
    )

    mlp_lr: float | None = option(None, "learning rate of the projector; default: --learning_rate")
    mlp_weight_decay: float | None = option(None, "weight decay of the projector; default: --weight_decay")
    mlp_loraplus_lr_ratio: float | None = option(
        None, "LoRA+ in the projector: learning rate of the adapters' B matrices / that of their A; default: 1"
    )

    llm_lr: float | None = option(None, "learning rate of the LLM; default: --learning_rate")
    llm_weight_decay: float | None = option(None, "weight decay of the LLM; default: --weight_decay")
    llm_loraplus_lr_ratio: float | None = option(
        None, "LoRA+ in the LLM: learning rate of the adapters' B matrices / that of their A; default: 1"
    )


def get_part_settings(args, arguments_class: type, part_flag: str) -> dict:
    """Return the flags that are set for one part.

    Args:
        arguments_class: `LoraArguments` or `PartRateArguments`, a base of `args`.
        part_flag: prefix of the part's flags, a key of `PART_NAMES`.

    Returns:
        Setting (flag without its prefix) -> value.
    """
    prefix = f"{part_flag}_"
    flags = [field.name for field in fields(arguments_class) if field.name.startswith(prefix)]
    return {flag.removeprefix(prefix): value for flag in flags if (value := getattr(args, flag)) is not None}
