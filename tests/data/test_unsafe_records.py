"""Data of a stranger: records that lead out of their folder, and pictures and films made to take memory or time."""

import os
import re
import struct
import zlib

import pytest
from helpers.samples import ANSWER, QUESTION
from helpers.video_files import film
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.file_io import require_inside_root
from internvl.data.videos import count_frames, read_frames
from internvl.planning.sample_lengths import measure_dataset

TURNS = [QUESTION, ANSWER]
FRAMES = [QUESTION | {"value": "<video>\nWhat happens?"}, ANSWER]


def reasons(dataset) -> list[str]:
    """Why each sample is bad when it is measured, and again when it is read."""
    measured = dict(measure_dataset(dataset, progress=False, cache_dir=f"{dataset.root}/cache").bad)
    for index in range(len(dataset)):
        with pytest.raises(UnusableSample) as caught:
            dataset.get(index, 0)
        assert measured.get(index, str(caught.value)) == str(caught.value)
    return [measured.get(index, "") for index in range(len(dataset))]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path_factory):
    """A folder beside the root with a picture, a folder of pictures and a film; none of them for this data set."""
    folder = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (30, 30)).save(folder / "secret.png")
    (folder / "film").mkdir()
    Image.new("RGB", (30, 30)).save(folder / "film/frame_1.png")
    film(folder / "secret.mp4")
    return folder


def test_records_lead_nowhere_outside_their_root(make, tmp_path, secret):
    (tmp_path / "link.png").symlink_to(secret / "secret.png")
    (tmp_path / "linked").symlink_to(secret)
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/frame_1.png").symlink_to(secret / "secret.png")
    beside = f"../{secret.name}/secret.png"
    pictures = [f"{secret}/secret.png", beside, f"film/../{beside}", "link.png", "linked/secret.png", "/dev/zero"]
    pictures += [f"file://{secret}/secret.png", f"local://{secret}/secret.png", "http://127.0.0.1:9/secret.png"]
    pictures += [f"simplecache::file://{secret}/secret.png", "s3://bucket/secret.png", "."]
    films = [
        f"{secret}/film",
        "linked/film",
        "linked/secret.mp4",
        f"../{secret.name}/secret.mp4",
        "http://127.0.0.1:9/a.mp4",
    ]
    records = [{"image": path, "conversations": TURNS} for path in pictures]
    records += [{"video": path, "conversations": FRAMES} for path in films]
    dataset = make(*records)
    for reason in reasons(dataset):
        assert re.search(r"lies outside the root '.*' of its data set.*--allow_outside_root True", reason), reason
    # The folder itself is in its place, the picture in it is not.
    with pytest.raises(UnusableSample, match="frame_1.png lies outside the root"):
        make({"video": "frames", "conversations": FRAMES}).get(0, 0)


def test_the_flag_opens_what_lies_outside(make, secret):
    records = [{"image": f"{secret}/secret.png", "conversations": TURNS}]
    records += [{"video": f"{secret}/{name}", "conversations": FRAMES} for name in ("film", "secret.mp4")]
    dataset = make(*records, max_length=1000, allow_outside_root=True)
    assert not measure_dataset(dataset, progress=False, cache_dir=f"{dataset.root}/cache").bad
    # What was measured with the flag is not trusted without it.
    dataset = make(*records, max_length=1000)
    assert len(measure_dataset(dataset, progress=False, cache_dir=f"{dataset.root}/cache").bad) == 3


def test_a_root_may_be_a_link_and_links_within_it_lead_on(make, tmp_path, tmp_path_factory):
    (tmp_path / "same.png").symlink_to("a.png")
    (tmp_path / "up").mkdir()
    link = tmp_path_factory.mktemp("links") / "root"
    link.symlink_to(tmp_path)
    records = [{"image": path, "conversations": TURNS} for path in ("same.png", "up/../a.png", str(link / "a.png"))]
    for root in (link, f"{link}/"):
        assert len([make(*records, meta={"root": str(root)}).get(index, 0) for index in range(3)]) == 3


REMOTE = "s3://bucket/mine"
PLACES = [  # root, path as joined, whether it may be opened
    ("", "/data/a.png", True),
    ("", "pictures/a.png", True),
    ("", "s3://bucket/a.png", False),
    ("/", "/data/a.png", True),
    ("/data/mine", "/data/mine/a.png", True),
    ("/data/mine", "/data/mine2/a.png", False),
    (REMOTE, f"{REMOTE}/a.png", True),
    (REMOTE + "/", f"{REMOTE}/deep/a.png", True),
    (REMOTE, "s3://bucket/mine2/a.png", False),
    (REMOTE, f"{REMOTE}/../other/a.png", False),
    (REMOTE, f"{REMOTE}/x::file:///etc/passwd", False),
    (REMOTE, "/etc/passwd", False),
    (REMOTE, "gs://bucket/mine/a.png", False),
]


@pytest.mark.parametrize("root, path, allowed", PLACES)
def test_what_lies_inside(root, path, allowed):
    if allowed:
        assert require_inside_root(root, path) == path
    else:
        with pytest.raises(UnusableSample, match="lies outside the root"):
            require_inside_root(root, path)


@pytest.mark.parametrize("path", ["a\0.png", "\ud800.png", "a" * 5000 + ".png", "b/" * 3000])
def test_paths_that_are_none(make, path):
    (reason,) = reasons(make({"image": path, "conversations": TURNS}))
    assert "not a path" in reason or "cannot be read: " in reason


# -- pictures ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A black one-bit PNG, whatever its size: a thousandth of a byte a pixel."""
    packed = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(packed.compress(row * 1000) for _ in range(height // 1000)) + packed.compress(row * (height % 1000))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body + packed.flush()), (b"IEND", b"")]
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def gif(size: int, frames: int) -> bytes:
    """Frames of one pixel on a canvas of size x size."""
    canvas = b"GIF89a" + struct.pack("<HHBBB", size, size, 0x80, 0, 0) + bytes((0, 0, 0, 255, 255, 255))
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return canvas + frame * frames + b";"


def eps(script: str) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n{script}\nshowpage\n%%EOF\n".encode()


def cut(picture: bytes) -> bytes:
    return picture[: len(picture) // 2]


def bmp(side: int) -> bytes:
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 60, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(6)


LONG_TEXT = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 30 >> 4), 9))  # 128 MB
MARKER = "(%s) (w) file dup (ran) writestring closefile"
# Name: what it is, and what is said of it.
BOMBS = {
    "huge.png": (lambda: png(60000, 60000), r"exceeds limit of|decompression bomb"),
    "large.png": (lambda: png(9500, 9500), "exceeds limit of"),  # PIL would only warn
    "wide.png": (lambda: png(2_000_000_000, 1), "cannot be read"),
    "none.png": (lambda: png(0, 0), "cannot be read"),
    "text.png": (lambda: png(20, 20, LONG_TEXT), "too large"),
    "profile.png": (lambda: png(20, 20, (b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 27), 9))), "too large"),
    "cut.png": (lambda: cut(png(2000, 2000)), "truncated"),
    "huge.bmp": (lambda: bmp(30000), "exceeds limit of"),
    "canvas.gif": (lambda: gif(65535, 3), "exceeds limit of"),
    "vector.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///"/></svg>', "not an image"),
    "script.png": (lambda: eps(MARKER), "not an image"),
}  # fmt: skip


def test_pictures_made_to_take_memory_are_bad_samples(make, tmp_path, peak):
    for name, (content, _) in BOMBS.items():
        data = content().replace(b"%s", os.fsencode(tmp_path / "marker"))
        (tmp_path / name).write_bytes(data)
    dataset = make(*({"image": name, "conversations": TURNS} for name in BOMBS))
    peak()
    measured = reasons(dataset)
    assert peak() < 100e6
    for index, (name, (_, said)) in enumerate(BOMBS.items()):
        with pytest.raises(UnusableSample) as caught:
            dataset.get(index, 0)
        size = (tmp_path / name).stat().st_size
        assert re.search(rf"{name} \({size} bytes\).*{said}", str(caught.value), re.DOTALL), (
            measured[index],
            caught.value,
        )
    assert not (tmp_path / "marker").exists()


def test_a_gif_with_many_frames_is_bounded(make, tmp_path, peak):
    for name, content in (("large.gif", gif(9000, 3)), ("long.gif", gif(2000, 3000))):
        (tmp_path / name).write_bytes(content)
    peak()
    for use in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match="large.gif .*frames of 9000 x 9000 pixels"):
            use(str(tmp_path / "large.gif"), 8)
        with pytest.raises(UnusableSample, match="long.gif .*3000 frames of 2000 x 2000 pixels are more than"):
            use(str(tmp_path / "long.gif"), 8)
    assert peak() < 150e6
