"""Identity of records: the hash of their content, and which ones are identical.

The content of a record is what becomes its sample: roles and texts of its turns, the paths of its media as written, its
clip. Other keys, such as `id`, the order of keys and the root folder do not count. So copies of a record have the same
hash in every file, on every machine.
"""

import filecmp
import hashlib
import json
import os
from contextlib import suppress

from internvl.constants import UnusableSample
from internvl.data.file_io import is_remote
from internvl.data.foreign_keys import TURN_KEYS
from internvl.data.schema import get_media
from internvl.data.supervised_dataset import LazySupervisedDataset


def hash_record(dataset: LazySupervisedDataset, index: int) -> int:
    """Hash the content of a sample's record to a signed 64-bit integer.

    A malformed record, which has no content, is hashed by the checksum of its line.
    """
    try:
        content = json.dumps(_extract_content(dataset, index))
    except UnusableSample:
        content = str(dataset.annotations.checksums[dataset.record_indices[index]])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little", signed=True)


def have_identical_records(
    one: LazySupervisedDataset, index: int, other: LazySupervisedDataset, index_of_other: int
) -> bool:
    """Check whether two samples have the same content and the same media files.

    Files are the same if their paths are, or their bytes; remote files only by their paths.
    """
    with suppress(UnusableSample):
        if _extract_content(one, index) == _extract_content(other, index_of_other):
            paths = one.list_media_paths(index), other.list_media_paths(index_of_other)
            return all(_are_same_media(*pair) for pair in zip(*paths, strict=True))
    return False


def _extract_content(dataset: LazySupervisedDataset, index: int) -> list:
    """Extract what becomes the sample; raises UnusableSample if malformed."""
    record = dataset.read_record(index)
    conversations = [
        [[turn[key] for key in TURN_KEYS] for turn in turns] for turns in dataset.list_conversations(record)
    ]
    return [conversations, *get_media(record), record.get("clip") or None]


def _are_same_media(path: str, other: str) -> bool:
    if path == other or is_remote(path) or is_remote(other):
        return path == other
    try:
        if os.path.isdir(path) and os.path.isdir(other):  # frames of a video
            names = sorted(os.listdir(path))
            return names == sorted(os.listdir(other)) and filecmp.cmpfiles(path, other, names, False)[0] == names
        return filecmp.cmp(path, other, shallow=False)
    except OSError:  # a missing file is no reason to stop here: its sample is unusable
        return False
