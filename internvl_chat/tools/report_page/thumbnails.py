"""Small copies of images, embedded in the page.

Paths come from untrusted files: only local regular files are opened, and only as images.
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.file_io import is_remote
from internvl.data.image_files import load_image
from internvl.data.videos import read_frames
from internvl.tools.report_page.text import clean

SINGLE_SIZE, SEVERAL_SIZE = 320, 160  # pixels of the longer side
JPEG_QUALITY = 78
MAX_PAGE_BYTES = 2_000_000  # of all images together


class Thumbnails:
    """Thumbnails of a page, until they are too large together."""

    def __init__(self):
        self.num_bytes = 0
        self.encoded: dict[tuple[str, int], str] = {}  # the HTML of an image

    def render_image(self, path: str, is_single: bool) -> str:
        """Render an image, or a placeholder with the reason and its path."""
        return self._render(path, SINGLE_SIZE if is_single else SEVERAL_SIZE, lambda: load_image(path))

    def render_video(self, path: str) -> str:
        """Render the first frame of a video, or a placeholder."""
        frame = self._render(path, SINGLE_SIZE, lambda: read_frames(path, 1, "middle", fix_start=0)[0])
        return f'{frame}<p class="soft">video {clean(Path(path).name, 80)}</p>'

    def _render(self, path: str, size: int, load_fn: Callable[[], Image.Image]) -> str:
        if (path, size) not in self.encoded:
            self.encoded[path, size] = self._encode(path, size, load_fn)
        html = self.encoded[path, size]
        if self.num_bytes + len(html) > MAX_PAGE_BYTES:
            return make_placeholder(path, "left out, as the page is full")
        self.num_bytes += len(html)
        return html

    def _encode(self, path: str, size: int, load_fn: Callable[[], Image.Image]) -> str:
        if is_remote(path):
            return make_placeholder(path, "not loaded: it is remote")
        try:
            image = load_fn()
        except (UnusableSample, OSError, ValueError, ImportError) as error:
            return make_placeholder(path, "does not exist" if not Path(path).exists() else f"cannot be read: {error}")
        width, height = image.size
        image.thumbnail((size, size))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        title = f"{clean(path, 300)} ({width} x {height})"
        return (
            f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" '
            f'alt="{title}" title="{title}">'
        )


def make_placeholder(path: str, reason: str) -> str:
    """Render what is shown instead of an image."""
    return f'<div class="missing" title="{clean(reason, 300)}"><b>{clean(path, 200)}</b><br>{clean(reason, 120)}</div>'
