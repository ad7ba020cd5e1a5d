"""Build the training data: open and measure all datasets."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.training import TrainingArguments
from internvl.constants import UnusableSample
from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size
from internvl.planning.epoch_plan import SAMPLE_LENGTHS, PlanLayout, SampleCost
from internvl.planning.oversized_samples import SamplePiece, find_image_spans, split_sample
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.plan_report import summarize_truncation
from internvl.planning.sample_lengths import RankGroup, measure_dataset
from internvl.train.skipped_samples import NUM_LISTED, make_too_many_skipped_error

logger = logging.getLogger(__name__)
MAX_TOTAL_SAMPLES = np.iinfo(np.int32).max  # plans store sample ids as int32
MAX_UNREPORTED_SHARE = 0.01  # of truncated answers, without a warning


class SkippedSample(NamedTuple):
    """An unusable sample: its dataset, file, line, and the reason."""

    dataset: str
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.dataset} line {self.line} ({self.file}): {self.reason}"


class TrainingData(NamedTuple):
    """The samples of a run and their measurements.

    Arrays are over all samples, in the order of `dataset`.

    Attributes:
        lengths: (N,) of SAMPLE_LENGTHS; zeros where a sample is skipped.
        digests: (N,) int32, a checksum of each sample's record.
        lost_loss_tokens: (N,) int32, loss tokens that are cut off at --max_seq_length, or lost by splitting the sample.
        weights: (N,) relative frequency of each sample; None: each is drawn once per epoch.
    """

    dataset: PackedDataset
    lengths: np.ndarray
    digests: np.ndarray
    skipped_samples: list[SkippedSample]
    weights: np.ndarray | None
    lost_loss_tokens: np.ndarray

    @property
    def is_usable(self) -> np.ndarray:
        """(N,) bool."""
        return self.lengths["tokens"] > 0


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
    for sample in data.skipped_samples[:NUM_LISTED]:
        logger.warning("Skipped sample: %s", sample)
    max_skipped = count_max_skipped_samples(data_args, len(data.lengths))
    if len(data.skipped_samples) > max_skipped or not data.is_usable.any():
        raise make_too_many_skipped_error(list(map(str, data.skipped_samples)), max_skipped)
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
        dataset_class(name, meta, tokenizer, num_image_token, data_args, training_args.seed, untrained_tokens)
        for name, meta in load_meta(data_args.meta_path).items()
    ]
    if (num_samples := sum(map(len, datasets))) > MAX_TOTAL_SAMPLES:
        raise ValueError(
            f"the datasets of {data_args.meta_path} have {num_samples:,} samples, more than the supported "
            f"{MAX_TOTAL_SAMPLES:,}: lower their repeat_time."
        )
    rank_group = RankGroup(get_rank(), get_world_size(), gather_objects)
    measured = [
        measure_dataset(dataset, count_cores_per_rank(), show_progress=rank_group.rank == 0, rank_group=rank_group)
        for dataset in datasets
    ]
    lengths = np.concatenate([measurements.lengths for measurements in measured])
    packed_dataset = PackedDataset(datasets, lengths)
    data = TrainingData(
        dataset=packed_dataset,
        lengths=lengths,
        digests=np.concatenate([measurements.digests for measurements in measured]),
        skipped_samples=[
            describe_skipped(dataset, index, reason)
            for dataset, measurements in zip(datasets, measured, strict=True)
            for index, reason in measurements.unusable
        ],
        weights=compute_square_root_weights(packed_dataset, lengths) if data_args.use_data_resampling else None,
        lost_loss_tokens=np.concatenate([measurements.lost_loss_tokens for measurements in measured]),
    )
    return split_oversized_samples(data, data_args, rank_group) if data_args.use_packed_ds else data


def describe_skipped(dataset: LazySupervisedDataset, index: int, reason: str) -> SkippedSample:
    """Describe a skipped sample by its file and line."""
    return SkippedSample(dataset.ds_name, dataset.annotations.path, dataset.line_number(index), reason)


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
    return TrainingData(
        dataset=data.dataset,
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


def count_max_skipped_samples(data_args: DataTrainingArguments, num_samples: int) -> int:
    """Convert `--max_bad_samples`, a count or a share below 1, to a count."""
    limit = data_args.max_bad_samples
    return int(limit * num_samples) if limit < 1 else int(limit)


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
