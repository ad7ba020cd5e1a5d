"""Evaluation sets: opened, measured, and recognized in the training data.

    --eval_meta_path FILE              every dataset of the file
    --meta_path, "split": "eval"       datasets that are not trained
    --eval_share 0.02                  records that are held out of each trained dataset      planning/measured_data.py

Samples are those of training, without random choices: no augmentation, middle frames of videos, every record once.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.evaluation import EvaluationArguments
from internvl.constants import UnusableSample
from internvl.data.preference_dataset import PreferenceDataset
from internvl.data.schema import BASE_ANSWERS_SPLIT, EVAL_SPLIT, is_trained, load_meta, validate_meta_entry
from internvl.data.skipped_samples import (
    SkippedSample,
    SkippedSampleReport,
    count_max_skipped_samples,
    describe_skipped,
    report_skipped_samples,
)
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size
from internvl.evaluation.questions import build_prediction_record, build_question
from internvl.evaluation.scores import find_record_error, get_metric, require_library
from internvl.planning.measured_data import MeasuredPart, join_parts, measure_datasets
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import RankGroup

EMPTY = np.empty(0, np.int64)


class EvaluationSet(NamedTuple):
    """How one dataset is evaluated.

    Attributes:
        name: in the keys of metrics: `eval/NAME/loss`.
        metric: of the generated answers, a key of `scores.METRICS`; None: only the loss is measured.
        scorer: "internvl" for InternVL's own reading of the metric; None for the benchmark's.
        split: "eval", or "base_answers": its loss is `eval/forgetting`, and no answers are generated.
    """

    name: str
    metric: str | None = None
    scorer: str | None = None
    split: str = EVAL_SPLIT


class EvaluationData(NamedTuple):
    """The samples of all evaluation sets and their measurements.

    Arrays are over all samples, in the order of `dataset`.

    Attributes:
        dataset: its i-th dataset is evaluated as the i-th of `sets`.
        lengths: (N,) of SAMPLE_LENGTHS; zeros where a sample is unusable.
        lost_loss_tokens: (N,) int32, loss tokens that are cut off at --max_seq_length.
        content_hashes: (N,) int64, see `hash_record`.
    """

    dataset: PackedDataset
    sets: list[EvaluationSet]
    lengths: np.ndarray
    lost_loss_tokens: np.ndarray = EMPTY
    content_hashes: np.ndarray = EMPTY
    skipped_samples: Sequence[SkippedSample] = ()

    def list_samples(self, position: int) -> list[int]:
        """List the evaluated samples of the set at a position of `sets`."""
        end = self.dataset.ends[position]
        start = end - len(self.dataset.datasets[position])
        return (start + np.flatnonzero(self.lengths["tokens"][start:end])).tolist()


def build_evaluation_data(
    data_args: DataTrainingArguments,
    args: EvaluationArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    held_out: Sequence[MeasuredPart] = (),
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
    untrained_tokens: Mapping[int, str] | None = None,
    is_checked: bool = True,
) -> EvaluationData | None:
    """Open and measure the evaluation sets of a run.

    A collective: all ranks call it.

    Args:
        held_out: records that `--eval_share` excludes from training, by dataset.
        untrained_tokens: see `LazySupervisedDataset`.
        is_checked: raise an error if too many samples are unusable.

    Returns:
        None if the flags name no evaluation set.

    Raises:
        ValueError: a meta file or a dataset is invalid, two sets have the same name, a set has no usable sample, or
            more samples than --max_bad_samples are unusable.
    """
    meta = collect_evaluation_sets(data_args, args)
    if not meta and not held_out:
        return None
    data = open_evaluation_data(meta, data_args, tokenizer, num_image_token, held_out, dataset_class, untrained_tokens)
    if is_checked:
        check_usable_samples(data, data_args)
    return data


def check_usable_samples(data: EvaluationData, data_args: DataTrainingArguments) -> None:
    """Log unusable samples.

    Raises:
        ValueError: more than --max_bad_samples are unusable, or all of a set.
    """
    for position, entry in enumerate(data.sets):
        if not data.list_samples(position):
            reasons = [str(sample) for sample in data.skipped_samples if sample.dataset == entry.name]
            raise ValueError(f"evaluation set {entry.name} has no usable sample: {'; '.join(reasons[:3]) or 'none'}.")
    report_skipped_samples(list(data.skipped_samples), data.lengths, data_args, "evaluation samples")


def make_skipped_report(data: EvaluationData, data_args: DataTrainingArguments) -> SkippedSampleReport:
    """Make a report of the skipped samples, to which those of evaluations are added."""
    max_skipped = count_max_skipped_samples(data_args, len(data.lengths))
    return SkippedSampleReport(map(str, data.skipped_samples), max_skipped)


def collect_evaluation_sets(data_args: DataTrainingArguments, args: EvaluationArguments) -> dict[str, dict]:
    """Collect the meta entries of the evaluation sets, without those of `--eval_base_answers`.

    Returns:
        Name -> entry.

    Raises:
        ValueError: a meta file or an entry is invalid, or two sets have the same name.
    """
    training = load_meta(data_args.meta_path) if data_args.meta_path else {}
    sources = {  # flag -> its sets
        "meta_path": {name: entry for name, entry in training.items() if not is_trained(entry)},
        "eval_meta_path": load_meta(args.eval_meta_path) if args.eval_meta_path else {},
        "eval_base_answers": load_meta(args.eval_base_answers) if args.eval_base_answers else {},
        "eval_share": {name: entry for name, entry in training.items() if is_trained(entry) and args.eval_share},
    }
    source_of: dict[str, str] = {}
    for flag, meta in sources.items():
        for name, entry in meta.items():
            validate_meta_entry(name, entry)
            if name in source_of:
                raise ValueError(
                    f"evaluation set {name} is in --{source_of[name]} and in --{flag}: rename or remove one of them."
                )
            source_of[name] = flag
    return sources["eval_meta_path"] | sources["meta_path"]


def open_evaluation_data(
    meta: Mapping[str, dict],
    data_args: DataTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    held_out: Sequence[MeasuredPart] = (),
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
    untrained_tokens: Mapping[int, str] | None = None,
) -> EvaluationData:
    """Open and measure evaluation sets, however many samples are unusable.

    A collective: all ranks call it.

    Args:
        meta: name -> meta entry; all of them are evaluated, whatever their split and `repeat_time`.
        held_out: further sets, measured already.
    """
    datasets = open_datasets(meta, tokenizer, num_image_token, data_args, dataset_class, untrained_tokens)
    sets = [make_evaluation_set(dataset) for dataset in (*datasets, *(part.dataset for part in held_out))]
    rank_group = RankGroup(get_rank(), get_world_size(), gather_objects)
    parts = [*measure_datasets(datasets, count_cores_per_rank(), rank_group), *held_out]
    joined = join_parts(parts)._asdict()
    del joined["digests"]
    return exclude_unscorable_samples(EvaluationData(**joined, sets=sets), rank_group)


def join_evaluation_data(data: EvaluationData, added: EvaluationData) -> EvaluationData:
    """Append evaluation sets to others."""
    both, names = (data, added), ("lengths", "lost_loss_tokens", "content_hashes")
    datasets = [dataset for one in both for dataset in one.dataset.datasets]
    # Those of the datasets include samples that are not evaluated.
    measured = [one.dataset.lengths for one in both if one.dataset.lengths is not None]
    return EvaluationData(
        dataset=PackedDataset(datasets, np.concatenate(measured)),
        sets=[entry for one in both for entry in one.sets],
        skipped_samples=[sample for one in both for sample in one.skipped_samples],
        **{name: np.concatenate([getattr(one, name) for one in both]) for name in names},
    )


def open_datasets(
    meta: Mapping[str, dict],
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    data_args: DataTrainingArguments,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
    untrained_tokens: Mapping[int, str] | None = None,
) -> list[LazySupervisedDataset]:
    """Open datasets for evaluation: each record once, without random choices.

    Args:
        meta: name -> meta entry.

    Raises:
        ValueError: an entry or a dataset is invalid.
    """
    for name, entry in meta.items():
        validate_meta_entry(name, entry)
    return [
        dataset_class(
            *(name, {**entry, "repeat_time": 1}, tokenizer, num_image_token, data_args),
            untrained_tokens=untrained_tokens,
        ).without_randomness()
        for name, entry in meta.items()
    ]


def make_evaluation_set(dataset: LazySupervisedDataset) -> EvaluationSet:
    """Read from the meta entry how a dataset is evaluated."""
    metric, scorer, name = dataset.meta.get("metric"), dataset.meta.get("scorer"), dataset.ds_name
    if dataset.meta.get("split") == BASE_ANSWERS_SPLIT:
        return EvaluationSet(name, split=BASE_ANSWERS_SPLIT)
    if metric and isinstance(dataset, PreferenceDataset):
        raise ValueError(f"dataset {name}: metric {metric} is not supported for preference pairs: remove it.")
    if metric:
        try:
            require_library(metric)
        except ValueError as error:
            raise ValueError(f"dataset {name}: {error}") from error
        if scorer and get_metric(metric).internvl_measure_fn is None:
            raise ValueError(
                f"dataset {name}: scorer {scorer} is not supported with metric {metric}, whose only reading is that of "
                "its benchmark: remove it."
            )
    return EvaluationSet(name, metric, scorer)


def exclude_unscorable_samples(data: EvaluationData, rank_group: RankGroup) -> EvaluationData:
    """Skip the samples that cannot be asked, or whose answer their metric cannot score.

    A collective: each rank reads its share.
    """
    samples = [
        (sample, entry.metric)
        for position, entry in enumerate(data.sets)
        if entry.metric
        for sample in data.list_samples(position)
    ]
    reasons_of_rank = {
        sample: reason
        for sample, metric in samples[rank_group.rank :: rank_group.world_size]
        if (reason := find_unscorable_reason(*data.dataset.locate(sample), metric))
    }
    gathered = rank_group.gather_fn(reasons_of_rank)
    reasons = {sample: reason for reasons in gathered for sample, reason in reasons.items()}
    lengths, lost_loss_tokens = data.lengths.copy(), data.lost_loss_tokens.copy()
    lengths[[*reasons]], lost_loss_tokens[[*reasons]] = 0, 0
    skipped = [describe_skipped(*data.dataset.locate(sample), reasons[sample]) for sample in sorted(reasons)]
    return data._replace(
        lengths=lengths, lost_loss_tokens=lost_loss_tokens, skipped_samples=[*data.skipped_samples, *skipped]
    )


def find_unscorable_reason(dataset: LazySupervisedDataset, index: int, metric: str) -> str | None:
    """Return why a sample has no question, or its answer no score; None if it has both."""
    try:
        build_question(dataset, index)
        error = find_record_error(metric, build_prediction_record(dataset, index, metric))
        return f"metric {metric} cannot score it: {error}" if error else None
    except UnusableSample as error:
        return str(error)
