"""Videos whose frame k is grey of level 6 k, so that a frame tells its number."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

TOTAL = 40


def grey(k: int, width: int = 48, height: int = 32) -> np.ndarray:
    return np.full((height, width, 3), 6 * k, np.uint8)


def number(frame: Image.Image) -> int:
    assert frame.mode == "RGB"
    return round(np.asarray(frame).mean() / 6)


def film(
    path: Path,
    frames: int = TOTAL,
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (48, 32),
    key_every: int = 12,
    b_frames: int = 0,
    hundredths: list[int] | None = None,
    turned: int = 0,
    draw: Callable = grey,
    sound: bool = False,
    **options: str,
) -> str:
    """A film of 10 frames per second, or with frames shown at these `hundredths` of a second."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", key_every
        context = stream.codec_context
        if codec.startswith("mpeg"):
            context.qmin = context.qmax = 1
        context.max_b_frames = b_frames
        if hundredths:
            context.time_base = Fraction(1, 100)
        if turned:
            stream.set_display_rotation(turned)
        if sound:
            audio = container.add_stream("aac", rate=8000, layout="mono")
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * 4), np.float32), "fltp", "mono")
            noise.rate, noise.pts = 8000, 0
            container.mux(audio.encode(noise))
            container.mux(audio.encode())
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(k, *size), format="rgb24")
            if hundredths:
                frame.pts, frame.time_base = hundredths[k], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.start_encoding()  # also where there is no frame
        container.mux(stream.encode())
    return str(path)


def gif(path: Path, frames: int = TOTAL) -> str:
    first, *rest = [Image.fromarray(grey(k)) for k in range(frames)]
    first.save(path, save_all=True, append_images=rest)
    return str(path)


def folder(path: Path, frames: int = TOTAL) -> str:
    path.mkdir()
    (path / ".DS_Store").write_text("left by a file manager")
    for k in range(frames):
        Image.fromarray(grey(k)).save(path / f"frame_{k}.png")
    return str(path)
