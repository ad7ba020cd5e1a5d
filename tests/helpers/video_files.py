"""Videos whose frames reveal their numbers.

Frame k is gray of level 6 k.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

NUM_FRAMES = 40


def draw_gray_frame(index: int, width: int = 48, height: int = 32) -> np.ndarray:
    """Draw frame `index`: uint8 (height, width, 3)."""
    return np.full((height, width, 3), 6 * index, np.uint8)


def read_frame_number(frame: Image.Image) -> int:
    """Read the number of a gray frame from its level."""
    assert frame.mode == "RGB"
    return round(np.asarray(frame).mean() / 6)


def read_frame_numbers(frames: Iterable[Image.Image]) -> list[int]:
    """Read the numbers of gray frames."""
    return [read_frame_number(frame) for frame in frames]


def write_video(
    path: Path,
    frames: int = NUM_FRAMES,
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (48, 32),
    key_every: int = 12,
    b_frames: int = 0,
    hundredths: list[int] | None = None,
    rotation: int = 0,
    draw_fn: Callable = draw_gray_frame,
    has_sound: bool = False,
    **options: str,
) -> str:
    """Write a video file of 10 frames per second; return its path.

    Args:
        key_every: distance of key frames.
        b_frames: most frames in a row that are decoded from later ones.
        hundredths: times of the frames in 1/100 s, instead of 10 frames per second.
        rotation: degrees by which a player rotates the frames counterclockwise.
        options: of the container.
    """
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", key_every
        context = stream.codec_context
        if codec.startswith("mpeg"):
            context.qmin = context.qmax = 1  # best quality: gray levels survive
        context.max_b_frames = b_frames
        if hundredths:
            context.time_base = Fraction(1, 100)
        if rotation:
            stream.set_display_rotation(rotation)
        if has_sound:
            audio = container.add_stream("aac", rate=8000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * 4), np.float32), "fltp", "mono")
            silence.rate, silence.pts = 8000, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(draw_fn(index, *size), format="rgb24")
            if hundredths:
                frame.pts, frame.time_base = hundredths[index], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.start_encoding()  # writes the header even if there is no frame
        container.mux(stream.encode())
    return str(path)


def write_gif(path: Path, frames: int = NUM_FRAMES) -> str:
    """Write an animated GIF and return its path."""
    first, *rest = [Image.fromarray(draw_gray_frame(index)) for index in range(frames)]
    first.save(path, save_all=True, append_images=rest)
    return str(path)


def write_frame_folder(path: Path, frames: int = NUM_FRAMES) -> str:
    """Write a folder of frames and a hidden file; return its path."""
    path.mkdir()
    (path / ".DS_Store").write_text("left by a file manager")
    for index in range(frames):
        Image.fromarray(draw_gray_frame(index)).save(path / f"frame_{index}.png")
    return str(path)
