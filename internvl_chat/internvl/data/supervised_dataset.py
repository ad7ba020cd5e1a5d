"""One entry of a meta file as a map from (index, epoch) to a Sample.

    record -> pictures -> tiles -> pixel_values
           -> turns with one `<image>` per picture -> input_ids, labels

`get` walks both lines; `measure` walks the lower one with tile counts from image headers, which is how `lengths.py`
knows every sample before training. A record that cannot be used raises BadSample; nothing is replaced.
"""

import random
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from internvl.arguments.training import DataTrainingArguments
from internvl.constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN, UnusableSample
from internvl.data.annotations import JsonlFile, TableFile, is_table
from internvl.data.chat_tokenization import tokenize_turns
from internvl.data.file_io import join_root, require_inside_root
from internvl.data.images import (
    NORMALIZATION,
    build_transform,
    count_tiles,
    dynamic_preprocess,
    load_image,
    normalize,
    read_image_size,
)
from internvl.data.schema import insert_placeholders, media_paths, read_turns, validate_meta_entry
from internvl.data.videos import count_frames, read_frames


class LazySupervisedDataset(Dataset):
    """Samples of one data set; `(seed, index, epoch)` decides each of them completely.

    Args:
        ds_name: name for messages.
        meta: its entry in the meta file: `root`, `annotation`; optional `repeat_time` (0.3: a random 30 % of the
            records, decided by `seed` and `ds_name`; 2.5: all twice and a random half), `data_augment` (JPEG
            degradation), `max_dynamic_patch` (in place of the flag's).
        tokenizer: knows the image tokens; its `model_max_length` is where samples are cut.
        num_image_token: tokens of one tile.

    Raises:
        ValueError: an entry that cannot be used, in one sentence.
    """

    def __init__(
        self,
        ds_name: str,
        meta: dict,
        tokenizer,
        num_image_token: int,
        data_args: DataTrainingArguments,
        seed: int = 0,
    ):
        validate_meta_entry(ds_name, meta)
        self.ds_name, self.tokenizer, self.num_image_token = ds_name, tokenizer, num_image_token
        self.data_args, self.seed = data_args, seed
        self.root = meta["root"]
        self.data_augment = meta.get("data_augment", False)
        self.max_dynamic_patch = meta.get("max_dynamic_patch", data_args.max_dynamic_patch)
        path = meta["annotation"]
        self.records = TableFile(path) if is_table(path) else JsonlFile(path)
        self.order = _sample_order(len(self.records), meta.get("repeat_time", 1), (seed, *ds_name.encode()))
        if len(self) == 0:
            raise ValueError(
                f"data set {ds_name}: repeat_time {meta.get('repeat_time', 1)} of the {len(self.records)} records in "
                f"{self.records.path} leaves no sample."
            )
        self.img_context_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample number `index` as upstream gives it: tiles normalised, without pictures a white one of flag 0."""
        sample = self.get(index, epoch=0)
        if len(sample["pixel_values"]) == 0:
            white = self._transform(random.Random(0))(Image.new("RGB", (224, 224), (255, 255, 255)))
            sample |= {"pixel_values": white[None], "image_flags": torch.tensor([0])}
        return sample | {
            "pixel_values": normalize(sample["pixel_values"], *NORMALIZATION[self.data_args.normalize_type])
        }

    def get(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """Sample number `index` as this epoch sees it.

        Returns:
            `input_ids`, `labels`, `position_ids` (L,) int64, `pixel_values` (T, 3, S, S) uint8, which `normalize` makes
            ready for the model, `image_flags` (T,) int64. A record without pictures has no tile.

        Raises:
            BadSample: the record cannot be used; the message says why.
        """
        record = self._record(index)
        generator = random.Random(f"{self.seed} {epoch} {index}")
        pictures = self._pictures(record, generator)
        texts = self._texts(record, [len(tiles) for tiles in pictures])
        transform = self._transform(generator)
        tiles = [transform(tile) for tiles in pictures for tile in tiles]
        return {
            **texts,
            "pixel_values": torch.stack(tiles) if tiles else self.empty_tiles(),
            "image_flags": torch.ones(len(tiles), dtype=torch.int64),
        }

    def measure(self, index: int) -> tuple[int, int, int]:
        """(tokens, trained tokens, tiles) of `get(index, any epoch)`, from the text and the headers of its images.

        Raises:
            BadSample: as `get`, but for pictures that only decoding shows to be broken.
        """
        texts, tiles = self.texts(index)
        labels = torch.cat([values for name, values in texts.items() if name.endswith("labels")])  # a pair has two
        return len(labels), int((labels != IGNORE_INDEX).sum()), tiles

    def texts(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        """What `get` gives but for the tiles, and how many those are; raises as `measure`."""
        record = self._record(index)
        tiles = self._tile_counts(record)
        return self._texts(record, tiles), sum(tiles)

    def digest(self, index: int) -> int:
        """A checksum of the record of a sample, from -2^31 to 2^31 - 1."""
        return zlib.crc32(self.records.content(self.order[index])) - (1 << 31)

    def paths(self, index: int) -> list[str]:
        """The files that a sample shows; BadSample when its record cannot be read."""
        return [self._path(path) for path in media_paths(self._record(index))[1]]

    def describe(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        return f"{self.ds_name} line {self.line(index)} ({self.records.path})"

    def line(self, index: int) -> int:
        """Where a sample's record stands in the annotation, counted from 1."""
        return self.records.line(self.order[index])

    def _record(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.ds_name}")
        return self.records[self.order[index]]

    def _path(self, path: str) -> str:
        return self._allowed(join_root(self.root, path))

    def _allowed(self, path: str) -> str:
        return path if self.data_args.allow_outside_root else require_inside_root(self.root, path)

    def _frame_budget(self, path: str) -> int:
        """Frames to ask a video for: decided by its path alone, so that measured lengths hold in every epoch."""
        return random.Random(path).randint(self.data_args.min_num_frame, self.data_args.max_num_frame)

    def _tiling(self, num_images: int) -> dict:
        """Keywords of `dynamic_preprocess` for each image of a record; its images share the budget of tiles."""
        return {
            "min_num": self.data_args.min_dynamic_patch,
            "max_num": max(1, self.max_dynamic_patch // num_images),
            "image_size": self.data_args.force_image_size,
            "use_thumbnail": self.data_args.use_thumbnail,
        }

    def _pictures(self, record: dict, generator: random.Random) -> list[list[Image.Image]]:
        """The tiles of each picture, before the transform."""
        kind, paths = media_paths(record)
        if kind == "video":
            settings = {"clip": record.get("clip"), "generator": generator, "allowed": self._allowed}
            frames = read_frames(self._path(paths[0]), self._frame_budget(paths[0]), **settings)
            return [[frame] for frame in frames]
        images = (load_image(self._path(path)) for path in paths)  # one after the other: they may be large
        if not self.data_args.dynamic_image_size:
            return [[image] for image in images]
        return [dynamic_preprocess(image, **self._tiling(len(paths))) for image in images]

    def _tile_counts(self, record: dict) -> list[int]:
        """How many tiles `_pictures` gives for each picture; nothing is decoded."""
        kind, paths = media_paths(record)
        if kind == "video":
            return [1] * count_frames(self._path(paths[0]), self._frame_budget(paths[0]), record.get("clip"))
        sizes = [read_image_size(self._path(path)) for path in paths]
        if not self.data_args.dynamic_image_size:
            return [1] * len(sizes)
        return [count_tiles(*size, **self._tiling(len(sizes))) for size in sizes]

    def _transform(self, generator: random.Random):
        args = self.data_args
        return build_transform(
            self.data_augment, args.force_image_size, args.pad2square, args.normalize_type, generator, normalized=False
        )

    def empty_tiles(self) -> torch.Tensor:
        side = self.data_args.force_image_size
        return torch.empty(0, 3, side, side, dtype=torch.uint8)

    def _texts(self, record: dict, tiles: list[int]) -> dict[str, torch.Tensor]:
        """What a sample has beside its tiles, for pictures of these numbers of tiles."""
        input_ids, labels = self._tokens(record, tiles)
        return {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(len(input_ids))}

    def _tokens(self, record: dict, tiles: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids`, `labels` of a record whose pictures have these numbers of tiles, cut to the longest allowed."""
        kind, _ = media_paths(record)
        turns = insert_placeholders(read_turns(record), kind, len(tiles))
        counts = [n * self.num_image_token for n in tiles]
        input_ids, labels = tokenize_turns(
            self.data_args.conv_style, turns, self.tokenizer, counts, text_only=kind == "text"
        )
        total, limit = len(input_ids), min(len(input_ids), self.tokenizer.model_max_length)
        input_ids, labels = input_ids[:limit], labels[:limit]
        needed, held = sum(counts), int((input_ids == self.img_context_id).sum())
        if held < needed and limit < total:
            raise UnusableSample(
                f"its {total} tokens are cut to --max_seq_length {limit}, which leaves {held} of {needed} image "
                f"tokens: raise --max_seq_length or lower --max_dynamic_patch (now {self.max_dynamic_patch})"
            )
        assert held == needed, f"{held} {IMG_CONTEXT_TOKEN} for {sum(tiles)} tiles of {self.num_image_token} tokens"
        if (labels == IGNORE_INDEX).all():
            cut = f" in the first {limit} of its {total} tokens (--max_seq_length)" if limit < total else ""
            raise UnusableSample(f"it has no answer to train on{cut}")
        return input_ids, labels


def _sample_order(records: int, repeat_time: float, seed: tuple[int, ...]) -> Sequence[int]:
    """Number of the record that each sample is: whole copies, then, in the order of the file, a random part."""
    copies, part = divmod(int(records * repeat_time), max(1, records))
    if (copies, part) == (1, 0):
        return range(records)  # which costs workers no memory
    drawn = np.random.default_rng(seed).permutation(records)[:part]
    return np.concatenate([np.tile(np.arange(records), copies), np.sort(drawn)])
