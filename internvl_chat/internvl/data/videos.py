"""Choose and read frames of a video.

A video is a video file, a GIF or a folder of images. Each sampled frame becomes one tile.
"""

import os
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any

import numpy as np
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.file_io import MissingPackageError, exists, is_dir, is_remote, list_dir, open_file
from internvl.data.images import load_image, read_image

# Supported containers, by FFmpeg's names. FFmpeg supports more, among them playlists (hls, concat), with which an
# untrusted file could open other files and addresses.
VIDEO_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,rm,mxf,nut,ivf,dv,wtv,swf,"
)
VIDEO_CONTAINERS += "h264,hevc,h263,m4v,av1,obu,vc1,yuv4mpegpipe,mjpeg,gif,apng,wav,mp3,flac,aac"
MAX_FRAME_PIXELS = 8192 * 4320  # per frame; the decoder holds many frames in memory
MAX_GIF_PIXELS = 10**10  # all frames together: each GIF frame is decoded from the one before it

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
        generator: draws for `rand`; by default Python's global generator.
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
    draw: Any = generator or random
    num_distinct = min(num_frames, vlen)
    bounds = np.linspace(0, vlen, num_distinct + 1).astype(int).tolist()
    intervals = [(start, end - 1) for start, end in zip(bounds, bounds[1:], strict=False)]
    if sample == "middle":
        indices = [(a + b) // 2 if fix_start is None else a + fix_start for a, b in intervals]
    elif all(a < b for a, b in intervals):
        # As in upstream, the last frame of an interval is never drawn.
        indices = [draw.choice(range(a, b)) for a, b in intervals]
    else:
        indices = sorted(draw.sample(range(vlen), num_distinct))
    return indices + indices[-1:] * (num_frames - num_distinct)


def count_frames(path: str, num_frames: int, clip: tuple[float, float] | None = None) -> int:
    """Count the frames that `read_frames` returns, without decoding any."""
    kind = _detect_kind(path, clip)
    if kind == "folder":
        return min(num_frames, len(_list_frame_files(path)))
    if kind == "GIF":
        return min(num_frames, read_image(path, _count_gif_frames))
    return num_frames


def read_frames(
    path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    clip: tuple[float, float] | None = None,
    generator: random.Random | None = None,
    check_path_fn: Callable[[str], str] = str,
) -> list[Image.Image]:
    """Read RGB frames, chosen by `get_frame_indices`, from a video.

    A folder or GIF with at most `num_frames` frames returns all of them once; a shorter video file repeats its last.

    Args:
        path: a folder of images, a `.gif`, or any other file, which is opened by PyAV.
        clip: (start, end) in seconds; video files only.
        check_path_fn: returns the path of an image in a folder, or raises if it must not be opened.

    Raises:
        UnusableSample: the video is missing, empty, truncated or broken, a frame exceeds MAX_FRAME_PIXELS, or the clip
            contains no frame.
        ValueError: a package is missing, or `fix_start` exceeds the video.
    """
    kind = _detect_kind(path, clip)

    def choose_fn(total: int, fps: float = 1) -> list[int]:
        indices = get_frame_indices(num_frames, total, sample, fix_start, fps, generator=generator)
        if not all(0 <= index < total for index in indices):
            raise ValueError(f"fix_start {fix_start} selects frame {max(indices)} of the {total} of video {path}.")
        return indices

    if kind == "file":
        frames = _read_video_file(path, clip, choose_fn)
    elif kind == "GIF":
        frames = read_image(path, lambda gif: _read_gif(gif, choose_fn))
    else:
        files = _list_frame_files(path)
        indices = choose_fn(len(files)) if len(files) > num_frames else range(len(files))
        frames = [load_image(check_path_fn(files[index])) for index in indices]
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
            raise UnusableSample(f"clip {clip} is not supported for the {kind} {path}: only video files have seconds")
        are_numbers = isinstance(clip, list | tuple) and all(type(second) in (int, float) for second in clip)
        if not are_numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1]:
            raise UnusableSample(f"clip {clip!r} is not [start, end] in seconds with 0 <= start < end")
    return kind


@contextmanager
def _unusable_if_unreadable(path: str) -> Iterator[None]:
    """Convert an OSError of a disk or object store to UnusableSample."""
    try:
        yield
    except OSError as error:
        raise UnusableSample(f"video {path} cannot be read: {error}") from error


def _require_frame_size(label: str, width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise UnusableSample(f"{label} has frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS:,}")


# -- folders and GIFs --------------------------------------------------------------------------------------------------


def _list_frame_files(path: str) -> list[str]:
    with _unusable_if_unreadable(path):
        names = list_dir(path)
    if not names:
        raise UnusableSample(f"video {path} is an empty folder")
    return sort_frames([os.path.join(path, name) for name in names])


def sort_frames(frame_paths: list[str]) -> list[str]:
    """Sort by frame number, files without one first, then by name."""
    return sorted(frame_paths, key=lambda path: (extract_frame_number(path), path))


def extract_frame_number(filename: str) -> int:
    """Return 17 for `frame_17.jpg`, -1 without such a number."""
    match = re.search(r"_(\d+)\.\w+$", filename)
    return int(match[1]) if match else -1


def _count_gif_frames(gif: Image.Image) -> int:
    num_frames = getattr(gif, "n_frames", 1)
    _require_frame_size("it", *gif.size)
    if num_frames * gif.width * gif.height > MAX_GIF_PIXELS:
        raise UnusableSample(
            f"its {num_frames} frames of {gif.width} x {gif.height} pixels exceed the limit of {MAX_GIF_PIXELS:,} "
            "pixels in all"
        )
    return num_frames


def _read_gif(gif: Image.Image, choose_fn: Callable) -> list[Image.Image]:
    frames = []
    for index in sorted(set(choose_fn(_count_gif_frames(gif)))):
        gif.seek(index)
        frames.append(gif.convert("RGB"))
    return frames


# -- video files -------------------------------------------------------------------------------------------------------


def _read_video_file(path: str, clip: tuple[float, float] | None, choose_fn: Callable) -> list[Image.Image]:
    """Read frames with PyAV, by seeking to key frames if possible.

    If a seek does not reach the requested key frame, the video is decoded from its beginning.
    """
    try:
        import av
    except ImportError as error:
        raise MissingPackageError(f"reading {path} requires the package av: pip install av.") from error

    def open_container():
        options = {"format_whitelist": VIDEO_CONTAINERS, "protocol_whitelist": "file"}
        container = av.open(open_file(path) if is_remote(path) else path, options=options)
        for stream in container.streams.video:
            _require_frame_size(f"video {path}", stream.width, stream.height)
            # The decoder checks as well: frames may be larger than the header declares.
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        return container

    try:
        with open_container() as container:
            frame_times, key_times, fps = _read_frame_times(container, path)
            start, num_frames = _clip_to_frames(path, clip, fps, len(frame_times))
            wanted = [frame_times[start + index] for index in choose_fn(num_frames, fps)]
            frames = _decode_by_seeking(container, wanted, frame_times, key_times)
        if frames is None:
            with open_container() as container:
                frames = _decode_in_order(container, wanted, has_times=key_times is not None)
        return frames
    except av.error.ArgumentError as error:  # FFmpeg's error for what the options above forbid
        raise UnusableSample(
            f"video {path} cannot be read: its container is not supported, or its frames are too large"
        ) from error
    except (av.error.FFmpegError, OSError, StopIteration) as error:
        raise UnusableSample(f"video {path} cannot be read: {error or 'no frame can be decoded'}") from error


def _read_frame_times(container, path: str) -> tuple[list[int], list[int] | None, float]:
    """Read all frame times from the packets, without decoding.

    Frame rates may vary. A stream without times, such as raw H.264, has frame numbers instead.

    Returns:
        Ascending times of all frames, ascending times of the key frames (None without times), mean frames per second.
    """
    if not container.streams.video:
        kinds = ", ".join(stream.type for stream in container.streams)
        raise UnusableSample(f"video {path} has no video stream, only {kinds or 'no stream at all'}")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # Only three fields of each packet are kept: the packets together are as large as the file.
    packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
    if "mp4" in container.format.name and len(packets) < stream.frames:  # the header of mp4 has the exact count
        raise UnusableSample(f"video {path} is truncated: it has {len(packets)} of its {stream.frames} frames")
    shown = [(pts, is_key) for pts, is_key, is_discard in packets if not is_discard]
    fps = float(stream.average_rate or 1)
    if any(pts is None for pts, _ in shown):
        return list(range(len(shown))), None, fps
    return sorted(pts for pts, _ in shown), sorted(pts for pts, is_key in shown if is_key), fps


def _clip_to_frames(path: str, clip: tuple[float, float] | None, fps: float, total: int) -> tuple[int, int]:
    """Convert a clip in seconds to (first frame, number of frames)."""
    if total == 0:
        raise UnusableSample(f"video {path} has no frame")
    if clip is None:
        return 0, total
    start, num_frames = int(clip[0] * fps), int((clip[1] - clip[0]) * fps)
    num_frames = min(num_frames, total - start)
    if num_frames < 1:
        raise UnusableSample(f"clip {clip} of video {path} ({total} frames, {fps:g} per second) contains no frame")
    return start, num_frames


def _decode_by_seeking(
    container, wanted: list[int], frame_times: list[int], key_times: list[int] | None
) -> list[Image.Image] | None:
    """Decode the frames at the `wanted` times, each from its key frame.

    Returns None if a seek does not reach the requested key frame.
    """
    if not key_times:
        return None
    stream, known_times = container.streams.video[0], set(frame_times)
    frames = []
    for key, group in groupby(wanted, lambda time: key_times[max(0, bisect_right(key_times, time) - 1)]):
        container.seek(key, stream=stream)
        decoded = container.decode(stream)
        first = next(decoded, None)
        if first is None or first.pts not in known_times or first.pts > key:
            return None
        frames += _pick_frames(group, ((frame.pts, frame) for frame in chain([first], decoded)))
    return frames


def _decode_in_order(container, wanted: list[int], has_times: bool) -> list[Image.Image]:
    """Decode from the beginning up to the last wanted frame."""
    decoded = enumerate(container.decode(container.streams.video[0]))
    return _pick_frames(wanted, ((frame.pts if has_times else number, frame) for number, frame in decoded))


def _pick_frames(wanted: Iterable[int], timed_frames: Iterator[tuple]) -> list[Image.Image]:
    """Pick the frame of each of ascending `wanted` times.

    It is the first frame at or after the time, else the last one.

    Args:
        timed_frames: (time, frame) in order.
    """
    images = []
    time, frame = next(timed_frames)
    for wanted_time in wanted:
        while time < wanted_time:
            time, frame = next(timed_frames, (wanted_time, frame))
        # Files of rotated cameras store the degrees by which to rotate frames counterclockwise.
        images.append(frame.to_image().rotate(frame.rotation, expand=True))
    return images
