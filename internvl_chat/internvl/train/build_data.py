"""Build the training data: open and measure all datasets."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.training import TrainingArguments
from internvl.constants import UnusableSample
from internvl.data.schema import is_trained, load_meta
from internvl.data.skipped_samples import SkippedSample, describe_skipped, report_skipped_samples
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size
from internvl.evaluation.evaluation_data import EvaluationData, build_evaluation_data
from internvl.evaluation.shared_records import find_shared_records
from internvl.planning.epoch_plan import SAMPLE_LENGTHS, PlanLayout, SampleCost
from internvl.planning.measured_data import MeasuredPart, hold_out, join_parts, measure_datasets
from internvl.planning.oversized_samples import SamplePiece, find_image_spans, split_sample
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.plan_report import summarize_truncation
from internvl.planning.sample_lengths import RankGroup

logger = logging.getLogger(__name__)
MAX_TOTAL_SAMPLES = np.iinfo(np.int32).max  # plans store sample ids as int32
EMPTY = np.empty(0, np.int64)
MAX_UNREPORTED_SHARE = 0.01  # of truncated answers, without a warning


class TrainingData(NamedTuple):
    """The samples of a run and their measurements.

    Arrays are over all samples, in the order of `dataset`.

    Attributes:
        lengths: (N,) of SAMPLE_LENGTHS; zeros where a sample is skipped.
        digests: (N,) int32, a checksum of each sample's record.
        weights: (N,) relative frequency of each sample; None: each is drawn once per epoch.
        lost_loss_tokens: (N,) int32, loss tokens that are cut off at --max_seq_length, or lost by splitting the sample.
        content_hashes: int64, see `hash_record`; of samples, not of pieces.
        held_out: the records that `--eval_share` excludes from training, by dataset.
    """

    dataset: PackedDataset
    lengths: np.ndarray
    digests: np.ndarray
    skipped_samples: list[SkippedSample]
    weights: np.ndarray | None
    lost_loss_tokens: np.ndarray
    content_hashes: np.ndarray = EMPTY
    held_out: Sequence[MeasuredPart] = ()

    @property
    def is_usable(self) -> np.ndarray:
        """(N,) bool."""
        return self.lengths["tokens"] > 0

    def list_trained_samples(self) -> list[int]:
        """List the samples that are usable, as a whole or in pieces."""
        return np.unique(self.dataset.get_source_samples()[self.is_usable]).tolist()


def build_data(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
    untrained_tokens: Mapping[int, str] | None = None,
) -> TrainingData:
    """Open and measure the datasets; reject too many unusable samples.

    A collective: all ranks call it.

    Raises:
        ValueError: the meta file or a dataset is invalid, or more samples than --max_bad_samples are unusable; then the
            message lists them.
    """
    data = measure_data(data_args, training_args, tokenizer, num_image_token, dataset_class, untrained_tokens)
    report_skipped_samples(data.skipped_samples, data.lengths, data_args)
    truncated = summarize_truncation(data.lengths, data.lost_loss_tokens)
    if truncated.largest_share > MAX_UNREPORTED_SHARE:
        logger.warning(
            "Truncated answers: %s; raise --max_seq_length (now %d) or shorten them",
            truncated,
            data_args.max_seq_length,
        )
    return data


def measure_data(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
    untrained_tokens: Mapping[int, str] | None = None,
) -> TrainingData:
    """Open and measure the datasets, however many samples are unusable.

    A collective: all ranks call it.
    """
    assert data_args.meta_path  # validated
    datasets = [
        dataset_class(name, entry, tokenizer, num_image_token, data_args, training_args.seed, untrained_tokens)
        for name, entry in load_meta(data_args.meta_path).items()
        if is_trained(entry)
    ]
    if not datasets:
        raise ValueError(f"meta file {data_args.meta_path} has no dataset to train: each has a split for evaluation.")
    if (num_samples := sum(map(len, datasets))) > MAX_TOTAL_SAMPLES:
        raise ValueError(
            f"the datasets of {data_args.meta_path} have {num_samples:,} samples, more than the supported "
            f"{MAX_TOTAL_SAMPLES:,}: lower their repeat_time."
        )
    rank_group = RankGroup(get_rank(), get_world_size(), gather_objects)
    parts = measure_datasets(datasets, count_cores_per_rank(), rank_group)
    parts, held_out = hold_out(parts, training_args.eval_share) if training_args.eval_share else (parts, [])
    joined = join_parts(parts)
    weights = compute_square_root_weights(joined.dataset, joined.lengths) if data_args.use_data_resampling else None
    data = TrainingData(**joined._asdict(), weights=weights, held_out=held_out)
    return split_oversized_samples(data, data_args, rank_group) if data_args.use_packed_ds else data


def build_evaluation(
    data: TrainingData,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
    untrained_tokens: Mapping[int, str] | None = None,
) -> EvaluationData | None:
    """Open and measure the evaluation sets; warn about records that are also trained.

    A collective. Arguments and errors: see `build_evaluation_data`.
    """
    evaluation = build_evaluation_data(
        data_args, training_args, tokenizer, num_image_token, data.held_out, dataset_class, untrained_tokens
    )
    if evaluation and get_rank() == 0:
        for shared in find_shared_records(evaluation, data.dataset, data.content_hashes, data.list_trained_samples()):
            logger.warning("Evaluation data in the training data: %s", shared)
    return evaluation


def split_oversized_samples(
    data: TrainingData, data_args: DataTrainingArguments, rank_group: RankGroup
) -> TrainingData:
    """Split samples larger than a row (`--allow_overflow`), or skip them.

    A collective: all ranks call it. The original samples stay in the arrays, with lengths of 0; pieces are appended.
    """
    max_tokens, max_tiles = data_args.max_packed_tokens, data_args.num_images_expected
    is_oversized = (data.lengths["tokens"] > max_tokens) | (data.lengths["tiles"] > max_tiles)
    oversized = np.flatnonzero(is_oversized).tolist()
    if data_args.allow_overflow:
        results = _split_on_all_ranks(data.dataset, oversized, max_tokens, max_tiles, rank_group)
    else:
        results = [
            f"its {data.lengths['tokens'][sample]} tokens and {data.lengths['tiles'][sample]} tiles do not fit into a "
            f"row of --max_packed_tokens {max_tokens} and --num_images_expected {max_tiles}; --allow_overflow True "
            "splits such samples"
            for sample in oversized
        ]
    pieces: list[tuple[int, SamplePiece]] = []
    skipped_samples, lost_loss_tokens = list(data.skipped_samples), data.lost_loss_tokens.copy()
    for sample, result in zip(oversized, results, strict=True):
        if isinstance(result, str):
            skipped_samples.append(describe_skipped(*data.dataset.locate(sample), result))
            lost_loss_tokens[sample] = 0
        else:
            pieces += [(sample, piece) for piece in result]
            lost_loss_tokens[sample] += data.lengths["loss_tokens"][sample] - sum(piece.loss_tokens for piece in result)
    piece_lengths = np.array([piece.lengths for _, piece in pieces], SAMPLE_LENGTHS)
    if pieces:
        split = sorted({sample for sample, _ in pieces})
        num_lost = data.lengths["tokens"][split].sum() - piece_lengths["tokens"].sum()
        logger.warning(
            "Oversized samples: %d split into %d pieces, %d of their tokens lost", len(split), len(pieces), num_lost
        )

    lengths = data.lengths.copy()  # the dataset compares samples with those of before
    lengths[oversized] = 0
    data.dataset.pieces = pieces
    source_samples = data.dataset.get_source_samples()
    digests = data.digests[source_samples]
    # The digest of a piece differs from that of its sample and of the other pieces.
    digests[data.dataset.num_unsplit :] ^= np.array([1 + piece.start for _, piece in pieces], np.int32)
    return data._replace(
        lengths=np.concatenate([lengths, piece_lengths]),
        digests=digests,
        skipped_samples=skipped_samples,
        weights=None if data.weights is None else data.weights[source_samples],
        lost_loss_tokens=np.append(lost_loss_tokens, np.zeros(len(pieces), np.int32)),
    )


def _split_on_all_ranks(
    dataset: PackedDataset, samples: list[int], max_tokens: int, max_tiles: int, rank_group: RankGroup
) -> list[list[SamplePiece] | str]:
    """Split samples, each rank its share.

    Returns:
        The pieces of each sample, or the reason why it is unusable.
    """
    results: list[list[SamplePiece] | str] = [""] * len(samples)
    results_of_rank = [
        split_one_sample(dataset, sample, max_tokens, max_tiles)
        for sample in samples[rank_group.rank :: rank_group.world_size]
    ]
    for rank, results_of_other in enumerate(rank_group.gather_fn(results_of_rank)):
        results[rank :: rank_group.world_size] = results_of_other
    return results


def split_one_sample(dataset: PackedDataset, sample: int, max_tokens: int, max_tiles: int) -> list[SamplePiece] | str:
    """Return the pieces of a sample, or why it is unusable."""
    source, index = dataset.locate(sample)
    try:
        texts = source.tokenize(index)
        images = find_image_spans(texts["input_ids"], source.img_context_id, source.num_image_token)
        return split_sample(texts["labels"], images, max_tokens, max_tiles)
    except UnusableSample as error:
        return str(error)


def compute_square_root_weights(dataset: PackedDataset, lengths: np.ndarray) -> np.ndarray:
    """Weigh datasets by the square root of their number of usable samples."""
    sizes = [len(source) for source in dataset.datasets]
    parts = np.split(lengths["tokens"], np.cumsum(sizes)[:-1])
    num_usable = [max(1, np.count_nonzero(tokens)) for tokens in parts]
    return np.repeat(np.array(num_usable, np.float64) ** -0.5, sizes)


def build_plan_layout(
    data_args: DataTrainingArguments, training_args: TrainingArguments, world_size: int, sample_cost: SampleCost
) -> PlanLayout:
    """Collect the settings of the epoch plan from the flags."""
    return PlanLayout(
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        world_size=world_size,
        micro_batch_size=training_args.per_device_train_batch_size,
        gradient_accumulation=training_args.gradient_accumulation_steps,
        group_by_length=training_args.group_by_length and not data_args.use_packed_ds,
        packed=data_args.use_packed_ds,
        max_tokens=data_args.max_packed_tokens,
        max_tiles=data_args.num_images_expected,
        sample_cost=sample_cost,
    )
