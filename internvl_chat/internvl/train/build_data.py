"""Arguments -> data: the data sets of a meta file, opened and measured. Beside `build.py`, which makes the rest."""

import logging
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl.arguments.training import DataTrainingArguments, TrainingArguments
from internvl.constants import UnusableSample
from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.dist_utils import gather_objects, num_cores, rank, world_size
from internvl.planning.epoch_plan import SampleLengths
from internvl.planning.oversized_samples import SamplePiece, find_image_spans, split_sample
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import RankGroup, measure_dataset
from internvl.train.trainer import too_many_bad_samples_error

logger = logging.getLogger(__name__)


class SkippedSample(NamedTuple):
    """A sample that cannot be used."""

    data_set: str
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.data_set} line {self.line} ({self.file}): {self.reason}"


class TrainingData(NamedTuple):
    """The training data of a run, and what measuring told about it (arrays over all samples, in order)."""

    rows: PackedDataset
    lengths: SampleLengths
    digests: np.ndarray
    bad_samples: list[SkippedSample]
    weights: np.ndarray | None  # how often each sample is drawn relative to the others; None: all once an epoch

    @property
    def usable(self) -> np.ndarray:
        return self.lengths.tokens > 0


def build_data(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
) -> TrainingData:
    """Open the data sets of the meta file and measure every sample, all ranks together.

    Raises:
        ValueError: the meta file or a data set cannot be used.
        BadSample: more samples than --max_bad_samples cannot be used; the message lists them.
    """
    data = measure_data(data_args, training_args, tokenizer, num_image_token, dataset_class)
    for bad in data.bad_samples[:20]:
        logger.warning("left out: %s", bad)
    allowed = count_allowed_bad_samples(data_args, len(data.lengths.tokens))
    if len(data.bad_samples) > allowed or not data.usable.any():
        raise too_many_bad_samples_error(list(map(str, data.bad_samples)), allowed)
    return data


def measure_data(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
) -> TrainingData:
    """The data as it is, however many of its samples cannot be used."""
    datasets = [
        dataset_class(name, meta, tokenizer, num_image_token, data_args, seed=training_args.seed)
        for name, meta in load_meta(data_args.meta_path).items()
    ]
    ranks = RankGroup(rank(), world_size(), gather_objects)
    measured = [measure_dataset(dataset, num_cores(), progress=rank() == 0, ranks=ranks) for dataset in datasets]
    bad = [
        SkippedSample(dataset.ds_name, dataset.records.path, dataset.line(index), reason)
        for dataset, found in zip(datasets, measured, strict=True)
        for index, reason in found.bad
    ]
    rows = PackedDataset(datasets)
    lengths = SampleLengths(
        *(np.concatenate(parts) for parts in zip(*(found.lengths for found in measured), strict=True))
    )
    data = TrainingData(rows, lengths, np.concatenate([found.digests for found in measured]), bad, weights=None)
    if data_args.use_data_resampling:
        data = data._replace(weights=square_root_weights(rows, lengths))
    return split_oversized_samples(data, data_args, ranks) if data_args.use_packed_ds else data


def split_oversized_samples(data: TrainingData, data_args: DataTrainingArguments, ranks: RankGroup) -> TrainingData:
    """The same, where what is larger than a row is split (--allow_overflow) or a bad sample."""
    row = data_args.max_packed_tokens, data_args.num_images_expected
    larger = np.flatnonzero((data.lengths.tokens > row[0]) | (data.lengths.tiles > row[1])).tolist()
    parts, bad = [], list(data.bad_samples)
    for sample, outcome in zip(larger, split_samples(data, larger, *row, data_args.allow_overflow, ranks), strict=True):
        if isinstance(outcome, str):
            dataset, index = data.rows.locate(sample)
            bad.append(SkippedSample(dataset.ds_name, dataset.records.path, dataset.line(index), outcome))
        else:
            parts += [(sample, part) for part in outcome]
    sizes = np.array([part.size for _, part in parts], np.int32).reshape(-1, 3).T
    if parts:
        whole = sorted({sample for sample, _ in parts})
        lost = data.lengths.tokens[whole].sum() - sizes[0].sum()
        said = len(whole), len(parts), lost
        logger.warning(
            "%d samples larger than a row are split into %d parts, which leave out %d of their tokens", *said
        )
    for values in data.lengths:
        values[larger] = 0
    data.rows.parts = parts
    origin = data.rows.origin()
    digests = data.digests[origin]
    digests[data.rows.ends[-1] :] ^= np.array([1 + part.start for _, part in parts], np.int32)  # a part is not its twin
    return TrainingData(
        rows=data.rows,
        lengths=SampleLengths(*map(np.concatenate, zip(data.lengths, sizes, strict=True))),
        digests=digests,
        bad_samples=bad,
        weights=None if data.weights is None else data.weights[origin],
    )


def split_samples(
    data: TrainingData, samples: list[int], max_tokens: int, max_tiles: int, allowed: bool, ranks: RankGroup
) -> list:
    """The parts of each of these samples, or a sentence on why there are none; all ranks together."""
    if not allowed:
        return [
            f"its {data.lengths.tokens[sample]} tokens and {data.lengths.tiles[sample]} tiles do not fit into a row of "
            f"--max_packed_tokens {max_tokens} and --num_images_expected {max_tiles}; --allow_overflow True splits "
            "such samples"
            for sample in samples
        ]
    outcomes: list[list[SamplePiece] | str] = [""] * len(samples)
    mine = [
        pieces_of_sample(data.rows, sample, max_tokens, max_tiles) for sample in samples[ranks.rank :: ranks.world_size]
    ]
    for first, theirs in enumerate(ranks.gathered(mine)):
        outcomes[first :: ranks.world_size] = theirs
    return outcomes


def pieces_of_sample(rows: PackedDataset, sample: int, max_tokens: int, max_tiles: int) -> list[SamplePiece] | str:
    """The parts of a sample, or why there are none."""
    dataset, index = rows.locate(sample)
    try:
        texts, _ = dataset.texts(index)
        images = find_image_spans(texts["input_ids"], dataset.img_context_id, dataset.num_image_token)
        return split_sample(texts["labels"], images, max_tokens, max_tiles)
    except UnusableSample as reason:
        return str(reason)


def square_root_weights(rows: PackedDataset, lengths: SampleLengths) -> np.ndarray:
    """Weights by which each data set counts as the square root of the number of its usable samples."""
    sizes = [len(dataset) for dataset in rows.datasets]
    usable = [max(1, np.count_nonzero(part)) for part in np.split(lengths.tokens, np.cumsum(sizes)[:-1])]
    return np.repeat(np.array(usable, np.float64) ** -0.5, sizes)


def count_allowed_bad_samples(data_args: DataTrainingArguments, samples: int) -> int:
    """--max_bad_samples as a count."""
    limit = data_args.max_bad_samples
    return int(limit * samples) if limit < 1 else int(limit)
