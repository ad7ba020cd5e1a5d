"""One dataset of a meta file: from (index, epoch) to a sample.

    annotations[17] -> record -> images or frames -> tiles -> pixel_values        image_files.py, images.py, videos.py
                              -> turns with one `<image>` per image or frame   schema.py
                              -> segments -> input_ids, labels                 chat_segments.py, chat_tokenization.py

`get` does all of this. `measure` only tokenizes, with tile counts from image headers, so the length of every sample is
known before training. An unusable record raises UnusableSample; it is never replaced by another one.
"""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN, UnusableSample, shorten
from internvl.data.annotations import open_annotations
from internvl.data.chat_tokenization import tokenize_turns
from internvl.data.file_io import join_root, require_inside_root
from internvl.data.foreign_keys import MEDIA_KEYS
from internvl.data.image_files import ImageDecoding, load_image, read_image_size
from internvl.data.images import (
    NORMALIZATION_STATS,
    build_transform,
    count_tiles,
    dynamic_preprocess,
    normalize_tiles,
)
from internvl.data.outages import retry_during_outage
from internvl.data.schema import (
    get_media,
    get_turns,
    insert_placeholders,
    require_placeholders,
    validate_meta_entry,
    validate_record_keys,
)
from internvl.data.videos import count_frames, read_frames

MAX_NUM_SAMPLES = 1 << 28  # of a dataset; repeated ones take 8 bytes each


class LazySupervisedDataset(Dataset):
    """Samples of one dataset, each determined by (seed, index, epoch).

    Args:
        ds_name: name in messages.
        meta: entry of the meta file: `root`, `annotation`; optionally `repeat_time` (0.3: a random 30 % of the records,
            chosen by `seed` and `ds_name`; 2.5: every record twice and a random half again), `data_augment` (JPEG
            degradation), `max_dynamic_patch` (overrides the flag).
        tokenizer: knows the image tokens; samples are truncated to its `model_max_length`.
        num_image_token: context tokens per tile.
        untrained_tokens: id -> token, of tokens that an answer must not use, as the run does not train their rows.

    Attributes:
        meta: the meta entry.
        annotations: the records.
        record_indices: the index in `annotations` of each sample.
        frame_sampling: how the frames of a video are chosen, see `get_frame_indices`.

    Raises:
        ValueError: the meta entry is invalid.
    """

    content_keys = ("conversations",)  # required in a record
    known_keys = (*content_keys, *MEDIA_KEYS)  # all keys that are used

    def __init__(
        self,
        ds_name: str,
        meta: dict,
        tokenizer,
        num_image_token: int,
        data_args: DataTrainingArguments,
        seed: int = 0,
        untrained_tokens: Mapping[int, str] | None = None,
    ):
        validate_meta_entry(ds_name, meta)
        self.ds_name, self.meta, self.tokenizer, self.num_image_token = ds_name, meta, tokenizer, num_image_token
        self.data_args, self.seed, self.untrained_tokens = data_args, seed, untrained_tokens or {}
        self.root = meta["root"]
        self.image_decoding = ImageDecoding.from_flags(data_args)
        self.data_augment = meta.get("data_augment", False)
        self.frame_sampling = "rand"
        self.max_dynamic_patch = meta.get("max_dynamic_patch", data_args.max_dynamic_patch)
        self.annotations = open_annotations(meta["annotation"])
        num_records, repeat_time = len(self.annotations), meta.get("repeat_time", 1)
        if num_records * repeat_time > MAX_NUM_SAMPLES:
            raise ValueError(
                f"dataset {ds_name}: repeat_time {shorten(repeat_time)} of the {num_records} records in "
                f"{self.annotations.path} gives more than {MAX_NUM_SAMPLES:,} samples."
            )
        self.record_indices = _repeat_records(num_records, repeat_time, (seed, *ds_name.encode()))
        if len(self) == 0:
            raise ValueError(
                f"dataset {ds_name}: repeat_time {repeat_time} of the {num_records} records in {self.annotations.path} "
                "leaves no sample."
            )
        self.img_context_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)

    def __len__(self) -> int:
        return len(self.record_indices)

    def select(self, indices: Sequence[int] | np.ndarray) -> "LazySupervisedDataset":
        """Return a dataset of some of the samples, in this order."""
        selected = copy.copy(self)
        selected.record_indices = np.asarray(self.record_indices)[indices]
        return selected

    def without_randomness(self) -> "LazySupervisedDataset":
        """Return a dataset whose samples are the same in every epoch.

        It has no augmentation, and middle frames of videos. Lengths of samples do not change.
        """
        fixed = copy.copy(self)
        fixed.data_augment, fixed.frame_sampling = False, "middle"
        return fixed

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample in upstream's form.

        Tiles are normalized float32. A sample without images has one white tile, whose image flag is 0.
        """
        sample = self.get(index, epoch=0)
        if len(sample["pixel_values"]) == 0:
            # In upstream a text sample needs a tile, for the vision encoder to run. This model accepts samples without.
            white_image = Image.new("RGB", (224, 224), (255, 255, 255))
            white_tile = self._build_transform(random.Random(0))(white_image)
            sample |= {"pixel_values": white_tile[None], "image_flags": torch.tensor([0])}
        mean, std = NORMALIZATION_STATS[self.data_args.normalize_type]
        return sample | {"pixel_values": normalize_tiles(sample["pixel_values"], mean, std)}

    def get(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """Load a sample with the random choices of this epoch.

        Returns:
            `input_ids`, `labels`, `position_ids` (L,) int64; `pixel_values` (T, 3, S, S) uint8, to be normalized by
            `normalize_tiles`; `image_flags` (T,) int64, all 1. A record without images has T = 0.

        Raises:
            UnusableSample: the message is the reason.
        """
        return self._retry_during_outage(lambda: self._load_sample(index, epoch))

    def _load_sample(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        record = self.read_record(index)
        generator = self._make_generator(index, epoch)
        tiles_per_image = self._load_tiles(record, generator)
        tokens, _ = self._tokenize_record(record, [len(tiles) for tiles in tiles_per_image])
        transform = self._build_transform(generator)
        pixel_values = [transform(tile) for tiles in tiles_per_image for tile in tiles]
        return {
            **tokens,
            "pixel_values": torch.stack(pixel_values) if pixel_values else self.make_empty_tiles(),
            "image_flags": torch.ones(len(pixel_values), dtype=torch.int64),
        }

    def _make_generator(self, index: int, epoch: int) -> random.Random:
        # A string as seed: Python hashes it with SHA-512, which gives the same number in every process.
        return random.Random(f"{self.seed} {epoch} {index}")

    def load_image_tiles(self, index: int, epoch: int = 0) -> list[torch.Tensor]:
        """Load the tiles (T, 3, S, S), uint8, of each image or frame.

        The text of the record is not used.

        Raises:
            UnusableSample: see `get`.
        """
        return self._retry_during_outage(lambda: self._load_image_tiles(index, epoch))

    def _load_image_tiles(self, index: int, epoch: int) -> list[torch.Tensor]:
        generator = self._make_generator(index, epoch)
        images, transform = self._load_tiles(self.read_record(index), generator), self._build_transform(generator)
        return [torch.stack([transform(tile) for tile in tiles]) for tiles in images]

    def count_image_tiles(self, index: int) -> list[int]:
        """Count the tiles of each image or frame from the image headers."""
        return self._retry_during_outage(lambda: self._count_tiles(self.read_record(index)))

    def measure(self, index: int) -> tuple[int, int, int, int]:
        """Count (tokens, loss tokens, tiles, lost loss tokens) of a sample without decoding images.

        Lost are the loss tokens that truncation cuts off. The counts are the same in every epoch.

        Raises:
            UnusableSample: see `get`. Damage that is only found while decoding pixels is not reported.
        """
        tokens, num_tiles, num_lost = self._retry_during_outage(lambda: self._tokenize_sample(index))
        # A preference pair has labels of both its sides.
        labels = torch.cat([values for name, values in tokens.items() if name.endswith("labels")])  # (L,)
        return len(labels), int((labels != IGNORE_INDEX).sum()), num_tiles, num_lost

    def tokenize(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample's token tensors, without decoding images.

        Raises:
            UnusableSample: see `measure`.
        """
        tokens, _, _ = self._retry_during_outage(lambda: self._tokenize_sample(index))
        return tokens

    def _tokenize_sample(self, index: int) -> tuple[dict[str, torch.Tensor], int, int]:
        """Return a sample's token tensors, number of tiles, and number of lost loss tokens."""
        record = self.read_record(index)
        num_tiles = self._count_tiles(record)
        tokens, num_lost = self._tokenize_record(record, num_tiles)
        return tokens, sum(num_tiles), num_lost

    def _retry_during_outage(self, read_fn: Callable[[], Any]) -> Any:
        return retry_during_outage(read_fn, self.data_args.store_retry_seconds)

    # -- records -------------------------------------------------------------------------------------------------------

    def read_record(self, index: int) -> dict:
        """Read the record of a sample; raises UnusableSample if malformed."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is out of range: dataset {self.ds_name} has {len(self)} samples")
        record = self.annotations[self.record_indices[index]]
        validate_record_keys(record, self.content_keys, self.known_keys)
        return record

    def list_media_paths(self, index: int) -> list[str]:
        """List the image or video files of a sample.

        Raises:
            UnusableSample: the record is malformed.
        """
        return [self._resolve_path(path) for path in get_media(self.read_record(index))[1]]

    def describe(self, index: int) -> str:
        """Return a sample's dataset, line and file, for messages."""
        return f"{self.ds_name} line {self.line_number(index)} ({self.annotations.path})"

    def line_number(self, index: int) -> int:
        """Return the line of a sample in the annotation file, from 1."""
        return self.annotations.line_number(self.record_indices[index])

    def list_conversations(self, record: dict) -> list[list[dict[str, str]]]:
        """List the conversations of a record: one, or two of a preference pair."""
        return [get_turns(record)]

    # -- images and videos to tiles ------------------------------------------------------------------------------------

    def _load_tiles(self, record: dict, generator: random.Random) -> list[list[Image.Image]]:
        """Load the tiles of each image; a video frame is one tile."""
        kind, paths = get_media(record)
        if kind == "video":
            [path] = paths
            frames = read_frames(
                self._resolve_path(path),
                self._choose_num_frames(path),
                self.frame_sampling,
                clip=record.get("clip"),
                generator=generator,
                check_path_fn=self._check_path,
                decoding=self.image_decoding,
            )
            return [[frame] for frame in frames]
        # One at a time: images may be large.
        images = (load_image(self._resolve_path(path), self.image_decoding) for path in paths)
        if not self.data_args.dynamic_image_size:
            return [[image] for image in images]
        return [dynamic_preprocess(image, **self._get_tiling(len(paths))) for image in images]

    def _count_tiles(self, record: dict) -> list[int]:
        """Count the tiles of `_load_tiles` from the image headers."""
        kind, paths = get_media(record)
        if kind == "video":
            [path] = paths
            num_frames = count_frames(
                self._resolve_path(path),
                self._choose_num_frames(path),
                record.get("clip"),
                self._check_path,
                self.image_decoding,
            )
            return [1] * num_frames
        sizes = [read_image_size(self._resolve_path(path), self.image_decoding) for path in paths]
        if not self.data_args.dynamic_image_size:
            return [1] * len(sizes)
        return [count_tiles(*size, **self._get_tiling(len(sizes))) for size in sizes]

    def _get_tiling(self, num_images: int) -> dict:
        """Return the arguments of `dynamic_preprocess` for each image of a record.

        The images share the maximum number of tiles.
        """
        return {
            "min_num": self.data_args.min_dynamic_patch,
            "max_num": max(1, self.max_dynamic_patch // num_images),
            "image_size": self.data_args.force_image_size,
            "use_thumbnail": self.data_args.use_thumbnail,
        }

    def _choose_num_frames(self, path: str) -> int:
        """Draw the number of frames of a video.

        Its path is the seed, so the number is the same in every epoch, as measured lengths require.
        """
        return random.Random(path).randint(self.data_args.min_num_frame, self.data_args.max_num_frame)

    def _build_transform(self, generator: random.Random):
        args = self.data_args
        return build_transform(
            self.data_augment, args.force_image_size, args.pad2square, args.normalize_type, generator, normalize=False
        )

    def make_empty_tiles(self) -> torch.Tensor:
        """Return the `pixel_values` of a sample without images."""
        side = self.data_args.force_image_size
        return torch.empty(0, 3, side, side, dtype=torch.uint8)

    def _resolve_path(self, path: str) -> str:
        return self._check_path(join_root(self.root, path))

    def _check_path(self, path: str) -> str:
        return path if self.data_args.allow_outside_root else require_inside_root(self.root, path)

    # -- turns to tokens -----------------------------------------------------------------------------------------------

    def _tokenize_record(self, record: dict, num_tiles: list[int]) -> tuple[dict[str, torch.Tensor], int]:
        """Tokenize and truncate a record.

        Args:
            num_tiles: of each image or frame.

        Returns:
            `input_ids`, `labels` and `position_ids` (L,), and the number of loss tokens that are cut off.
        """
        kind, _ = get_media(record)
        turns = get_turns(record)
        if not self.data_args.keep_surplus_placeholders:
            require_placeholders(turns, kind, len(num_tiles))
        turns = insert_placeholders(turns, kind, len(num_tiles))
        tokens_per_image = [n * self.num_image_token for n in num_tiles]
        input_ids, labels = tokenize_turns(
            self.data_args.conv_style, turns, self.tokenizer, tokens_per_image, text_only=kind == "text"
        )
        self._refuse_untrained_tokens(labels)
        all_labels = labels
        input_ids, labels = self._truncate(input_ids, labels, num_context_tokens=sum(tokens_per_image))
        num_lost = int((all_labels[len(labels) :] != IGNORE_INDEX).sum())
        return {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(len(input_ids))}, num_lost

    def _refuse_untrained_tokens(self, labels: torch.Tensor) -> None:
        if not self.untrained_tokens:
            return
        is_untrained = torch.isin(labels, torch.tensor([*self.untrained_tokens]))
        if is_untrained.any():
            tokens = sorted({self.untrained_tokens[int(index)] for index in labels[is_untrained]})
            raise UnusableSample(
                f"an answer uses {shorten(', '.join(tokens))}, which the tokenizer has and the model has no row for: "
                "train the rows by --train_new_tokens True"
            )

    def _truncate(
        self, input_ids: torch.Tensor, labels: torch.Tensor, num_context_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Truncate (L,) tokens to the tokenizer's maximum length.

        Raises:
            UnusableSample: image tokens or all loss tokens are cut off.
        """
        total, limit = len(input_ids), min(len(input_ids), self.tokenizer.model_max_length)
        input_ids, labels = input_ids[:limit], labels[:limit]
        # Truncation must not cut into an image: the model needs one context token per image feature.
        num_left = int((input_ids == self.img_context_id).sum())
        if num_left < num_context_tokens and limit < total:
            raise UnusableSample(
                f"its {total} tokens are truncated to --max_seq_length {limit}, which leaves {num_left} of "
                f"{num_context_tokens} image tokens: raise --max_seq_length or lower --max_dynamic_patch "
                f"(now {self.max_dynamic_patch})"
            )
        assert num_left == num_context_tokens, f"expected {num_context_tokens} {IMG_CONTEXT_TOKEN}, got {num_left}"
        if (labels == IGNORE_INDEX).all():
            if limit < total:
                reason = f"there is no answer in the first {limit} of its {total} tokens (--max_seq_length)"
            else:
                reason = "the conversation has no answer"
            raise UnusableSample(f"no loss tokens: {reason}")
        return input_ids, labels


def _repeat_records(num_records: int, repeat_time: float, seed: tuple[int, ...]) -> range | np.ndarray:
    """Return the index of each sample's record.

    These are complete copies of the file, then a random part of it, in the order of the file.
    """
    num_copies, num_drawn = divmod(int(num_records * repeat_time), max(1, num_records))
    if (num_copies, num_drawn) == (1, 0):
        return range(num_records)  # unlike an array it takes no memory in workers
    drawn = np.random.default_rng(seed).permutation(num_records)[:num_drawn]
    return np.concatenate([np.tile(np.arange(num_records), num_copies), np.sort(drawn)])
