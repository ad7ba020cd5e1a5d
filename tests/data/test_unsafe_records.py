"""Untrusted data: paths outside the root, images that exhaust memory."""

import os
import re
import struct
import zlib

import pytest
from helpers.samples import ANSWER, QUESTION
from helpers.video_files import write_video
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.file_io import require_inside_root
from internvl.data.videos import count_frames, read_frames
from internvl.planning.sample_lengths import measure_dataset

IMAGE_TURNS = [QUESTION, ANSWER]
VIDEO_TURNS = [QUESTION | {"value": "<video>\nWhat happens?"}, ANSWER]


def get_reasons(dataset) -> list[str]:
    """Return the measured reason of each unusable sample; `get` must agree.

    It is "" where only decoding reveals one.
    """
    measured = dict(measure_dataset(dataset, show_progress=False, cache_dir=f"{dataset.root}/cache").unusable)
    for index in range(len(dataset)):
        with pytest.raises(UnusableSample) as caught:
            dataset.get(index, 0)
        assert measured.get(index, str(caught.value)) == str(caught.value)
    return [measured.get(index, "") for index in range(len(dataset))]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path_factory):
    """Make a folder outside the root: an image, frames, a video file."""
    folder = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (30, 30)).save(folder / "secret.png")
    (folder / "frames").mkdir()
    Image.new("RGB", (30, 30)).save(folder / "frames/frame_1.png")
    write_video(folder / "secret.mp4")
    return folder


def test_paths_outside_the_root_are_refused(make_dataset, tmp_path, secret):
    (tmp_path / "link.png").symlink_to(secret / "secret.png")
    (tmp_path / "linked").symlink_to(secret)
    (tmp_path / "linked_frames").mkdir()
    (tmp_path / "linked_frames/frame_1.png").symlink_to(secret / "secret.png")
    beside = f"../{secret.name}/secret.png"
    images = [f"{secret}/secret.png", beside, f"frames/../{beside}", "link.png", "linked/secret.png", "/dev/zero"]
    images += [f"file://{secret}/secret.png", f"local://{secret}/secret.png", "http://127.0.0.1:9/secret.png"]
    images += [f"simplecache::file://{secret}/secret.png", "s3://bucket/secret.png", "."]
    videos = [
        f"{secret}/frames",
        "linked/frames",
        "linked/secret.mp4",
        f"../{secret.name}/secret.mp4",
        "http://127.0.0.1:9/a.mp4",
    ]
    records = [{"image": path, "conversations": IMAGE_TURNS} for path in images]
    records += [{"video": path, "conversations": VIDEO_TURNS} for path in videos]
    dataset = make_dataset(*records)
    for reason in get_reasons(dataset):
        assert re.search(r"lies outside the root '.*' of its dataset.*--allow_outside_root True", reason), reason
    # The folder is inside the root, the frame is not.
    with pytest.raises(UnusableSample, match="frame_1.png lies outside the root"):
        make_dataset({"video": "linked_frames", "conversations": VIDEO_TURNS}).get(0, 0)


def test_allow_outside_root(make_dataset, secret):
    records = [{"image": f"{secret}/secret.png", "conversations": IMAGE_TURNS}]
    records += [{"video": f"{secret}/{name}", "conversations": VIDEO_TURNS} for name in ("frames", "secret.mp4")]
    dataset = make_dataset(*records, max_length=1000, allow_outside_root=True)
    assert not measure_dataset(dataset, show_progress=False, cache_dir=f"{dataset.root}/cache").unusable
    # Lengths that were cached with the flag are not used without it.
    dataset = make_dataset(*records, max_length=1000)
    assert len(measure_dataset(dataset, show_progress=False, cache_dir=f"{dataset.root}/cache").unusable) == 3


def test_root_may_be_a_link_and_contain_links_to_itself(make_dataset, tmp_path, tmp_path_factory):
    (tmp_path / "same.png").symlink_to("a.png")
    (tmp_path / "up").mkdir()
    link = tmp_path_factory.mktemp("links") / "root"
    link.symlink_to(tmp_path)
    records = [
        {"image": path, "conversations": IMAGE_TURNS} for path in ("same.png", "up/../a.png", str(link / "a.png"))
    ]
    for root in (link, f"{link}/"):
        assert len([make_dataset(*records, meta={"root": str(root)}).get(index, 0) for index in range(3)]) == 3


REMOTE_ROOT = "s3://bucket/mine"
JOINED_PATHS = [  # root, path joined to it, whether it is allowed
    ("", "/data/a.png", True),
    ("", "images/a.png", True),
    ("", "s3://bucket/a.png", False),
    ("/", "/data/a.png", True),
    ("/data/mine", "/data/mine/a.png", True),
    ("/data/mine", "/data/mine2/a.png", False),
    (REMOTE_ROOT, f"{REMOTE_ROOT}/a.png", True),
    (REMOTE_ROOT + "/", f"{REMOTE_ROOT}/deep/a.png", True),
    (REMOTE_ROOT, "s3://bucket/mine2/a.png", False),
    (REMOTE_ROOT, f"{REMOTE_ROOT}/../other/a.png", False),
    (REMOTE_ROOT, f"{REMOTE_ROOT}/x::file:///etc/passwd", False),
    (REMOTE_ROOT, "/etc/passwd", False),
    (REMOTE_ROOT, "gs://bucket/mine/a.png", False),
]


@pytest.mark.parametrize("root, path, is_allowed", JOINED_PATHS)
def test_require_inside_root(root, path, is_allowed):
    if is_allowed:
        assert require_inside_root(root, path) == path
    else:
        with pytest.raises(UnusableSample, match="lies outside the root"):
            require_inside_root(root, path)


@pytest.mark.parametrize("path", ["a\0.png", "\ud800.png", "a" * 5000 + ".png", "b/" * 3000])
def test_invalid_paths_are_reported(make_dataset, path):
    (reason,) = get_reasons(make_dataset({"image": path, "conversations": IMAGE_TURNS}))
    assert "must be a path" in reason or "cannot be read: " in reason


# -- images ------------------------------------------------------------------------------------------------------------


def make_png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Make a black one-bit PNG, about 1/1000 byte per pixel."""
    compressor = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(compressor.compress(row * 1000) for _ in range(height // 1000))
    body += compressor.compress(row * (height % 1000))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", body + compressor.flush()), (b"IEND", b"")]
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in all_chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def make_gif(size: int, frames: int) -> bytes:
    """Make a GIF of one-pixel frames on a square canvas."""
    canvas = b"GIF89a" + struct.pack("<HHBBB", size, size, 0x80, 0, 0) + bytes((0, 0, 0, 255, 255, 255))
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return canvas + frame * frames + b";"


def make_eps(script: str) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n{script}\nshowpage\n%%EOF\n".encode()


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def make_bmp(side: int) -> bytes:
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 60, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(6)


LONG_TEXT = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 30 >> 4), 9))  # 128 MB
# PostScript that creates a file if it is run.
MARKER_SCRIPT = "(%s) (w) file dup (ran) writestring closefile"
# File name -> function that makes its content, pattern of the reason.
UNSAFE_IMAGES = {
    "huge.png": (lambda: make_png(60000, 60000), "more than --max_image_pixels"),
    "large.png": (lambda: make_png(9500, 9500), "more than --max_image_pixels"),  # PIL would only warn
    "wide.png": (lambda: make_png(2_000_000_000, 1), "cannot be read"),
    "none.png": (lambda: make_png(0, 0), "cannot be read"),
    "text.png": (lambda: make_png(20, 20, LONG_TEXT), "too large"),
    "profile.png": (lambda: make_png(20, 20, (b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 27), 9))), "too large"),
    "truncated.png": (lambda: truncate(make_png(2000, 2000)), "truncated"),
    "huge.bmp": (lambda: make_bmp(30000), "more than --max_image_pixels"),
    "canvas.gif": (lambda: make_gif(65535, 3), "more than --max_image_pixels"),
    "vector.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///"/></svg>', "SVG"),
    "script.png": (lambda: make_eps(MARKER_SCRIPT), "EPS"),
}  # fmt: skip


def test_unsafe_images_are_reported_and_exhaust_no_memory(make_dataset, tmp_path, measure_memory_peak):
    for name, (make_content_fn, _) in UNSAFE_IMAGES.items():
        data = make_content_fn().replace(b"%s", os.fsencode(tmp_path / "marker"))
        (tmp_path / name).write_bytes(data)
    dataset = make_dataset(*({"image": name, "conversations": IMAGE_TURNS} for name in UNSAFE_IMAGES))
    measure_memory_peak()
    measured = get_reasons(dataset)
    assert measure_memory_peak() < 100e6
    for index, (name, (_, reason)) in enumerate(UNSAFE_IMAGES.items()):
        with pytest.raises(UnusableSample) as caught:
            dataset.get(index, 0)
        size = (tmp_path / name).stat().st_size
        message = str(caught.value)
        assert re.search(rf"{name} \({size} bytes\).*{reason}", message, re.DOTALL), (measured[index], message)
    assert not (tmp_path / "marker").exists()


def test_gifs_with_too_many_pixels_are_refused(make_dataset, tmp_path, measure_memory_peak):
    for name, content in (("large.gif", make_gif(9000, 3)), ("long.gif", make_gif(2000, 3000))):
        (tmp_path / name).write_bytes(content)
    measure_memory_peak()
    for function in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match="large.gif .*frames of 9000 x 9000 pixels"):
            function(str(tmp_path / "large.gif"), 8)
        with pytest.raises(UnusableSample, match="long.gif .*3000 frames of 2000 x 2000 pixels exceed the limit"):
            function(str(tmp_path / "long.gif"), 8)
    assert measure_memory_peak() < 150e6
