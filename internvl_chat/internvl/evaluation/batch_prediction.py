"""Answer all questions of a file, and write them as annotation lines.

    {"image": "/data/a.png", "conversations": [human, gpt], "references": [...], "prediction": ...}

Lines are appended after every few batches. A run that was interrupted asks only what has no answer yet.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import UnusableSample, shorten
from internvl.data.foreign_keys import ABSENT_VALUES, MEDIA_KINDS
from internvl.data.schema import load_meta
from internvl.dist_utils import get_rank, get_world_size, run_on_rank_0
from internvl.evaluation.answers import answer_questions
from internvl.evaluation.evaluation_data import open_datasets
from internvl.evaluation.questions import list_references, split_reference
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.internvl_chat import InternVLChatModel
from internvl.planning.packed_dataset import PackedDataset
from internvl.progress import Progress

BATCHES_PER_WRITE = 8  # on each rank


class PredictionCounts(NamedTuple):
    """Numbers of questions, and the unusable records with their reasons."""

    num_answered: int
    num_answered_before: int
    skipped: list[str]


def predict_file(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    input_path: str,
    output: Path,
    data_args: DataTrainingArguments,
    settings: EvaluationSettings,
) -> PredictionCounts:
    """Answer a file, and append the records with their answers. A collective.

    Args:
        input_path: a meta file (.json), or one annotation file, whose images are relative to its folder.

    Raises:
        ValueError: the input is invalid, or the output has answers to other questions.
    """
    dataset = open_input(input_path, tokenizer, model.num_image_token, data_args)
    answered = run_on_rank_0(lambda: read_answered_samples(dataset, input_path, output))
    samples, skipped = [sample for sample in range(len(dataset)) if sample not in answered], []
    num_samples_per_write = settings.batch_size * get_world_size() * BATCHES_PER_WRITE
    num_answered = 0
    with Progress(len(samples), "Answering", "question", is_shown=get_rank() == 0) as progress:
        for start in range(0, len(samples), num_samples_per_write):
            chunk = samples[start : start + num_samples_per_write]
            answers = answer_questions(model, tokenizer, dataset, chunk, settings, shows_progress=False)
            records = (build_line(dataset, sample, text) for sample, text in answers.texts.items())
            run_on_rank_0(lambda records=records: append_lines(output, records))
            num_answered, skipped = num_answered + len(answers.texts), skipped + answers.skipped
            progress.update(len(chunk))
    return PredictionCounts(num_answered, len(answered), skipped)


def open_input(
    path: str, tokenizer: PreTrainedTokenizerBase, num_image_token: int, data_args: DataTrainingArguments
) -> PackedDataset:
    """Open the datasets of a meta file, or one annotation file."""
    entry = {"root": os.path.dirname(os.path.abspath(path)), "annotation": path}
    meta = load_meta(path) if path.lower().endswith(".json") else {Path(path).stem: entry}
    return PackedDataset(open_datasets(meta, tokenizer, num_image_token, data_args))


# -- output ------------------------------------------------------------------------------------------------------------


def build_line(dataset: PackedDataset, sample: int, text: str) -> dict:
    """Build the annotation line of an answered sample.

    It keeps the record's keys. Paths of images become absolute, so any root that contains them is valid.
    """
    source, index = dataset.locate(sample)
    record = source.read_record(index)
    turns, reference = split_reference(source.list_conversations(record)[0])
    references = list_references(record, reference)
    line: dict[str, Any] = dict(record)
    if paths := source.list_media_paths(index):
        [key] = [key for key in MEDIA_KINDS if record.get(key) not in ABSENT_VALUES]
        line[key] = paths if isinstance(record[key], list) else paths[0]
    return {
        **line,
        "conversations": [*turns, {"from": "gpt", "value": text}],
        **({"references": references} if references else {}),
        "prediction": text,
        "set": source.ds_name,
        "line": source.line_number(index),
    }


def append_lines(file: Path, records: Iterator[dict]) -> None:
    """Append records to a JSONL file; after an error it is as before."""
    content = "".join(f"{json.dumps(record, ensure_ascii=False, default=str)}\n" for record in records).encode()
    with open(file, "ab", buffering=0) as opened:
        size = opened.tell()
        try:
            while content:
                content = content[opened.write(content) :]
            os.fsync(opened.fileno())
        except BaseException:
            opened.truncate(size)
            raise


def read_answered_samples(dataset: PackedDataset, input_path: str, output: Path) -> set[int]:
    """Return the samples whose answers are in the output already.

    A last line that a killed process left incomplete is removed.

    Raises:
        ValueError: a line answers no question of the input.
    """
    if not output.exists():
        return set()
    samples = {}
    for sample in range(len(dataset)):
        source, index = dataset.locate(sample)
        samples[f"{source.line_number(index)} {source.ds_name}"] = sample
    answered = set()
    with open(output, "r+b") as file:
        for number, content in enumerate(iter(file.readline, b""), start=1):
            if not content.endswith(b"\n"):
                file.truncate(file.tell() - len(content))
                break
            line = parse_line(content)
            sample = samples.get(f"{line.get('line')} {line.get('set')}")
            if sample is None or not has_same_question(dataset, sample, line):
                raise ValueError(
                    f"line {number} of --output {output} is no answer to {input_path}, got {shorten(line or content)}: "
                    "choose another file, or remove this one."
                )
            answered.add(sample)
    return answered


def parse_line(content: bytes) -> dict:
    """Parse a line; empty if it is no JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def has_same_question(dataset: PackedDataset, sample: int, line: dict) -> bool:
    """Check whether a line of the output answers a sample's question."""
    source, index = dataset.locate(sample)
    try:
        turns, _ = split_reference(source.list_conversations(source.read_record(index))[0])
        answered_turns, _ = split_reference(source.list_conversations(line)[0])
    except UnusableSample:
        return False
    return list(turns) == list(answered_turns)
