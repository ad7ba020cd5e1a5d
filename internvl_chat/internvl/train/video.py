"""Frames of a video: which ones, and reading them from a film, a GIF or a folder of pictures.

Used by `dataset.py`; each frame becomes one tile.
"""

import os
import random
import re

import numpy as np
from PIL import Image

from internvl.train.constants import BadSample
from internvl.train.image import load_image, read_image


def get_frame_indices(
    num_frames: int,
    vlen: int,
    sample: str = "rand",
    fix_start: int | None = None,
    input_fps: float = 1,
    max_num_frames: int = -1,
    generator: random.Random | None = None,
) -> list[int]:
    """Choose frames of a video that has `vlen` of them.

    Args:
        num_frames: how many; a shorter video repeats its last frame.
        sample: `rand` (one frame at random from each of equal intervals), `middle` (the middle of each) or `fpsX` (X
            frames per second, `num_frames` is not looked at).
        fix_start: with `middle`, the frame at this offset in each interval instead.
        input_fps: frames per second of the video.
        max_num_frames: with `fpsX`, keep at most this many, if positive.
        generator: draws for `rand`; by default Python's shared one.
    """
    if sample.startswith("fps"):
        step = 1 / float(sample[3:])
        seconds = np.arange(step / 2, vlen / input_fps + step / 2, step)
        indices = [int(i) for i in np.around(seconds * input_fps) if i < vlen]
        return indices[:max_num_frames] if max_num_frames > 0 else indices
    if sample not in ("rand", "middle"):
        raise ValueError(f"frame sampling {sample!r} is not rand, middle or fps followed by a number.")
    if vlen < 1:
        raise BadSample("the video has no frame")
    generator = generator or random
    wanted = min(num_frames, vlen)
    bounds = np.linspace(0, vlen, wanted + 1).astype(int).tolist()
    intervals = [(start, end - 1) for start, end in zip(bounds, bounds[1:], strict=False)]
    if sample == "middle":
        indices = [(a + b) // 2 if fix_start is None else a + fix_start for a, b in intervals]
    elif all(a < b for a, b in intervals):
        indices = [generator.choice(range(a, b)) for a, b in intervals]
    else:
        indices = sorted(generator.sample(range(vlen), wanted))
    return indices + indices[-1:] * (num_frames - wanted)


def count_frames(path: str, num_frames: int) -> int:
    """How many frames `read_frames` gives when asked for `num_frames`; no picture is decoded."""
    _check_exists(path)
    if os.path.isdir(path):
        return min(num_frames, len(_frame_files(path)))
    if path.endswith(".gif"):
        return min(num_frames, read_image(path, lambda gif: getattr(gif, "n_frames", 1)))
    return num_frames


def read_frames(
    path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    clip: tuple[float, float] | None = None,
    generator: random.Random | None = None,
) -> list[Image.Image]:
    """RGB frames of a video: a folder of pictures, a `.gif`, or any film that PyAV opens.

    A folder or GIF gives all its frames if there are not more than asked for; a film that is too short repeats its
    last.

    Args:
        clip: (start, end) in seconds; films only.

    Raises:
        BadSample: missing, empty or broken.
    """
    _check_exists(path)
    if os.path.isdir(path):
        return read_frames_folder(path, num_frames, sample, fix_start, generator)
    if path.endswith(".gif"):
        return read_frames_gif(path, num_frames, sample, fix_start, generator)
    return read_frames_film(path, num_frames, sample, fix_start, clip, generator)


def _check_exists(path: str) -> None:
    if not os.path.exists(path):
        raise BadSample(f"video {path} does not exist")


def read_frames_folder(path, num_frames, sample="rand", fix_start=None, generator=None) -> list[Image.Image]:
    """Frames from a folder of pictures, see `sort_frames`."""
    files = _frame_files(path)
    if len(files) > num_frames:
        files = [files[i] for i in get_frame_indices(num_frames, len(files), sample, fix_start, generator=generator)]
    return [load_image(file) for file in files]


def _frame_files(path: str) -> list[str]:
    names = os.listdir(path)
    if not names:
        raise BadSample(f"video {path} is an empty folder")
    return sort_frames([os.path.join(path, name) for name in names])


def sort_frames(frame_paths: list[str]) -> list[str]:
    """By the number at the end of the name, files without one first, then by name."""
    return sorted(frame_paths, key=lambda path: (extract_frame_number(path), path))


def extract_frame_number(filename: str) -> int:
    """17 from `frame_17.jpg`, -1 if there is no such number."""
    match = re.search(r"_(\d+)\.\w+$", filename)
    return int(match[1]) if match else -1


def read_frames_gif(path, num_frames, sample="rand", fix_start=None, generator=None) -> list[Image.Image]:
    """Frames of an animated GIF."""

    def frames(gif: Image.Image) -> list[Image.Image]:
        total = getattr(gif, "n_frames", 1)
        chosen = get_frame_indices(min(num_frames, total), total, sample, fix_start, generator=generator)
        pictures = []
        for index in chosen:
            gif.seek(index)
            pictures.append(gif.convert("RGB"))
        return pictures

    return read_image(path, frames)


def read_frames_film(path, num_frames, sample="rand", fix_start=None, clip=None, generator=None) -> list[Image.Image]:
    """Frames of a film, each decoded from the nearest key frame before it."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"reading {path} needs the package av: pip install av.") from error
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # Times of all frames come from the packets: nothing is decoded, and a variable frame rate does no harm.
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
            times = sorted(time for time, _ in packets)
            fps = float(stream.average_rate or 1)
            start, vlen = _clip_range(clip, fps, len(times))
            chosen = get_frame_indices(num_frames, vlen, sample, fix_start, fps, generator=generator)
            keys = sorted(time for time, is_key in packets if is_key)
            return _decode(container, stream, [times[start + index] for index in chosen], np.array(keys))
    except (av.error.FFmpegError, IndexError, StopIteration) as error:
        raise BadSample(f"video {path} cannot be read: {error}") from error


def _clip_range(clip, fps: float, total: int) -> tuple[int, int]:
    """First frame and number of frames of a clip (start, end) in seconds."""
    start, vlen = (0, total) if clip is None else (int(clip[0] * fps), int((clip[1] - clip[0]) * fps))
    vlen = min(vlen, total - start)
    if start < 0 or vlen < 1:
        raise BadSample(f"clip {clip} of a video of {total} frames at {fps:g} per second holds no frame")
    return start, vlen


def _decode(container, stream, times: list[int], keys: np.ndarray) -> list[Image.Image]:
    """The frames shown at `times`, which ascend, in units of the stream's clock; `keys` are the times of key frames."""
    frames, frame, decoder = [], None, None
    for time in times:
        key = int(keys[max(0, np.searchsorted(keys, time, side="right") - 1)])
        if frame is None or key > frame.pts:
            container.seek(key, stream=stream)
            decoder = container.decode(stream)
            frame = next(decoder)
        while frame.pts < time and (following := next(decoder, None)):
            frame = following
        frames.append(frame.to_image())
    return frames
