"""Arguments -> data: the data sets of a meta file, opened and measured. Beside `build.py`, which makes the rest."""

import logging
import os
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl.dist_utils import gathered, rank, world_size
from internvl.train.arguments import DataTrainingArguments, TrainingArguments
from internvl.train.dataset import LazySupervisedDataset, load_meta
from internvl.train.dataset_packed import PackedDataset
from internvl.train.lengths import Ranks, measure
from internvl.train.plan import Lengths
from internvl.train.trainer import too_many_bad_samples

logger = logging.getLogger(__name__)


class Bad(NamedTuple):
    """A sample that cannot be used."""

    data_set: str
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.data_set} line {self.line} ({self.file}): {self.reason}"


class Data(NamedTuple):
    """The training data of a run, and what measuring told about it (arrays over all samples, in order)."""

    rows: PackedDataset
    lengths: Lengths
    digests: np.ndarray
    bad_samples: list[Bad]
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
) -> Data:
    """Open the data sets of the meta file and measure every sample, all ranks together.

    Raises:
        ValueError: the meta file or a data set cannot be used.
        BadSample: more samples than --max_bad_samples cannot be used; the message lists them.
    """
    data = measure_data(data_args, training_args, tokenizer, num_image_token, dataset_class)
    for bad in data.bad_samples[:20]:
        logger.warning("left out: %s", bad)
    allowed = allowed_bad_samples(data_args, len(data.lengths.tokens))
    if len(data.bad_samples) > allowed or not data.usable.any():
        raise too_many_bad_samples(list(map(str, data.bad_samples)), allowed)
    return data


def measure_data(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
) -> Data:
    """The data as it is, however many of its samples cannot be used."""
    datasets = [
        dataset_class(name, meta, tokenizer, num_image_token, data_args, seed=training_args.seed)
        for name, meta in load_meta(data_args.meta_path).items()
    ]
    ranks = Ranks(rank(), world_size(), gathered)
    processes = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    measured = [measure(dataset, processes, progress=rank() == 0, ranks=ranks) for dataset in datasets]
    bad = [
        Bad(dataset.ds_name, dataset.records.path, dataset.line(index), reason)
        for dataset, found in zip(datasets, measured, strict=True)
        for index, reason in found.bad
    ]
    rows = PackedDataset(datasets)
    lengths = Lengths(*(np.concatenate(parts) for parts in zip(*(found.lengths for found in measured), strict=True)))
    if data_args.use_packed_ds:
        bad += leave_out_what_fits_no_row(rows, lengths, data_args)
    return Data(
        rows=rows,
        lengths=lengths,
        digests=np.concatenate([found.digests for found in measured]),
        bad_samples=bad,
        weights=square_root_weights(rows, lengths) if data_args.use_data_resampling else None,
    )


def leave_out_what_fits_no_row(rows: PackedDataset, lengths: Lengths, data_args: DataTrainingArguments) -> list[Bad]:
    """The samples that are larger than a row; their lengths become 0."""
    larger = (lengths.tokens > data_args.max_packed_tokens) | (lengths.tiles > data_args.num_images_expected)
    found = []
    for sample in np.flatnonzero(larger):
        dataset, index = rows.locate(int(sample))
        reason = (
            f"its {lengths.tokens[sample]} tokens and {lengths.tiles[sample]} tiles do not fit into a row of "
            f"--max_packed_tokens {data_args.max_packed_tokens} and --num_images_expected "
            f"{data_args.num_images_expected}"
        )
        found.append(Bad(dataset.ds_name, dataset.records.path, dataset.line(index), reason))
    for sizes in lengths:
        sizes[larger] = 0
    return found


def square_root_weights(rows: PackedDataset, lengths: Lengths) -> np.ndarray:
    """Weights by which each data set counts as the square root of the number of its usable samples."""
    sizes = [len(dataset) for dataset in rows.datasets]
    usable = [max(1, np.count_nonzero(part)) for part in np.split(lengths.tokens, np.cumsum(sizes)[:-1])]
    return np.repeat(np.array(usable, np.float64) ** -0.5, sizes)


def allowed_bad_samples(data_args: DataTrainingArguments, samples: int) -> int:
    """--max_bad_samples as a count."""
    limit = data_args.max_bad_samples
    return int(limit * samples) if limit < 1 else int(limit)
