"""Write the tables of flags into docs/configuration.md.

    source shell/setup.sh && python docs/make_flag_tables.py

Names, defaults and descriptions are those of the dataclasses in `internvl/arguments/`; the topics are listed here.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path

PAGE = Path(__file__).parent / "configuration.md"

# Topic, as in the page's markers -> flags in the order of the table.
TOPICS = {
    "model": "model_name_or_path vision_path llm_path mlp_path conv_style vision_select_layer down_sample_ratio "
    "ps_version drop_path_rate allow_pickle",
    "trainable": "freeze_backbone freeze_mlp freeze_llm use_backbone_lora use_mlp_lora use_llm_lora "
    "unfreeze_vit_layers unfreeze_lm_head train_new_tokens merge_before_training",
    "parts": "backbone_lora_alpha backbone_lora_dropout backbone_lora_targets backbone_lora_layers "
    "backbone_lora_variant backbone_lr backbone_weight_decay backbone_loraplus_lr_ratio backbone_layer_decay "
    "mlp_lora_alpha mlp_lora_dropout mlp_lora_targets mlp_lora_variant mlp_lr mlp_weight_decay mlp_loraplus_lr_ratio "
    "llm_lora_alpha llm_lora_dropout llm_lora_targets llm_lora_layers llm_lora_variant llm_lr llm_weight_decay "
    "llm_loraplus_lr_ratio",
    "memory": "grad_checkpoint vit_grad_checkpoint grad_checkpoint_ratio grad_checkpoint_keep quantize_backbone "
    "quantize_llm lora_fp32 compile use_liger",
    "data": "meta_path max_seq_length force_image_size dynamic_image_size use_thumbnail min_dynamic_patch "
    "max_dynamic_patch min_num_frame max_num_frame max_image_pixels image_background upstream_image_decoding "
    "normalize_type pad2square group_by_length use_data_resampling max_bad_samples keep_surplus_placeholders "
    "accept_changed_data allow_outside_root",
    "packing": "use_packed_ds max_packed_tokens num_images_expected strict_mode allow_overflow loss_reduction "
    "loss_reduction_all_gather",
    "evaluation": "eval_meta_path eval_share eval_num_samples eval_max_new_tokens eval_base_answers "
    "early_stopping_patience early_stopping_threshold",
    "loop": "warmup_ratio overwrite_output_dir do_train save_full_model no_smoke_save evaluation_strategy "
    "ddp_find_unused_parameters logging_nan_inf_filter log_level log_level_replica optim use_cpu",
    "faults": "ddp_timeout save_on_signal_seconds store_retry_seconds max_skipped_steps skip_above_grad_norm "
    "watchdog_factor watchdog_seconds",
    "preference": "loss_type beta sigmoid_loss_weight bco_pair_loss_weight rpo_alpha label_smoothing reference_free",
    "ignored": "max_buffer_size log_freq replacement split_annotations use_fast_tokenizer use_custom_flash_attn "
    "remove_unused_columns",
}


def read_flags() -> dict[str, tuple[object, str]]:
    """Read default and description of every flag that the package declares."""
    from internvl.arguments.preference import PREFERENCE_ARGUMENTS

    flags = {}
    for declaring_class in {base for cls in PREFERENCE_ARGUMENTS for base in cls.__mro__}:
        if declaring_class.__module__.startswith("internvl."):
            own = vars(declaring_class).get("__annotations__", {})
            for field in fields(declaring_class):
                if field.name in own:
                    flags[field.name] = (field.default, field.metadata["help"])
    return flags


def format_default(name: str, default: object) -> str:
    if name == "use_cpu":
        return "without CUDA"  # the default depends on the machine
    if default is None or default is MISSING:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def format_flags(names: list[str], flags: dict[str, tuple[object, str]]) -> str:
    """Format a table of flags."""
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for name in names:
        default, description = flags[name]
        # Where None stands for something else, the description names it.
        meaning_of_none = ""
        if default is None:
            description, _, meaning_of_none = description.partition("; default: ")
        shown = escape(meaning_of_none) or format_default(name, default)
        lines.append(f"| `--{name}` | {shown} | {escape(description)} |")
    return "\n".join(lines)


def format_unsupported() -> str:
    """Format a table of transformers' flags that are not supported."""
    from internvl.arguments.unsupported_flags import REMOVED_FLAGS, UNSUPPORTED

    rows = [(name, reason) for name, reason in UNSUPPORTED.items()]
    rows += [(name, f"removed in transformers 5: {advice}") for name, advice in REMOVED_FLAGS.items()]
    lines = ["| flag | reason, or what to use |", "| --- | --- |"]
    return "\n".join(lines + [f"| `--{name}` | {escape(reason)} |" for name, reason in sorted(rows)])


def escape(text: str) -> str:
    """Escape Markdown and mark flags as code."""
    text = text.replace("|", "\\|").replace("<", "\\<").replace("*.", "\\*.")
    return re.sub(r"--\w+( True| False| [\w.]+\.json)?", r"`\g<0>`", text)


def fill_tables(page: str) -> str:
    """Replace the tables between `<!-- flags: TOPIC -->` and `<!-- end -->`."""
    flags = read_flags()
    tables = {topic: format_flags(names.split(), flags) for topic, names in TOPICS.items()}
    tables["unsupported"] = format_unsupported()
    return re.sub(
        r"(<!-- flags: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(fill_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
