"""Decode frames of video files of unknown origin with PyAV.

PyAV gets the open file, never its path, and FFmpeg may use no protocol: a video cannot open other files or addresses.
Frames have times, so rates may vary.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any, NamedTuple

from packaging.version import Version
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.file_io import MissingPackageError, open_file
from internvl.data.image_files import (
    DEFAULT_DECODING,
    HEAD_BYTES,
    ImageDecoding,
    blend_transparency,
    describe_content,
)
from internvl.data.outages import is_outage
from internvl.versions import require_package

# Supported containers, by FFmpeg's names. FFmpeg supports more, among them playlists (hls, concat), with which an
# untrusted file could open other files and addresses.
VIDEO_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,rm,mxf,nut,ivf,dv,wtv,swf,"
)
VIDEO_CONTAINERS += "h264,hevc,h263,m4v,av1,obu,vc1,yuv4mpegpipe,mjpeg,gif,apng,wav,mp3,flac,aac"
MAX_VIDEO_BYTES = 1 << 34
MAX_FRAME_PIXELS = 8192 * 4320  # per frame; the decoder holds many frames in memory
MAX_VIDEO_FRAMES = 1 << 20  # 9 hours at 30 frames per second

Clip = tuple[float, float]  # start, end in seconds from the first frame


class FrameTimes(NamedTuple):
    """Times of all frames of a video, in units of `seconds_per_unit`.

    A stream without times, such as raw H.264, has frame numbers instead.

    Attributes:
        times: ascending, of all frames.
        end: of the last frame.
        key_times: ascending, of the key frames; None without times.
        fps: mean frames per second.
    """

    times: list[int]
    end: float
    key_times: list[int] | None
    seconds_per_unit: float
    fps: float


def require_usable_video_file(path: str, clip: Clip | None) -> None:
    """Raise UnusableSample unless `read_video_file` finds a frame, without decoding any.

    Packets are read only until it is known.
    """
    with _open_container(path, header_only=True) as container:
        stream = _get_video_stream(container, path)
        packets = []
        for packet in _read_packets(container, path):
            packets.append(packet)
            start, time = packets[0].pts, packet.pts
            if clip is None:
                return
            if start is not None and time is not None and (time - start) * float(stream.time_base) > clip[0]:
                return
        _select_clip(_collect_frame_times(packets, stream), clip, path)


def read_video_file(
    path: str, clip: Clip | None, choose_fn: Callable, decoding: ImageDecoding = DEFAULT_DECODING
) -> list[Image.Image]:
    """Read frames by seeking to key frames if possible.

    If a seek does not reach the requested key frame, the video is decoded from its beginning.

    Args:
        choose_fn: from number of frames and frames per second to the indices of frames.

    Raises:
        UnusableSample: see `videos.read_frames`.
    """
    with _open_container(path) as container:
        frame_times = _collect_frame_times(list(_read_packets(container, path)), _get_video_stream(container, path))
        first, num_frames = _select_clip(frame_times, clip, path)
        wanted = [frame_times.times[first + index] for index in choose_fn(num_frames, frame_times.fps)]
        frames = _decode_by_seeking(container, wanted, frame_times, decoding)
    if frames is None:
        with _open_container(path) as container:
            frames = _decode_in_order(container, wanted, frame_times, decoding)
    return frames


# -- containers --------------------------------------------------------------------------------------------------------


@contextmanager
def _open_container(path: str, header_only: bool = False) -> Iterator:
    """Open a video file.

    Raises:
        UnusableSample: the file, its container or its frames cannot be read.
    """
    require_package("av", f"reading {path}", MissingPackageError)
    import av

    # torchvision 0.21 to 0.24 let Python log FFmpeg's messages. FFmpeg's threads then wait for the GIL while `av` holds
    # it and waits for them: reading a damaged video hangs.
    av.logging.set_level(None)
    head = b""
    try:
        with open_file(path, header_only, MAX_VIDEO_BYTES) as file:
            head = file.read(HEAD_BYTES)
            if not head:
                raise UnusableSample(f"video {path} is empty")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            settings: dict[str, Any] = {"options": {"format_whitelist": VIDEO_CONTAINERS, "protocol_whitelist": "none"}}
            if Version(av.__version__) < Version("19"):  # which stops at tags that are not UTF-8
                settings["metadata_errors"] = "replace"
            with av.open(file, **settings) as container:
                for stream in container.streams.video:
                    if stream.codec_context is None:
                        raise UnusableSample(f"video {path} cannot be read: FFmpeg has no decoder for its codec")
                    require_frame_size(f"video {path}", stream.width, stream.height)
                    # The decoder checks as well: frames may be larger than the header declares.
                    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
                _require_complete(container, size, path)
                yield container
    except av.error.ArgumentError as error:  # FFmpeg's error for what the options above forbid
        reason = describe_content(head) or "its container is not supported, or its frames are too large"
        raise UnusableSample(f"video {path} cannot be read: {reason}") from error
    except FileNotFoundError as error:
        raise UnusableSample(f"video {path} does not exist") from error
    except (av.error.FFmpegError, OSError, StopIteration) as error:
        if not isinstance(error, av.error.FFmpegError) and is_outage(error):  # FFmpeg has EIO for broken files, too
            raise
        reason = str(error).replace(f"{path} ", "it ", 1) or "no frame can be decoded"
        if isinstance(error, av.error.FFmpegError):
            reason = describe_content(head) or reason
        raise UnusableSample(f"video {path} cannot be read: {reason}") from error


def require_frame_size(label: str, width: int, height: int) -> None:
    """Raise UnusableSample if a frame has too many pixels."""
    if width * height > MAX_FRAME_PIXELS:
        raise UnusableSample(f"{label} has frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS:,}")


def _require_complete(container, size: int, path: str) -> None:
    """Raise UnusableSample if an mp4 ends before its frames do.

    Its index has the place of each frame. Other containers have no index, or one behind their frames.
    """
    if "mp4" in container.format.name and container.streams.video:
        entries = container.streams.video[0].index_entries
        num_complete = sum(entry.pos + entry.size <= size for entry in entries)
        if num_complete < len(entries):
            raise UnusableSample(f"video {path} is truncated: it has {num_complete} of its {len(entries)} frames")


def _get_video_stream(container, path: str):
    if not container.streams.video:
        kinds = ", ".join(stream.type for stream in container.streams)
        raise UnusableSample(f"video {path} has no video stream, only {kinds or 'no stream at all'}")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


# -- times -------------------------------------------------------------------------------------------------------------


class _Packet(NamedTuple):
    pts: int | None
    is_keyframe: bool
    duration: int


def _read_packets(container, path: str) -> Iterator[_Packet]:
    """Read the packets of shown frames, without decoding.

    Only three fields of each are kept: the packets together are as large as the file.
    """
    for number, packet in enumerate(container.demux(_get_video_stream(container, path))):
        if number > MAX_VIDEO_FRAMES:
            raise UnusableSample(f"video {path} has more than {MAX_VIDEO_FRAMES:,} frames")
        if packet.size and not packet.is_discard:
            yield _Packet(packet.pts, packet.is_keyframe, packet.duration or 0)


def _collect_frame_times(packets: list[_Packet], stream) -> FrameTimes:
    fps = float(stream.average_rate or 1)
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    if not times or len(times) < len(packets):
        return FrameTimes(list(range(len(packets))), len(packets), None, 1 / fps, fps)
    seconds_per_unit = float(stream.time_base)
    last_duration = next(packet.duration for packet in packets if packet.pts == times[-1])
    end = times[-1] + (last_duration or 1 / (fps * seconds_per_unit))
    key_times = sorted(packet.pts for packet in packets if packet.pts is not None and packet.is_keyframe)
    return FrameTimes(times, end, key_times, seconds_per_unit, fps)


def _select_clip(frame_times: FrameTimes, clip: Clip | None, path: str) -> tuple[int, int]:
    """Return the first frame and the number of frames that are shown during a clip."""
    times = frame_times.times
    if not times:
        raise UnusableSample(f"video {path} has no frame")
    if clip is None:
        return 0, len(times)
    seconds = [(time - times[0]) * frame_times.seconds_per_unit for time in times]
    duration = (frame_times.end - times[0]) * frame_times.seconds_per_unit
    if clip[0] >= duration:
        raise UnusableSample(f"clip {list(clip)} of video {path} contains no frame: the video ends at {duration:g} s")
    first = bisect_right(seconds, clip[0]) - 1  # already shown when the clip starts
    return first, bisect_left(seconds, clip[1]) - first


# -- decoding ----------------------------------------------------------------------------------------------------------


def _decode_by_seeking(
    container, wanted: list[int], frame_times: FrameTimes, decoding: ImageDecoding
) -> list[Image.Image] | None:
    """Decode the frames at the `wanted` times, each from its key frame.

    Returns None if a seek does not reach the requested key frame.
    """
    key_times = frame_times.key_times
    if not key_times:
        return None
    stream, known_times = container.streams.video[0], set(frame_times.times)
    frames = []
    for key, group in groupby(wanted, lambda time: key_times[max(0, bisect_right(key_times, time) - 1)]):
        container.seek(key, stream=stream)
        decoded = container.decode(stream)
        first = next(decoded, None)
        if first is None or first.pts not in known_times or first.pts > key:
            return None
        frames += _pick_frames(group, ((frame.pts, frame) for frame in chain([first], decoded)), decoding)
    return frames


def _decode_in_order(
    container, wanted: list[int], frame_times: FrameTimes, decoding: ImageDecoding
) -> list[Image.Image]:
    """Decode from the beginning up to the last wanted frame."""
    decoded = enumerate(container.decode(container.streams.video[0]))
    has_times = frame_times.key_times is not None
    return _pick_frames(wanted, ((frame.pts if has_times else number, frame) for number, frame in decoded), decoding)


def _pick_frames(wanted: Iterable[int], timed_frames: Iterator[tuple], decoding: ImageDecoding) -> list[Image.Image]:
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
        images.append(_convert_frame(frame, decoding).rotate(frame.rotation, expand=True))
    return images


def _convert_frame(frame, decoding: ImageDecoding) -> Image.Image:
    """Convert a frame to RGB, see `convert_to_rgb`."""
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    if not has_alpha or decoding.is_upstream:
        return frame.to_image()
    return blend_transparency(Image.fromarray(frame.to_ndarray(format="rgba")), decoding.background)
