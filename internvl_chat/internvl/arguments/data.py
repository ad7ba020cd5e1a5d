"""Flags of the data: tokenization, image tiles, video frames, packing."""

from dataclasses import dataclass
from typing import Literal

from internvl.arguments.flags import option


@dataclass
class DataTrainingArguments:
    """Flags of the path from records to samples and packed sequences."""

    max_seq_length: int = option(8192, "tokens of a sample; longer samples are truncated")
    force_image_size: int = option(448, "side of a tile in pixels")
    down_sample_ratio: float = option(0.5, "pixel shuffle factor; must equal the checkpoint's")
    pad2square: bool = option(
        False, "pad images to a square instead of stretching them, in data sets without data_augment"
    )
    conv_style: str = option("internlm2-chat", "name of the conversation template")
    meta_path: str | None = option(None, "JSON file that lists the datasets")
    use_data_resampling: bool = option(False, "sample datasets in proportion to the square root of their size")
    dynamic_image_size: bool = option(False, "split images into tiles according to their aspect ratio")
    use_thumbnail: bool = option(False, "add a thumbnail of the image to its tiles")
    min_dynamic_patch: int = option(1, "minimum number of tiles per image")
    max_dynamic_patch: int = option(12, "maximum number of tiles per image, without the thumbnail")
    min_num_frame: int = option(8, "minimum number of frames per video")
    max_num_frame: int = option(32, "maximum number of frames per video")
    max_image_pixels: int = option(89_478_485, "maximum number of pixels of an image; larger ones are unusable samples")
    image_background: str = option("white", "color behind the transparent pixels of an image: a CSS name or #rrggbb")
    upstream_image_decoding: bool = option(
        False,
        "convert images to RGB as upstream does: EXIF orientation ignored, 16-bit gray clipped, transparency dropped",
    )
    normalize_type: Literal["imagenet", "clip", "siglip"] = option(
        "imagenet", "mean and standard deviation that pixels are normalized with"
    )
    use_packed_ds: bool = option(False, "pack several samples into one sequence (row)")
    num_images_expected: int = option(40, "maximum number of tiles per packed row")
    max_packed_tokens: int = option(8192, "maximum number of tokens per packed row")
    max_buffer_size: int = option(20, "accepted for upstream's recipes, ignored: rows are planned for a full epoch")
    log_freq: int = option(1000, "accepted for upstream's recipes, ignored: the epoch plan is logged before step 1")
    strict_mode: bool = option(
        True, "packing: pad every row to --max_packed_tokens, which gives all steps the same shape"
    )
    replacement: bool = option(
        False, "accepted for upstream's recipes, ignored: epochs follow each other until --max_steps"
    )
    allow_overflow: bool = option(False, "packing: split samples that are larger than a row instead of skipping them")
    loss_reduction: Literal["token", "sample", "square"] = option(
        "token", "weight of a token in the loss, n being its sample's loss tokens: 1, 1 / n or 1 / sqrt(n)"
    )
    loss_reduction_all_gather: bool = option(
        False,
        "average the loss over all tokens of a step, across ranks and micro-batches; if not, their means are averaged",
    )
    keep_surplus_placeholders: bool = option(
        False, "keep an <image> or <video> that has no image or video as text, as upstream does, instead of skipping"
    )
    allow_outside_root: bool = option(False, "also read files outside the root folder of their dataset")
    accept_changed_data: bool = option(False, "resume from a checkpoint even if the data has changed since")
    split_annotations: bool = option(
        False, "accepted for InternVL 3.5's recipes, ignored: each rank reads only the lines it needs"
    )
    store_retry_seconds: float = option(
        600, "seconds for which reading is retried while a store or a network file system does not answer"
    )
    max_bad_samples: float = option(
        0.01, "unusable samples that are skipped before the run fails: below 1 a share of the data, else a count"
    )
