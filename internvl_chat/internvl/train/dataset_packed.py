"""Facade: upstream's import path of packed data."""

from internvl.constants import IGNORE_INDEX as IGNORE_TOKEN_ID  # noqa: F401
from internvl.data.collators import len2weight, packed_collate_fn  # noqa: F401
from internvl.dist_utils import get_rank, get_world_size  # noqa: F401
from internvl.planning.packed_dataset import PackedDataset  # noqa: F401
