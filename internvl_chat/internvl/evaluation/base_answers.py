"""Answers of the base model to general prompts, whose loss during training shows what is forgotten.

    --eval_base_answers META    "split": "base_answers"    recorded answers, used as they are
                                other datasets             prompts, answered once, before the first step

Recorded answers are in `OUTPUT_DIR/evaluation/base_answers`: a JSONL file for each dataset, and `meta.json`, which
other runs and `tools/evaluate.py` accept, too.
"""

import logging
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import CUT_CHARACTER, UnusableSample
from internvl.data.file_io import is_remote
from internvl.data.schema import BASE_ANSWERS_SPLIT, get_turns, load_meta
from internvl.data.skipped_samples import SkippedSampleReport, count_max_skipped_samples
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.dist_utils import run_on_rank_0
from internvl.evaluation.answers import answer_questions, draw_samples
from internvl.evaluation.evaluation_data import open_datasets
from internvl.evaluation.model_mode import disabled_adapters
from internvl.evaluation.questions import split_reference
from internvl.evaluation.results import EVALUATION_DIR, format_json, write_lines
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import is_adapter_parameter, is_peft_model
from internvl.planning.packed_dataset import PackedDataset

logger = logging.getLogger(__name__)
META_FILE = "meta.json"


def get_base_answers_dir(output_dir: str | Path) -> Path:
    """Return where a run records the answers of its base model."""
    return Path(output_dir) / EVALUATION_DIR / "base_answers"


def prepare_base_answers(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    meta_path: str,
    output_dir: str | Path,
    data_args: DataTrainingArguments,
    settings: EvaluationSettings,
    has_trained: bool,
) -> dict[str, dict]:
    """Find or record the base model's answers to prompts. A collective.

    Answers are recorded before the first step. A run that resumes finds them.

    Args:
        model: not wrapped by an engine, on its device.
        settings: `num_samples` limits the prompts of each dataset.
        has_trained: whether steps have been trained.

    Returns:
        Name -> meta entry of recorded answers, for `build_evaluation_data`.

    Raises:
        ValueError: the meta file is invalid, or answers are missing and the base model exists no more.
    """
    entries, folder = load_meta(meta_path), get_base_answers_dir(output_dir)
    recorded = {name: entry for name, entry in entries.items() if entry.get("split") == BASE_ANSWERS_SPLIT}
    prompts = {name: entry for name, entry in entries.items() if name not in recorded}
    if not prompts:
        return recorded
    found = run_on_rank_0(lambda: read_recorded_answers(folder)) if has_trained else {}
    if not prompts.keys() <= found.keys():
        with as_base_model(model, has_trained, meta_path):
            found = record_base_answers(model, tokenizer, prompts, folder, data_args, settings)
    return recorded | {name: found[name] for name in prompts}


def read_recorded_answers(folder: Path) -> dict[str, dict]:
    """Read the meta entries of recorded answers; empty without any."""
    file = folder / META_FILE
    if not file.is_file():
        return {}
    # The folder may have been moved since.
    return {
        name: {**entry, "annotation": str(folder / Path(entry["annotation"]).name)}
        for name, entry in load_meta(str(file)).items()
    }


def as_base_model(model: InternVLChatModel, has_trained: bool, meta_path: str) -> AbstractContextManager:
    """Make a context in which the model is the base model.

    Raises:
        ValueError: that model cannot be restored.
    """
    advice = (
        f"pass in --eval_base_answers {meta_path} answers that a new run has recorded "
        "(OUTPUT_DIR/evaluation/base_answers/meta.json), or start this run anew."
    )
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if has_trained and not all(map(is_adapter_parameter, trainable)):
        raise ValueError(f"the base model's answers are missing, and its own weights have been trained since: {advice}")
    if any(settings["variant"] == "pissa" for settings in (model.config.lora_settings or {}).values()):
        # PiSSA subtracts its initial adapters from the base weights, which are complete only together with them.
        configs = [config for part in filter(is_peft_model, model.children()) for config in part.peft_config.values()]
        is_new = any(getattr(config, "init_lora_weights", None) == "pissa" for config in configs)
        if has_trained or not is_new:
            raise ValueError(f"the base model's answers are missing, and PiSSA has changed its weights: {advice}")
        return nullcontext()
    return disabled_adapters(model)


def record_base_answers(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, dict],
    folder: Path,
    data_args: DataTrainingArguments,
    settings: EvaluationSettings,
) -> dict[str, dict]:
    """Answer prompts and write the answers. A collective.

    A record may end with a question; answers at its end are ignored.

    Args:
        prompts: name -> meta entry.

    Returns:
        Name -> meta entry of the recorded answers.

    Raises:
        ValueError: more prompts than --max_bad_samples are unusable.
    """
    datasets = open_datasets(prompts, tokenizer, model.num_image_token, data_args)
    packed = PackedDataset(datasets)
    parts = [range(end - len(dataset), end) for dataset, end in zip(datasets, packed.ends, strict=True)]
    samples = [
        sample
        for name, part in zip(prompts, parts, strict=True)
        for sample in draw_samples(name, part, settings.num_samples)
    ]
    answers = answer_questions(model, tokenizer, packed, samples, settings)
    SkippedSampleReport([], count_max_skipped_samples(data_args, len(samples))).add(answers.skipped)

    def write() -> dict[str, dict]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META_FILE).unlink(missing_ok=True)  # it is written last: where it is, all files are complete
        entries = {}
        for dataset, part in zip(datasets, parts, strict=True):
            texts = {sample - part.start: text for sample, text in answers.texts.items() if sample in part}
            entries[dataset.ds_name] = write_answers(dataset, texts, folder / name_file(dataset.ds_name, len(entries)))
        write_lines(folder / META_FILE, [format_json(entries, indent=2)])
        return entries

    return run_on_rank_0(write)


def write_answers(dataset: LazySupervisedDataset, answers: Mapping[int, str], file: Path) -> dict:
    """Write records with their answers, without those that evaluation could not use.

    Args:
        answers: by index of the sample.

    Returns:
        The meta entry.
    """
    records = [build_answered_record(dataset, index, text) for index, text in answers.items()]
    root = dataset.root if is_remote(dataset.root) else os.path.abspath(dataset.root)
    entry = {"root": root, "annotation": str(file.absolute()), "split": BASE_ANSWERS_SPLIT}
    if "max_dynamic_patch" in dataset.meta:
        entry["max_dynamic_patch"] = dataset.meta["max_dynamic_patch"]
    write_lines(file, map(format_json, records))
    written = LazySupervisedDataset(
        dataset.ds_name, entry, dataset.tokenizer, dataset.num_image_token, dataset.data_args
    )
    usable = [record for index, record in enumerate(records) if is_measurable(written, index)]
    if not usable:
        raise ValueError(f"dataset {dataset.ds_name} of --eval_base_answers has no prompt with a usable answer.")
    if len(usable) < len(records):
        write_lines(file, map(format_json, usable))
    logger.info("Base answers: %d of %d recorded in %s", len(usable), len(records), file)
    return entry


def build_answered_record(dataset: LazySupervisedDataset, index: int, text: str) -> dict[str, Any]:
    """Build the record of a sample with this text as its last answer."""
    record = dataset.read_record(index)
    turns, _ = split_reference(get_turns(record))
    used = {key: record[key] for key in dataset.known_keys if key in record}
    answer = text.rstrip(CUT_CHARACTER)
    return {**used, "conversations": [*turns, {"from": "gpt", "value": answer}]}


def is_measurable(dataset: LazySupervisedDataset, index: int) -> bool:
    """Check whether an answer has loss tokens.

    An empty one, or one with `<image>`, may have none.
    """
    try:
        dataset.measure(index)
    except UnusableSample:
        return False
    return True


def name_file(set_name: str, position: int) -> str:
    """Return the name of the file with a dataset's answers."""
    return f"{set_name}.jsonl" if re.fullmatch(r"\w[\w.-]{0,99}", set_name, re.ASCII) else f"dataset-{position}.jsonl"
