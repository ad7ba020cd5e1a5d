"""Upstream's path of the data pipeline: its names, each pointing at its real home, and those that nothing here needs.

Where upstream reads object stores through petrel, `TCSLoader` and `read_frames_*` read local paths and whatever fsspec
opens.
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
from internvl.data.images import (
    build_transform,
    dynamic_preprocess,
    expand2square,
    find_closest_aspect_ratio,
    jpeg_degrade_functions,
    load_image,
    pil_loader,
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
    """Concatenated data sets whose `sampler` draws samples with replacement, each data set in proportion to its
    weight."""

    def __init__(self, datasets, weights):
        super().__init__(datasets)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.total_size = len(self)
        per_sample = torch.cat([w.div(len(d)).expand(len(d)) for d, w in zip(datasets, self.weights, strict=True)])
        self.sampler = WeightedRandomSampler(per_sample, self.total_size)

    def __iter__(self):
        return iter(self.sampler)


class TCSLoader:
    """Reads one image or video. `conf_path` and `sc_config_key` configure petrel, which is not used: stores are asked
    through fsspec, with keys and endpoints from the environment."""

    def __init__(self, conf_path: str | None = None, sc_config_key: str = "sensecore"):
        if conf_path is not None:
            logger.warning("TCSLoader does not read %s: fsspec opens paths, see internvl/data/file_io.py", conf_path)

    def __call__(
        self,
        fn: str,
        image_type: str = "image",
        max_num_frames: int = -1,
        min_num_frames: int = 8,
        sample: str = "rand",
        clip=None,
    ) -> Image.Image | list[Image.Image]:
        """The image, or between `min_num_frames` and `max_num_frames` frames of the video, in RGB."""
        if image_type == "image":
            return load_image(fn)
        if image_type == "video":
            return read_frames_decord(fn, max_num_frames, sample, clip=clip, min_num_frames=min_num_frames)
        raise ValueError(f"image_type {image_type!r} is not image or video.")


def read_frames_decord(
    video_path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    client=None,
    clip=None,
    min_num_frames: int = 4,
) -> list[Image.Image]:
    """Frames of a video, as `read_frames` gives them, which goes by the path whatever this function is called.

    Args:
        num_frames, min_num_frames: how many frames is drawn from this range, with numpy's shared generator.
        client: must be None; see `TCSLoader`.
    """
    if client is not None:
        raise ValueError(f"client {client!r} is not asked for {video_path}: paths are opened by fsspec; leave it out.")
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
    """As `read_frames_decord`."""
    return read_frames_decord(video_path, num_frames, sample, fix_start, client, min_num_frames=min_num_frames)


def calculate_ngram_repetition(text: str, n: int) -> float:
    """How many of the runs of `n` words occur more than once, each counted once, over the number of all runs."""
    words = text.split()
    runs = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return sum(count > 1 for count in runs.values()) / runs.total() if runs else 0.0


def check_conversations_repetition(conversations: list[dict], repeat_threshold: float = 0.4, ngram: int = 10) -> None:
    """Raise BadSample if an answer repeats itself, by `calculate_ngram_repetition`, more than the threshold allows."""
    for number, turn in enumerate(conversations, start=1):
        if turn["from"] == "gpt" and (share := calculate_ngram_repetition(turn["value"], ngram)) > repeat_threshold:
            raise UnusableSample(
                f"turn {number} repeats itself: {share:.2f} of its runs of {ngram} words, above {repeat_threshold}"
            )
