"""Freeze, adapt and unfreeze parts of a model; report trainable parameters."""

import logging

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from internvl.arguments.model import ModelArguments
from internvl.arguments.per_part import PART_NAMES, LoraArguments, get_part_settings
from internvl.arguments.training import TrainingArguments
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.lora_mixin import get_lora_settings
from internvl.model.lora import LORA_RANK_FIELDS, PART_FLAGS, LoraSettings, is_peft_model, unwrap_peft
from internvl.model.new_tokens import find_new_tokens
from internvl.train.param_groups import build_param_groups, count_elements

logger = logging.getLogger(__name__)
HEAD_NAMES = {"lm_head", "output"}  # of the LM head in transformers' LLMs and in InternLM2


def set_trainable(model: InternVLChatModel, args: ModelArguments) -> InternVLChatModel:
    """Freeze parts, attach adapters and unfreeze layers according to the flags.

    Raises:
        ValueError: the checkpoint has other adapters, or no parameter is trainable.
    """
    for part, part_flag in PART_FLAGS.items():
        if getattr(args, f"freeze_{part_flag}"):
            getattr(model, part).requires_grad_(False)
    for part in PART_FLAGS:
        attach_adapters(model, part, args)
    if args.unfreeze_lm_head:
        model.language_model.get_output_embeddings().requires_grad_(True)
    set_trainable_vision_layers(model, args.unfreeze_vit_layers)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "The model has no trainable parameters: vision encoder, projector and LLM are frozen and have no LoRA. Set "
            "--use_backbone_lora or --use_llm_lora, or leave one part unfrozen."
        )
    return model


def set_trainable_vision_layers(model: InternVLChatModel, first_unfrozen: int) -> None:
    """Unfreeze the last vision encoder layers; freeze layers without effect.

    Args:
        first_unfrozen: layers [first_unfrozen:] are unfrozen, as in a slice; 0: none.
    """
    layers = unwrap_peft(model.vision_model).encoder.layers
    if not -len(layers) <= first_unfrozen < len(layers):
        raise ValueError(
            f"--unfreeze_vit_layers {first_unfrozen} is invalid: the vision encoder has {len(layers)} layers; expected "
            f"{-len(layers)} to {len(layers) - 1}."
        )
    if first_unfrozen:
        layers[first_unfrozen:].requires_grad_(True)
    # Hidden state 0 is the embeddings, state k the output of layer k - 1. Layers after the state that the projector
    # reads have no effect and get no gradient, for which DDP would wait.
    selected_state = model.select_layer % (len(layers) + 1)
    if selected_state < len(layers):
        logger.info(
            "Unused vision encoder layers: %d and above, because of --vision_select_layer %d",
            selected_state,
            model.select_layer,
        )
        layers[selected_state:].requires_grad_(False)


def attach_adapters(model: InternVLChatModel, part: str, args: ModelArguments) -> None:
    """Attach adapters to a part, or continue its existing ones."""
    rank = getattr(args, LORA_RANK_FIELDS[part])
    if not rank:
        return
    module = getattr(model, part)
    if part == "language_model" and args.train_new_tokens:
        check_new_tokens(model)
    if is_peft_model(module) and can_continue_adapters(model.config, part, args):
        if get_lora_settings(model.config, part).trainable_token_ids and not args.train_new_tokens:
            raise ValueError(
                "--train_new_tokens False is not supported with these adapters, which train the rows of new tokens: "
                "set it to True, or merge them first by --merge_before_training True."
            )
        module.set_adapter(module.active_adapter)  # makes the adapters trainable again: they were frozen with the part
    else:
        settings = {"r": rank, "alpha": 2 * rank} | parse_lora_settings(args, part)
        if part == "language_model" and args.train_new_tokens:
            settings["trainable_token_ids"] = model.new_token_ids
        model.add_part_adapters(part, LoraSettings(**settings))


def check_new_tokens(model: InternVLChatModel) -> None:
    """Check that `--train_new_tokens` can train the rows of all new tokens.

    Raises:
        ValueError: adapters are continued that do not train these rows.
    """
    if not is_peft_model(model.language_model):
        if not model.new_token_ids:
            logger.warning("--train_new_tokens True has no effect: the model has a row for every token.")
    elif set(model.new_token_ids) - set(get_lora_settings(model.config, "language_model").trainable_token_ids):
        raise ValueError(
            "--train_new_tokens True is not supported for tokens that are newer than the continued adapters: set "
            "--merge_before_training True."
        )


def find_untrained_tokens(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Find new tokens whose rows these flags do not train: id -> token.

    All their rows are equal, so a model cannot learn to generate them.
    """
    has_trainable_llm = not args.freeze_llm and not args.use_llm_lora
    has_adapted_head = bool(HEAD_NAMES.intersection(args.llm_lora_targets or ()))
    if has_trainable_llm or has_adapted_head or args.train_new_tokens or args.unfreeze_lm_head:
        return {}
    path = args.model_name_or_path or args.llm_path
    assert path  # validated
    fields = PretrainedConfig.get_config_dict(path)[0]
    vocab_size = fields.get("llm_config", fields)["vocab_size"]
    return find_new_tokens(tokenizer, vocab_size, fields.get("untrained_token_ids"))


def get_untrained_tokens(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return id -> token of the tokens whose rows a built model does not train."""
    ids: list[int] = model.config.untrained_token_ids
    return dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))


def parse_lora_settings(args: ModelArguments, part: str) -> dict:
    """Return the fields of `LoraSettings` that the flags give for a part."""
    flags = get_part_settings(args, LoraArguments, PART_FLAGS[part])
    settings = {name.removeprefix("lora_"): value for name, value in flags.items()}
    if "layers" in settings:  # START:STOP, either of which may be omitted
        settings["layers"] = [int(number) if number else None for number in settings["layers"].split(":")]
    return settings


def can_continue_adapters(config: InternVLChatConfig, part: str, args: ModelArguments) -> bool:
    """Check whether a part's adapters in the checkpoint match the flags."""
    checkpoint_settings = get_lora_settings(config, part)
    settings = {"r": getattr(args, LORA_RANK_FIELDS[part])} | parse_lora_settings(args, part)
    return all(getattr(checkpoint_settings, name) == value for name, value in settings.items())


def list_trainable_parts(model: InternVLChatModel, args: TrainingArguments) -> list[dict]:
    """Count the trainable parameters of each part, with LoRA rank and learning rates as text."""
    groups, rows = build_param_groups(model, args), []
    for part, part_flag in PART_FLAGS.items():
        name, parameters = PART_NAMES[part_flag], list(getattr(model, part).parameters())
        rates = sorted({f"{group['lr']:g}" for group in groups if group["name"] == name}, key=float)
        rows.append(
            {
                "part": name,
                "parameters": sum(map(count_elements, parameters)),
                "trainable": sum(count_elements(p) for p in parameters if p.requires_grad),
                "lora_rank": format_lora_rank(model, part),
                "learning_rate": " to ".join(dict.fromkeys((rates[0], rates[-1]))) if rates else "-",
            }
        )
    return rows


def format_trainable_table(model: InternVLChatModel, args: TrainingArguments) -> str:
    """Format a table of the parts with their trainable parameters."""
    rows = [("part", "parameters", "trainable", "share", "LoRA rank", "learning rate")]
    for row in list_trainable_parts(model, args):
        counts = f"{row['parameters']:,}", f"{row['trainable']:,}", f"{row['trainable'] / row['parameters']:.2%}"
        rows.append((row["part"], *counts, row["lora_rank"], row["learning_rate"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def format_lora_rank(model: nn.Module, part: str) -> str:
    """Format a part's LoRA rank and its variant, unless that is `lora`."""
    if not is_peft_model(getattr(model, part)):
        return "-"
    settings = get_lora_settings(model.config, part)
    return f"{settings.r}" if settings.variant == "lora" else f"{settings.r} {settings.variant}"
