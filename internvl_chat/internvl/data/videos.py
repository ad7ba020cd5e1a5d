"""Frames of a video: which ones, and reading them from a film, a GIF or a folder of pictures.

Used by `dataset.py`; each frame becomes one tile.
"""

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby

import numpy as np
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.file_io import MissingPackage, exists, is_dir, is_remote, list_dir, open_file
from internvl.data.images import load_image, read_image

# Containers of films, by FFmpeg's names: it knows others that make it open more files and addresses (hls, concat).
VIDEO_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,rm,mxf,nut,ivf,dv,wtv,swf,"
)
VIDEO_CONTAINERS += "h264,hevc,h263,m4v,av1,obu,vc1,yuv4mpegpipe,mjpeg,gif,apng,wav,mp3,flac,aac"
MAX_FRAME_PIXELS = 8192 * 4320  # a frame may have; there are many of them in memory
MAX_GIF_PIXELS = 10**10  # of all frames of a GIF, in which each is made from the one before


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
        raise UnusableSample("the video has no frame")
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


def count_frames(path: str, num_frames: int, clip: tuple[float, float] | None = None) -> int:
    """How many frames `read_frames` gives when asked for `num_frames`; no picture is decoded."""
    kind = _kind(path, clip)
    if kind == "folder":
        return min(num_frames, len(_frame_files(path)))
    if kind == "gif":
        return min(num_frames, read_image(path, _gif_frames))
    return num_frames


def read_frames(
    path: str,
    num_frames: int,
    sample: str = "rand",
    fix_start: int | None = None,
    clip: tuple[float, float] | None = None,
    generator: random.Random | None = None,
    allowed: Callable[[str], str] = str,
) -> list[Image.Image]:
    """RGB frames of a video: a folder of pictures, a `.gif`, or any film that PyAV opens.

    A folder or GIF gives all its frames if there are not more than asked for; a film that is too short repeats its
    last. Which frames: `get_frame_indices`.

    Args:
        clip: (start, end) in seconds; films only.
        allowed: gives the path of a picture in a folder back, or raises what there is against opening it.

    Raises:
        BadSample: missing, empty, cut short, broken, with frames above FRAME_PIXELS; a clip that holds no frame.
        ValueError: a package is missing.
    """
    kind = _kind(path, clip)

    def choose(total: int, fps: float = 1) -> list[int]:
        chosen = get_frame_indices(num_frames, total, sample, fix_start, fps, generator=generator)
        if not all(0 <= index < total for index in chosen):
            raise ValueError(f"fix_start {fix_start} leads to frame {max(chosen)} of the {total} of video {path}.")
        return chosen

    if kind == "film":
        frames = _read_video_file(path, clip, choose)
    elif kind == "gif":
        frames = read_image(path, lambda gif: _read_gif(gif, choose))
    else:
        files = _frame_files(path)
        chosen = choose(len(files)) if len(files) > num_frames else range(len(files))
        frames = [load_image(allowed(files[index])) for index in chosen]
    if not frames:
        raise UnusableSample(f"sampling {sample} chooses no frame of video {path}")
    return frames


def _kind(path: str, clip) -> str:
    with _as_unusable_sample(path):
        if not exists(path):
            raise UnusableSample(f"video {path} does not exist")
        kind = "folder" if is_dir(path) else "gif" if path.lower().endswith(".gif") else "film"
    if clip is not None:
        if kind != "film":
            raise UnusableSample(f"clip {clip} is in seconds, which the {kind} {path} does not tell; only films do")
        numbers = isinstance(clip, list | tuple) and all(type(second) in (int, float) for second in clip)
        if not numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1]:
            raise UnusableSample(f"clip {clip!r} is not [start, end] in seconds with 0 <= start < end")
    return kind


@contextmanager
def _as_unusable_sample(path: str) -> Iterator[None]:
    """What a disk or a store says instead of giving a video, as a BadSample."""
    try:
        yield
    except OSError as error:
        raise UnusableSample(f"video {path} cannot be read: {error}") from error


# -- folders and GIFs --------------------------------------------------------------------------------------------------


def _frame_files(path: str) -> list[str]:
    with _as_unusable_sample(path):
        names = list_dir(path)
    if not names:
        raise UnusableSample(f"video {path} is an empty folder")
    return sort_frames([os.path.join(path, name) for name in names])


def sort_frames(frame_paths: list[str]) -> list[str]:
    """By the number at the end of the name, files without one first, then by name."""
    return sorted(frame_paths, key=lambda path: (extract_frame_number(path), path))


def extract_frame_number(filename: str) -> int:
    """17 from `frame_17.jpg`, -1 if there is no such number."""
    match = re.search(r"_(\d+)\.\w+$", filename)
    return int(match[1]) if match else -1


def _gif_frames(gif: Image.Image) -> int:
    frames = getattr(gif, "n_frames", 1)
    _refuse_large_frames("it", *gif.size)
    if frames * gif.width * gif.height > MAX_GIF_PIXELS:
        raise UnusableSample(
            f"its {frames} frames of {gif.width} x {gif.height} pixels are more than {MAX_GIF_PIXELS:,} pixels"
        )
    return frames


def _refuse_large_frames(what: str, width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise UnusableSample(f"{what} has frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS:,}")


def _read_gif(gif: Image.Image, choose: Callable) -> list[Image.Image]:
    pictures = []
    for index in sorted(set(choose(_gif_frames(gif)))):
        gif.seek(index)
        pictures.append(gif.convert("RGB"))
    return pictures


# -- films -------------------------------------------------------------------------------------------------------------


def _read_video_file(path: str, clip, choose: Callable) -> list[Image.Image]:
    """Frames of a film, each decoded from the nearest key frame before it, or, where seeking is not exact, in order."""
    try:
        import av
    except ImportError as error:
        raise MissingPackage(f"reading {path} needs the package av: pip install av.") from error

    def opened():
        only = {"format_whitelist": VIDEO_CONTAINERS, "protocol_whitelist": "file"}
        film = av.open(open_file(path) if is_remote(path) else path, options=only)
        for stream in film.streams.video:
            _refuse_large_frames(f"video {path}", stream.width, stream.height)
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # also where it changes on the way
        return film

    try:
        with opened() as film:
            times, keys, fps = _frame_times(film, path)
            start, total = _clip_range(path, clip, fps, len(times))
            shown = [times[start + index] for index in choose(total, fps)]
            frames = _by_seeking(film, shown, times, keys)
        if frames is None:
            with opened() as film:
                decoded = enumerate(film.decode(film.streams.video[0]))
                clock = ((number if keys is None else frame.pts, frame) for number, frame in decoded)
                frames = _frames_at(shown, clock)
        return frames
    except av.error.ArgumentError as error:  # what FFmpeg says to whatever the options above forbid
        raise UnusableSample(f"video {path} cannot be read: no known kind of film, or frames too large") from error
    except (av.error.FFmpegError, OSError, StopIteration) as error:
        raise UnusableSample(f"video {path} cannot be read: {error or 'no frame can be decoded'}") from error


def _frame_times(film, path: str) -> tuple[list[int], list[int] | None, float]:
    """When the frames of a film are shown, ascending; the times of its key frames; its mean frames per second.

    All of it is in the packets: nothing is decoded, and a variable frame rate does no harm. Streams without times, such
    as raw H.264, count their frames instead and have no known keys (None).
    """
    if not film.streams.video:
        raise UnusableSample(f"video {path} has no pictures, only {[stream.type for stream in film.streams]}")
    stream = film.streams.video[0]
    stream.thread_type = "AUTO"
    # Not the packets themselves, which are the whole film.
    packets = [(p.pts, p.is_keyframe, p.is_discard) for p in film.demux(stream) if p.size]
    if "mp4" in film.format.name and len(packets) < stream.frames:  # its header counts exactly
        raise UnusableSample(f"video {path} is cut short: it holds {len(packets)} of its {stream.frames} frames")
    times = [(pts, is_key) for pts, is_key, is_discard in packets if not is_discard]
    fps = float(stream.average_rate or 1)
    if any(pts is None for pts, _ in times):
        return list(range(len(times))), None, fps
    return sorted(pts for pts, _ in times), sorted(pts for pts, is_key in times if is_key), fps


def _clip_range(path: str, clip, fps: float, total: int) -> tuple[int, int]:
    """First frame and number of frames of a clip (start, end) in seconds."""
    if total == 0:
        raise UnusableSample(f"video {path} has no frame")
    if clip is None:
        return 0, total
    start, length = int(clip[0] * fps), int((clip[1] - clip[0]) * fps)
    length = min(length, total - start)
    if length < 1:
        raise UnusableSample(f"clip {clip} of video {path} ({total} frames, {fps:g} per second) holds no frame")
    return start, length


def _by_seeking(film, shown: list[int], times: list[int], keys: list[int] | None) -> list[Image.Image] | None:
    """Frames at the times `shown`, from the last key frame before each; None where a seek does not lead to it."""
    if not keys:
        return None
    stream, known = film.streams.video[0], set(times)
    frames = []
    for key, group in groupby(shown, lambda time: keys[max(0, np.searchsorted(keys, time, side="right") - 1)]):
        film.seek(key, stream=stream)
        decoded = film.decode(stream)
        first = next(decoded, None)
        if first is None or first.pts not in known or first.pts > key:
            return None
        frames += _frames_at(group, ((frame.pts, frame) for frame in chain([first], decoded)))
    return frames


def _frames_at(shown: Iterable[int], clock: Iterator[tuple]) -> list[Image.Image]:
    """Of frames (time, frame) in order, the first at or behind each of the ascending times `shown`, else the last."""
    pictures = []
    time, frame = next(clock)
    for wanted in shown:
        while time < wanted:
            time, frame = next(clock, (wanted, frame))
        # A film says by how much it is to be turned, against the clock, to stand upright.
        pictures.append(frame.to_image().rotate(frame.rotation, expand=True))
    return pictures
