"""What a changed flag does when a run resumes.

`RULES` has one rule for each flag, `DATASET_RULES` one for each setting of a dataset in the meta file. Each checkpoint
holds those of its run in `flags.json`. A run that resumes logs the differences, and refuses those that the checkpoint
does not allow:

    {"flags": {"learning_rate": 2e-05, ...}, "datasets": {"digits": {"data_augment": true, ...}, ...},
     "world_size": 8, "versions": {"internvl": "0.1.0", "torch": "2.14.1", ...},
     "base_model": {"path": ..., "fingerprint": ...} or null,
     "changes": [{"from": "checkpoint-400", "flags": {"learning_rate": [2e-05, 1e-05]}}, ...]}
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from internvl import __version__
from internvl.arguments.deepspeed_config import get_zero_stage
from internvl.arguments.unsupported_flags import UNSUPPORTED
from internvl.checkpoint.saved_states import one_line_state_errors
from internvl.constants import escape_control_characters
from internvl.data.schema import TRAIN_SPLIT, is_trained, load_meta, validate_meta_entry
from internvl.dist_utils import get_world_size, run_on_rank_0
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import is_adapter_checkpoint
from internvl.model.internvl_chat.lora_mixin import get_lora_settings
from internvl.model.lora import LORA_RANK_FIELDS, PART_FLAGS
from internvl.regular_files import read_json_object

logger = logging.getLogger(__name__)
FLAGS_FILE = "flags.json"
RUN_FILE = "run.json"  # in the output folder from the start: FLAGS_FILE and more
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes")

# -- rules -------------------------------------------------------------------------------------------------------------

TAKEN = "taken from the command line"
PLANNED = "taken from the command line; the rest of the epoch is planned again"
DATA = "changed samples require --accept_changed_data True"
BASE_MODEL = "weights are checked by their fingerprint"
ADAPTERS = "must equal the setting of the checkpoint's adapters"
MUST_MATCH = "must equal the checkpoint's value"
NO_EFFECT = "no effect on the result"

_FLAGS_OF_RULES = {
    TAKEN: """
        learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
        lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio num_train_epochs max_steps
        backbone_lr mlp_lr llm_lr backbone_weight_decay mlp_weight_decay llm_weight_decay
        backbone_loraplus_lr_ratio mlp_loraplus_lr_ratio llm_loraplus_lr_ratio backbone_layer_decay
        backbone_lora_dropout mlp_lora_dropout llm_lora_dropout drop_path_rate neftune_noise_alpha
        loss_reduction loss_reduction_all_gather rpo_alpha label_smoothing sigmoid_loss_weight bco_pair_loss_weight
        seed data_seed max_bad_samples max_skipped_steps skip_above_grad_norm save_full_model deepspeed
        eval_meta_path eval_base_answers eval_num_samples eval_max_new_tokens
        early_stopping_patience early_stopping_threshold eval_strategy eval_steps eval_delay metric_for_best_model
        greater_is_better load_best_model_at_end""",
    PLANNED: """
        per_device_train_batch_size gradient_accumulation_steps group_by_length use_packed_ds max_packed_tokens
        num_images_expected""",
    DATA: """
        meta_path max_seq_length dynamic_image_size use_thumbnail min_dynamic_patch max_dynamic_patch min_num_frame
        max_num_frame use_data_resampling allow_overflow allow_outside_root keep_surplus_placeholders
        max_image_pixels eval_share""",
    BASE_MODEL: "model_name_or_path vision_path llm_path mlp_path",
    ADAPTERS: """
        backbone_lora_alpha mlp_lora_alpha llm_lora_alpha backbone_lora_targets mlp_lora_targets llm_lora_targets
        backbone_lora_layers llm_lora_layers backbone_lora_variant mlp_lora_variant llm_lora_variant""",
    MUST_MATCH: """
        use_backbone_lora use_mlp_lora use_llm_lora freeze_backbone freeze_mlp freeze_llm unfreeze_vit_layers
        unfreeze_lm_head train_new_tokens quantize_backbone quantize_llm merge_before_training
        conv_style force_image_size down_sample_ratio vision_select_layer ps_version normalize_type
        upstream_image_decoding image_background pad2square
        bf16 fp16 lora_fp32 optim optim_args loss_type beta reference_free""",
    NO_EFFECT: """
        output_dir overwrite_output_dir resume_from_checkpoint do_train accept_changed_data allow_pickle
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout
        local_rank use_cpu tf32 full_determinism
        grad_checkpoint vit_grad_checkpoint grad_checkpoint_ratio grad_checkpoint_keep gradient_checkpointing
        gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs compile use_liger
        torch_empty_cache_steps skip_memory_metrics debug store_retry_seconds
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context remove_unused_columns label_names strict_mode
        logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
        log_level_replica log_freq disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
        trackio_static_space_id logging_dir
        save_strategy save_steps save_total_limit save_only_model save_on_each_node no_smoke_save
        restore_callback_states_from_checkpoint save_on_signal_seconds watchdog_factor watchdog_seconds
        push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
        evaluation_strategy eval_on_start do_eval per_device_eval_batch_size
        max_buffer_size replacement split_annotations use_fast_tokenizer use_custom_flash_attn""",
}
RULES = {flag: rule for rule, names in _FLAGS_OF_RULES.items() for flag in names.split()}

# Fields of `vision_config` and `llm_config` that flags, the tokenizer or the environment set.
FIELDS_OF_RUN = set(
    "attn_implementation drop_path_rate dtype image_size torch_dtype transformers_version use_cache use_flash_attn "
    "vocab_size".split()
)
MOVED = "files may have moved: samples are recognized by their records"
# Setting of a dataset in the meta file -> its rule.
DATASET_RULES = {
    "root": MOVED,
    "annotation": MOVED,
    "repeat_time": DATA,
    "data_augment": DATA,
    "max_dynamic_patch": DATA,
    "length": NO_EFFECT,
    "split": DATA,
    "metric": NO_EFFECT,
    "scorer": NO_EFFECT,
}


# -- flags of a run ----------------------------------------------------------------------------------------------------


def collect_flags(*arguments: Any) -> dict[str, Any]:
    """Collect the flags of parsed arguments by name, JSON-serializable.

    Flags that have only one supported value, and secrets, are left out.
    """
    flags = {field.name: getattr(args, field.name) for args in arguments for field in fields(args)}
    kept = {name: value for name, value in flags.items() if name not in UNSUPPORTED and not name.endswith("_token")}
    return json.loads(json.dumps(kept, default=str))


class RunRecord:
    """The flags of a run, and how they changed when it resumed.

    Args:
        arguments: the parsed arguments. Their classes are in `classes`.
    """

    def __init__(self, *arguments: Any):
        self.classes = tuple(type(one) for one in arguments)
        self.flags = collect_flags(*arguments)
        meta_path = self.flags["meta_path"]
        self.datasets = load_meta(meta_path) if meta_path else {}
        for name, entry in self.datasets.items():
            validate_meta_entry(name, entry)
        self.changes: list[dict] = []

    def save(self, folder: Path, base_checkpoint: dict | None) -> None:
        """Write `flags.json`.

        Args:
            base_checkpoint: of the model.
        """
        (folder / FLAGS_FILE).write_text(json.dumps(self.describe(base_checkpoint), indent=2) + "\n")

    def describe(self, base_checkpoint: dict | None) -> dict:
        """Return the content of `flags.json`."""
        record = {"flags": self.flags, "datasets": self.datasets, **describe_environment()}
        return record | {"base_model": base_checkpoint, "changes": self.changes}

    def resume_from(self, checkpoint: Path) -> None:
        """Log how flags and dataset settings differ from a checkpoint's.

        A collective.

        Raises:
            ValueError: a flag differs that must equal the checkpoint's; or a setting that changes samples, without
                --accept_changed_data.
        """
        record = run_on_rank_0(lambda: read_flags_file(checkpoint))
        if not record:
            logger.warning("%s has no %s: it is unknown which flags differ", checkpoint, FLAGS_FILE)
            return
        changed = find_changes(record["flags"], self.flags)
        refused = {name: values for name, values in changed.items() if RULES[name] == MUST_MATCH}
        if refused:
            raise make_refusal(checkpoint, refused)
        changed_data = find_dataset_changes(record, {"flags": self.flags, "datasets": self.datasets})
        if not self.flags["accept_changed_data"]:
            refuse_changed_samples(checkpoint, changed_data)
        environment = {**describe_environment()["versions"], "ranks": get_world_size()}
        before = {**record["versions"], "ranks": record["world_size"]}
        lines = [f"{change} ({change.rule})" for change in changed_data]
        if lines := [*lines, *format_changes(changed, find_changes(before, environment))]:
            logger.info("Resuming with other settings:\n%s", "\n".join(f"  {line}" for line in lines))
        self.changes = record["changes"]
        acting = {name: values for name, values in changed.items() if RULES[name] != NO_EFFECT}
        settings = {f"{change.dataset}: {change.setting}": change.values for change in changed_data}
        if acting or settings:
            datasets = {"datasets": settings} if settings else {}
            self.changes = [*self.changes, {"from": checkpoint.name, "flags": acting, **datasets}]

    def equals(self, folder: Path) -> bool:
        """Check whether a run of the same settings wrote a folder."""
        record = read_flags_file(folder)
        if record is None:
            return False
        changed = find_changes(record["flags"], self.flags)
        has_same_flags = all(RULES[name] == NO_EFFECT for name in changed)
        return has_same_flags and record["datasets"] == self.datasets


def describe_environment() -> dict:
    """Return the number of ranks and the versions of this package and the libraries."""
    versions = {"internvl": __version__}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:  # an optional library
            continue
    return {"world_size": get_world_size(), "versions": versions}


def read_flags_file(checkpoint: Path) -> dict | None:
    """Read `flags.json` of a checkpoint; None if an earlier version wrote the checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    file = checkpoint / FLAGS_FILE
    if not file.exists():
        return None
    record = read_json_object(file)
    record.setdefault("datasets", {})  # an earlier version did not write them
    if error := _find_flags_file_error(record):
        raise ValueError(f"{file} is invalid: {error}.")
    return record


def _find_flags_file_error(record: dict) -> str | None:
    kinds = {"flags": dict, "datasets": dict, "world_size": int, "versions": dict, "changes": list}
    for key, kind in kinds.items():
        if type(record.get(key)) is not kind:
            return f"{key} is {record.get(key)!r:.80}, expected a JSON {kind.__name__}"
    for name, entry in record["datasets"].items():
        if not isinstance(entry, dict):
            return f"datasets.{name!r:.80} is {entry!r:.80}, expected a JSON dict"
    for number, change in enumerate(record["changes"]):
        is_valid = isinstance(change, dict) and isinstance(change.get("from"), str)
        if not (is_valid and isinstance(change.get("flags"), dict)):
            return f"changes[{number}] is {change!r:.80}, expected an object with from and flags"
    base = record.get("base_model")
    is_base = isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("path", "fingerprint"))
    if base is not None and not is_base:
        return f"base_model is {base!r:.80}, expected its path and fingerprint"
    return None


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list]:
    """Return name -> [before, now] of the values that differ, of names in both."""
    return {name: [before[name], value] for name, value in now.items() if name in before and before[name] != value}


def format_changes(flags: dict[str, list], environment: dict[str, list]) -> list[str]:
    """Format changes: a line per flag with an effect, one for the others."""
    lines = [f"{format_change(n, values)} ({RULES[n]})" for n, values in flags.items() if RULES[n] != NO_EFFECT]
    for name, (before, now) in environment.items():
        effect = "the rest of the epoch is planned again" if name == "ranks" else "results may differ by rounding"
        lines.append(f"{name} {escape_control_characters(f'{before!s:.80}')} -> {now} ({effect})")
    # These differ by design, or in most runs that resume from a certain checkpoint.
    silent = {"resume_from_checkpoint", "overwrite_output_dir", "accept_changed_data", "run_name", "local_rank"}
    others = [f"--{name}" for name in flags if RULES[name] == NO_EFFECT and name not in silent]
    return [*lines, *([f"{', '.join(others)} ({NO_EFFECT})"] if others else [])]


def format_change(flag: str, values: list) -> str:
    if flag == "deepspeed":
        has_block = [isinstance(value, dict) and isinstance(value.get("zero_optimization"), dict) for value in values]
        values = [f"ZeRO-{get_zero_stage(v)}" if has else v for v, has in zip(values, has_block, strict=True)]
    return f"--{flag} {_format_values(values)}"


def _format_values(values: list) -> str:
    return " -> ".join(escape_control_characters(f"{value!s:.80}") for value in values)


def make_refusal(checkpoint: Path, changes: dict[str, list]) -> ValueError:
    """Create the error for flags that must equal the checkpoint's."""
    listed = ", ".join(format_change(flag, values) for flag, values in changes.items())
    return ValueError(
        f"{listed}: not supported when resuming from {checkpoint}. Keep the value, or start a new run from the "
        f"trained model: --model_name_or_path {checkpoint} and another --output_dir."
    )


# -- settings of datasets ----------------------------------------------------------------------------------------------


class DatasetChange(NamedTuple):
    """A setting of a dataset that differs from the checkpoint's: [before, now]."""

    dataset: str
    setting: str
    values: list

    def __str__(self) -> str:
        return f"dataset {self.dataset}: {self.setting} {_format_values(self.values)}"

    @property
    def rule(self) -> str:
        return DATASET_RULES[self.setting]


def find_dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[DatasetChange]:
    """Find the settings of datasets that differ and have an effect.

    Datasets are compared by name, renamed ones by their annotation file. Whether one is new or removed is told from the
    samples.

    Args:
        before, now: `flags` and `datasets` of `flags.json`.
    """
    changes = []
    by_file = {str(entry.get("annotation")): entry for entry in before["datasets"].values()}
    for name, entry in now["datasets"].items():
        entry_before = before["datasets"].get(name) or by_file.get(entry["annotation"]) or entry
        if entry_before == entry:  # --max_dynamic_patch has its own rule
            continue
        settings = [
            {"repeat_time": 1, "data_augment": False, "split": TRAIN_SPLIT}
            | {"max_dynamic_patch": record["flags"].get("max_dynamic_patch")}
            | settings
            for record, settings in ((before, entry_before), (now, entry))
        ]
        found = [DatasetChange(name, key, values) for key, values in find_changes(*settings).items()]
        if any(map(is_trained, settings)):
            changes += [change for change in found if change.rule != NO_EFFECT]
    return changes


def refuse_changed_samples(checkpoint: Path, changes: list[DatasetChange]) -> None:
    """Raise a ValueError if settings of datasets change samples."""
    if listed := [str(change) for change in changes if change.rule == DATA]:
        raise ValueError(
            f"The data has changed since {checkpoint} was written: {'; '.join(listed)}. --accept_changed_data True "
            "resumes with the new settings; --overwrite_output_dir True starts from the beginning."
        )


# -- the model that a run resumes --------------------------------------------------------------------------------------


def check_model(checkpoint: Path, model: InternVLChatModel, needs_base: bool) -> None:
    """Check that a model has the adapters and the base checkpoint of a run. A collective.

    It holds for checkpoints without `flags.json`, too. A base checkpoint at another path is the same if its weights
    are.

    Args:
        needs_base: whether the result depends on the base checkpoint although the checkpoint holds all weights.

    Raises:
        ValueError: they differ.
    """
    record = run_on_rank_0(lambda: read_flags_file(checkpoint)) or {}
    config = InternVLChatConfig.from_pretrained(checkpoint)
    check_adapter_settings(checkpoint, config, model.config)
    for change in find_part_changes(config, model.config):
        logger.warning("The config.json of the base model has changed since %s was written: %s", checkpoint, change)
    has_adapters_only = is_adapter_checkpoint(checkpoint)
    expected = config.base_model if has_adapters_only else record.get("base_model")
    own = model.base_checkpoint
    if not expected or _drop_path(expected) == _drop_path(own or {}):
        return
    found = f"the fingerprint {own['fingerprint'][:12]}..." if own else "no base checkpoint"
    difference = (
        f"{checkpoint} was trained on another base model: expected {expected['path']} with the fingerprint "
        f"{expected['fingerprint'][:12]}..., got {own['path'] if own else 'composed weights'} with {found}"
    )
    if has_adapters_only or needs_base:
        raise ValueError(f"{difference}. Pass that base model, which may have moved, or choose another --output_dir.")
    logger.warning("%s. The run resumes with the weights of the checkpoint.", difference)


def check_adapter_settings(checkpoint: Path, before: InternVLChatConfig, now: InternVLChatConfig) -> None:
    """Raise a ValueError if the adapters of a part differ from a checkpoint's."""
    changes = {}
    for part, rank_flag in LORA_RANK_FIELDS.items():
        ranks = [getattr(before, rank_flag), getattr(now, rank_flag)]
        if ranks[0] != ranks[1]:
            changes[rank_flag] = ranks
        elif ranks[0]:
            with one_line_state_errors(checkpoint / "config.json"):
                settings = [json.loads(json.dumps(asdict(get_lora_settings(config, part)))) for config in (before, now)]
            found = find_changes(*settings)
            changes |= {f"{PART_FLAGS[part]}_lora_{name}": found[name] for name in found if name != "dropout"}
    if changes:
        raise make_refusal(checkpoint, changes)


def find_part_changes(before: InternVLChatConfig, now: InternVLChatConfig) -> list[str]:
    """List the fields of vision encoder and LLM that differ and no flag sets.

    The fingerprint of a base checkpoint covers its weights only. Another version of transformers may have other
    defaults.
    """
    changes = []
    fields_before, fields_now = (json.loads(json.dumps(config.to_dict(), default=str)) for config in (before, now))
    for part in ("vision_config", "llm_config"):
        found = find_changes(fields_before[part], fields_now[part])
        changes += [f"{part}.{key} {_format_values(found[key])}" for key in sorted(found.keys() - FIELDS_OF_RUN)]
    return changes


def _drop_path(base_checkpoint: dict) -> dict:
    return {name: value for name, value in base_checkpoint.items() if name != "path"}
