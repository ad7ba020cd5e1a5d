"""Facade: upstream's import path of the data pipeline, plus upstream-only helpers.

The pipeline itself is in `internvl/data`. The helpers below are for code written for upstream. Where upstream reads
object stores through petrel, `TCSLoader` and `read_frames_*` read local paths and fsspec URLs.
"""

import logging
from collections import Counter

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, WeightedRandomSampler

from internvl.constants import IGNORE_INDEX as IGNORE_TOKEN_ID
from internvl.constants import UnusableSample
from internvl.data.chat_tokenization import (
    preprocess,
    preprocess_internlm,
    preprocess_internvl2_5,
    preprocess_internvl3_5_gpt_oss,
    preprocess_internvl3_5_gpt_oss_with_think,
    preprocess_mpt,
    preprocess_phi3,
    preprocess_pretrain,
)
from internvl.data.image_files import load_image, pil_loader
from internvl.data.images import (
    build_transform,
    dynamic_preprocess,
    expand2square,
    find_closest_aspect_ratio,
    jpeg_degrade_functions,
    qualities,
    simulate_jpeg_degradation,
)
from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.data.videos import extract_frame_number, get_frame_indices, read_frames, sort_frames

__all__ = [
    "ConcatDataset",
    "IGNORE_TOKEN_ID",
    "LazySupervisedDataset",
    "TCSLoader",
    "WeightedConcatDataset",
    "build_transform",
    "calculate_ngram_repetition",
    "check_conversations_repetition",
    "dynamic_preprocess",
    "expand2square",
    "extract_frame_number",
    "find_closest_aspect_ratio",
    "get_frame_indices",
    "jpeg_degrade_functions",
    "load_meta",
    "pil_loader",
    "preprocess",
    "preprocess_internlm",
    "preprocess_internvl2_5",
    "preprocess_internvl3_5_gpt_oss",
    "preprocess_internvl3_5_gpt_oss_with_think",
    "preprocess_mpt",
    "preprocess_phi3",
    "preprocess_pretrain",
    "qualities",
    "read_frames_decord",
    "read_frames_folder",
    "read_frames_gif",
    "simulate_jpeg_degradation",
    "sort_frames",
]

logger = logging.getLogger(__name__)


class WeightedConcatDataset(ConcatDataset):
    """Concatenated datasets with a sampler that draws by weight.

    `sampler` draws with replacement, each dataset in proportion to its weight.
    """

    def __init__(self, datasets, weights):
        super().__init__(datasets)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.total_size = len(self)
        sample_weights = torch.cat([w.div(len(d)).expand(len(d)) for d, w in zip(datasets, self.weights, strict=True)])
        self.sampler = WeightedRandomSampler(sample_weights.tolist(), self.total_size)

    def __iter__(self):
        return iter(self.sampler)


class TCSLoader:
    """Reader of images and videos.

    `conf_path` and `sc_config_key` configure petrel and are ignored. Object stores are opened by fsspec, with keys and
    endpoints from the environment.
    """

    def __init__(self, conf_path: str | None = None, sc_config_key: str = "sensecore"):
        if conf_path is not None:
            logger.warning("TCSLoader: %s is ignored, fsspec opens paths (internvl/data/file_io.py)", conf_path)

    def __call__(
        self,
        fn: str,
        image_type: str = "image",
        max_num_frames: int = -1,
        min_num_frames: int = 8,
        sample: str = "rand",
        clip=None,
    ) -> Image.Image | list[Image.Image]:
        """Return the RGB image, or `min_num_frames` to `max_num_frames` frames."""
        if image_type == "image":
            return load_image(fn)
        if image_type == "video":
            return read_frames_decord(fn, max_num_frames, sample, clip=clip, min_num_frames=min_num_frames)
        raise ValueError(f"image_type {image_type!r} is not supported: expected image or video.")


def read_frames_decord(
    video_path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    client=None,
    clip=None,
    min_num_frames: int = 4,
) -> list[Image.Image]:
    """Read frames of any kind of video by `read_frames`.

    Args:
        num_frames, min_num_frames: the number of frames is drawn from this range, with numpy's global generator.
        client: not supported; must be None, see `TCSLoader`.
    """
    if client is not None:
        raise ValueError(f"client {client!r} is not supported (reading {video_path}): fsspec opens paths, pass None.")
    if not 1 <= min_num_frames <= num_frames:
        raise ValueError(f"min_num_frames {min_num_frames} is not between 1 and num_frames {num_frames}.")
    return read_frames(video_path, int(np.random.randint(min_num_frames, num_frames + 1)), sample, fix_start, clip)


read_frames_folder = read_frames_decord


def read_frames_gif(
    video_path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    client=None,
    min_num_frames: int = 4,
) -> list[Image.Image]:
    """Read frames as `read_frames_decord` does."""
    return read_frames_decord(video_path, num_frames, sample, fix_start, client, min_num_frames=min_num_frames)


def calculate_ngram_repetition(text: str, n: int) -> float:
    """Return the ratio of distinct repeated n-grams of words to all n-grams."""
    words = text.split()
    ngrams = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return sum(count > 1 for count in ngrams.values()) / ngrams.total() if ngrams else 0.0


def check_conversations_repetition(conversations: list[dict], repeat_threshold: float = 0.4, ngram: int = 10) -> None:
    """Raise UnusableSample if `calculate_ngram_repetition` of an answer exceeds the threshold."""
    for number, turn in enumerate(conversations, start=1):
        if turn["from"] == "gpt" and (share := calculate_ngram_repetition(turn["value"], ngram)) > repeat_threshold:
            raise UnusableSample(
                f"turn {number} is repetitive: {share:.2f} of its {ngram}-grams, more than {repeat_threshold}"
            )
