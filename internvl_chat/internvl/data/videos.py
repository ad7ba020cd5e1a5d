"""Choose and read frames of a video.

A video is a video file, a GIF or a folder of images. Each sampled frame becomes one tile. Video files are decoded in
`video_files.py`.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from internvl.constants import UnusableSample, shorten
from internvl.data.file_io import exists, is_dir, is_remote, list_files
from internvl.data.image_files import (
    DEFAULT_DECODING,
    IMAGE_SUFFIXES,
    ImageDecoding,
    convert_to_rgb,
    load_image,
    read_image,
)
from internvl.data.outages import is_outage
from internvl.data.video_files import read_video_file, require_frame_size, require_usable_video_file

MAX_GIF_PIXELS = 10**10  # all frames together: each GIF frame is decoded from the one before it
MAX_CLIP_SECONDS = 1_000_000

# -- sampling ----------------------------------------------------------------------------------------------------------


def get_frame_indices(
    num_frames: int,
    vlen: int,
    sample: str = "rand",
    fix_start: int | None = None,
    input_fps: float = 1,
    max_num_frames: int = -1,
    generator: random.Random | None = None,
) -> list[int]:
    """Choose frames of a video that has `vlen` frames.

    Args:
        num_frames: how many; a shorter video repeats its last frame.
        sample: `rand` (a random frame of each of equal intervals), `middle` (the middle frame of each) or `fpsX` (X
            frames per second; `num_frames` is ignored).
        fix_start: with `middle`, take the frame at this offset in each interval instead.
        input_fps: frames per second of the video.
        max_num_frames: with `fpsX`, keep at most this many frames, if positive.
        generator: makes all draws for `rand`. By default the global generators of Python and numpy do, as in upstream:
            with their seeds, the frames are upstream's.
    """
    if sample.startswith("fps"):
        step = 1 / float(sample[3:])
        seconds = np.arange(step / 2, vlen / input_fps + step / 2, step)
        indices = [int(i) for i in np.around(seconds * input_fps) if i < vlen]
        return indices[:max_num_frames] if max_num_frames > 0 else indices
    if sample not in ("rand", "middle"):
        raise ValueError(f"frame sampling {sample!r} is not supported: expected rand, middle or fps and a number.")
    if vlen < 1:
        raise UnusableSample("the video has no frame")
    num_distinct = min(num_frames, vlen)
    bounds = np.linspace(0, vlen, num_distinct + 1).astype(int).tolist()
    intervals = [(start, end - 1) for start, end in zip(bounds, bounds[1:], strict=False)]
    if sample == "middle":
        indices = [(a + b) // 2 if fix_start is None else a + fix_start for a, b in intervals]
    elif generator is None:
        indices = _draw_like_upstream(intervals, vlen)
    elif all(a < b for a, b in intervals):
        # As in upstream, the last frame of an interval is never drawn.
        indices = [generator.choice(range(a, b)) for a, b in intervals]
    else:
        indices = sorted(generator.sample(range(vlen), num_distinct))
    return indices + indices[-1:] * (num_frames - num_distinct)


def _draw_like_upstream(intervals: list[tuple[int, int]], vlen: int) -> list[int]:
    """Draw from the global generators: Python's, and numpy's from the first interval of one frame on."""
    try:
        return [random.choice(range(a, b)) for a, b in intervals]
    except IndexError:
        return sorted(map(int, np.random.permutation(vlen)[: len(intervals)]))


def count_frames(
    path: str,
    num_frames: int,
    clip: tuple[float, float] | None = None,
    check_path_fn: Callable[[str], str] = str,
    decoding: ImageDecoding = DEFAULT_DECODING,
) -> int:
    """Count the frames that `read_frames` returns, without decoding any.

    Raises:
        UnusableSample: see `read_frames`. Damage that is only found while decoding is not reported.
    """
    kind = _detect_kind(path, clip)
    if kind == "folder":
        return min(num_frames, len(_list_frame_files(path, check_path_fn)))
    if kind == "GIF":
        return min(num_frames, read_image(path, _count_gif_frames, decoding=decoding))
    require_usable_video_file(path, clip)
    return num_frames


def read_frames(
    path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    clip: tuple[float, float] | None = None,
    generator: random.Random | None = None,
    check_path_fn: Callable[[str], str] = str,
    decoding: ImageDecoding = DEFAULT_DECODING,
) -> list[Image.Image]:
    """Read RGB frames, chosen by `get_frame_indices`, from a video.

    A folder or GIF with at most `num_frames` frames returns all of them once; a shorter video file repeats its last.

    Args:
        path: a folder of images, a `.gif`, or any other file, which is opened by PyAV.
        clip: (start, end) in seconds from the first frame; video files only.
        check_path_fn: returns the path of an image in a folder, or raises if it must not be opened.

    Raises:
        UnusableSample: the video is missing, empty, truncated, broken or too large, or the clip contains no frame.
        ValueError: a package is missing, or `fix_start` exceeds the video.
    """
    kind = _detect_kind(path, clip)

    def choose_fn(total: int, fps: float = 1) -> list[int]:
        indices = get_frame_indices(num_frames, total, sample, fix_start, fps, generator=generator)
        if not all(0 <= index < total for index in indices):
            raise ValueError(f"fix_start {fix_start} selects frame {max(indices)} of the {total} of video {path}.")
        return indices

    if kind == "file":
        frames = read_video_file(path, clip, choose_fn, decoding)
    elif kind == "GIF":
        frames = read_image(path, lambda gif: _read_gif(gif, choose_fn, decoding), decoding=decoding)
    else:
        files = _list_frame_files(path, check_path_fn)
        indices = choose_fn(len(files)) if len(files) > num_frames else range(len(files))
        frames = [load_image(files[index], decoding) for index in indices]
    if not frames:
        raise UnusableSample(f"frame sampling {sample} selects no frame of video {path}")
    return frames


def _detect_kind(path: str, clip: tuple[float, float] | None) -> str:
    """Return `folder`, `GIF` or `file`, after validating the clip."""
    with _unusable_if_unreadable(path):
        if not exists(path):
            raise UnusableSample(f"video {path} does not exist")
        kind = "folder" if is_dir(path) else "GIF" if path.lower().endswith(".gif") else "file"
    if clip is not None:
        if kind != "file":
            raise UnusableSample(
                f"clip {shorten(clip)} is not supported for the {kind} {path}: only video files have seconds"
            )
        are_numbers = isinstance(clip, list | tuple) and all(type(second) in (int, float) for second in clip)
        # NaN fails each comparison.
        if not are_numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1] <= MAX_CLIP_SECONDS:
            raise UnusableSample(
                f"clip {shorten(clip)} is not [start, end] in seconds with 0 <= start < end <= {MAX_CLIP_SECONDS:,}"
            )
    return kind


@contextmanager
def _unusable_if_unreadable(path: str) -> Iterator[None]:
    """Convert an OSError of a disk or object store to UnusableSample, except an outage."""
    try:
        yield
    except OSError as error:
        if is_outage(error):
            raise
        raise UnusableSample(f"video {path} cannot be read: {error}") from error


# -- folders and GIFs --------------------------------------------------------------------------------------------------


def _list_frame_files(path: str, check_path_fn: Callable[[str], str]) -> list[str]:
    """List the image files of a folder in the order of their frames."""
    with _unusable_if_unreadable(path):
        names = list_files(path, IMAGE_SUFFIXES)
    if not names:
        raise UnusableSample(f"video {path} is a folder without image files")
    files = sort_frames([os.path.join(path, name) for name in names])
    for file in files:
        if not is_remote(file) and os.path.islink(file):
            check_path_fn(file)
    return files


def sort_frames(frame_paths: list[str]) -> list[str]:
    """Sort by frame number, files without one first, then in natural order: 2.jpg, 10.jpg."""
    return sorted(frame_paths, key=lambda path: (extract_frame_number(path), _make_natural_key(path), path))


def extract_frame_number(filename: str) -> int:
    """Return 17 for `frame_17.jpg`, -1 without such a number."""
    match = re.search(r"_(\d+)\.\w+$", filename)
    return int(match[1]) if match else -1


def _make_natural_key(path: str) -> list[str | int]:
    """Split into text and numbers: a10b -> ["a", 10, "b"]."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", path))]


def _count_gif_frames(gif: Image.Image) -> int:
    num_frames = getattr(gif, "n_frames", 1)
    require_frame_size("it", *gif.size)
    if num_frames * gif.width * gif.height > MAX_GIF_PIXELS:
        raise UnusableSample(
            f"its {num_frames} frames of {gif.width} x {gif.height} pixels exceed the limit of {MAX_GIF_PIXELS:,} "
            "pixels in all"
        )
    return num_frames


def _read_gif(gif: Image.Image, choose_fn: Callable, decoding: ImageDecoding) -> list[Image.Image]:
    frames = []
    for index in sorted(set(choose_fn(_count_gif_frames(gif)))):
        gif.seek(index)
        frames.append(convert_to_rgb(gif, decoding))
    return frames
