"""Records that are in the training data and in an evaluation set: their metrics are too good."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from internvl.data.record_identity import have_identical_records
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.planning.packed_dataset import PackedDataset


class SharedRecords(NamedTuple):
    """Records of an evaluation set that are also in a training dataset.

    Attributes:
        num_records: number of samples of the evaluation set.
        example: location of one of them, in both.
    """

    evaluation_set: str
    dataset: str
    num_shared: int
    num_records: int
    example: tuple[str, str]

    def __str__(self) -> str:
        return (
            f"{self.num_shared:,} of {self.num_records:,} records of evaluation set {self.evaluation_set} are also in "
            f"training dataset {self.dataset}, such as {' = '.join(self.example)}"
        )


def find_shared_records(
    evaluation: EvaluationData, training: PackedDataset, content_hashes: np.ndarray, samples: Sequence[int]
) -> list[SharedRecords]:
    """Find identical records, by their hashes; those of equal hash are read and compared.

    See `data/record_identity.py` for what is identical.

    Args:
        content_hashes: of the training samples.
        samples: ids of the training samples to consider.
    """
    # The first training sample of each hash in each dataset: others with this hash have the same content and root.
    dataset_of_sample = np.searchsorted(training.ends, samples, side="right")
    found = []
    for position, evaluation_set in enumerate(evaluation.sets):
        evaluated = evaluation.list_samples(position)
        hashes = evaluation.content_hashes[evaluated]
        for number, dataset in enumerate(training.datasets):
            own = np.asarray(samples)[dataset_of_sample == number]
            distinct, first = np.unique(content_hashes[own], return_index=True)
            candidates = np.flatnonzero(np.isin(hashes, distinct)).tolist()
            pairs = [
                (evaluated[index], int(own[first[np.searchsorted(distinct, hashes[index])]])) for index in candidates
            ]
            locations = [(evaluation.dataset.locate(one), training.locate(other)) for one, other in pairs]
            shared = [(one, other) for one, other in locations if have_identical_records(*one, *other)]
            if shared:
                (one, index), (_, index_of_other) = shared[0]
                example = one.describe(index), dataset.describe(index_of_other)
                found.append(SharedRecords(evaluation_set.name, dataset.ds_name, len(shared), len(evaluated), example))
    return found
