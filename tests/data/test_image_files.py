"""Image files become upright RGB of the size that their header tells; unusable ones are reported at once."""

import io
import os
import random
import re
import socket
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import pillow_heif
import pytest
from helpers.samples import ANSWER, QUESTION
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from internvl.constants import UnusableSample
from internvl.data.image_files import (
    IMAGE_FORMATS,
    MAX_PYTHON_DECODER_PIXELS,
    MAX_WHOLE_FILE_BYTES,
    SWAPPING_ORIENTATIONS,
    ImageDecoding,
    load_image,
    pil_loader,
    read_image_size,
)

FAULTS = Path(__file__).parent / "faults"
UPSTREAM = ImageDecoding(is_upstream=True)


def make_noise(size=(90, 70)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


def read_pixels(path, decoding: ImageDecoding = ImageDecoding()) -> np.ndarray:  # noqa: B008  # immutable
    """Load an image (H, W, 3), whose header must tell its size."""
    image = load_image(str(path), decoding)
    assert image.mode == "RGB" and image.size == read_image_size(str(path), decoding)
    return np.asarray(image)


# -- unusable files ----------------------------------------------------------------------------------------------------


def write_half(image: Image.Image, path) -> str:
    image.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_truncated_image_is_unusable_although_its_header_is_valid(tmp_path, suffix):
    path = write_half(make_noise(), tmp_path / f"half.{suffix}")
    with pytest.raises(UnusableSample, match=rf"half\.{suffix} .*cannot be read"):
        load_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("read_fn", [load_image, read_image_size])
def test_invalid_image_files_are_reported(tmp_path, read_fn):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    make_noise((200, 200)).save(tmp_path / "huge.png")
    for name, reason in [
        ("absent.png", "does not exist"),
        ("text.png", "not an image"),
        ("empty.png", "0 bytes.*not an image"),
        ("folder.png", "directory"),
        ("huge.png", "it has 40000 pixels, more than --max_image_pixels 39999"),
    ]:
        with pytest.raises(UnusableSample, match=f"{name}.*{reason}"):
            read_fn(str(tmp_path / name), ImageDecoding(max_pixels=39999))


# Content of a file that is no image of a supported format -> what its message names.
FOREIGN_CONTENT = {
    "PDF document.*convert it to PNG": b"%PDF-1.7\n",
    "EPS drawing": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "SVG drawing": b'<?xml version="1.0"?>\n<!-- made\nby hand --><svg xmlns="http://www.w3.org/2000/svg"/>',
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "HTML page: download": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "pointer of Git LFS.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a video, not an image": b"\0\0\0\x18ftypisom\0\0\2\0isomavc1",
}


@pytest.mark.parametrize("reason", FOREIGN_CONTENT)
def test_files_of_other_kinds_are_named(tmp_path, reason):
    (tmp_path / "a.jpg").write_bytes(FOREIGN_CONTENT[reason])
    for read_fn in (load_image, read_image_size):
        with pytest.raises(UnusableSample, match=reason):
            read_fn(str(tmp_path / "a.jpg"))


def test_only_regular_files_are_opened(make_dataset, tmp_path):
    """Also behind a link, as an image, a frame, a GIF and a video; in measuring and in training."""
    for name in ("fifo.png", "fifo.gif", "fifo.mp4", "one.png", "two.png"):
        os.mkfifo(tmp_path / name)
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(tmp_path / "socket.png"))
    (tmp_path / "link.png").symlink_to("fifo.png")
    for name, target in {"frames_1": "../fifo.png", "frames_2": "absent.png", "frames_3": "/dev/zero"}.items():
        (tmp_path / name).mkdir()
        make_noise().save(tmp_path / name / "frame_1.png")
        (tmp_path / name / "frame_2.png").symlink_to(target)
    images = ("fifo.png", "socket.png", "link.png", "/dev/zero")
    videos = ("fifo.gif", "fifo.mp4", "frames_1", "frames_2", "frames_3")
    records = [{"image": name, "conversations": [QUESTION, ANSWER]} for name in images]
    question = QUESTION | {"value": "<video>\nWhat?"}
    records += [{"video": name, "conversations": [question, ANSWER]} for name in videos]
    dataset = make_dataset(*records, allow_outside_root=True)
    for index, name in enumerate((*images, *videos)):
        reasons = set()
        for method in (dataset.measure, lambda index: dataset.get(index, 0)):
            with pytest.raises(UnusableSample, match=f"{name}.*not a regular file") as caught:
                method(index)
            reasons.add(str(caught.value))
        assert len(reasons) == 1


# -- bounds ------------------------------------------------------------------------------------------------------------


def write_sparse(path: Path, start: bytes, size: int) -> str:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return str(path)


def encode(image: Image.Image, name: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


MANY_BYTES = 340 << 20  # just below 4 per pixel of the default limit
SPARSE_FILES = {
    "a.jpg": (b"\xff\xd8\xff\xe0\0\x10", MANY_BYTES, "header is too large"),
    "a.gif": (b"GIF89a\x09\0\x09\0\0\0\0!\xf9\4", MANY_BYTES, "header is too large"),
    "a.webp": (encode(make_noise(), "WEBP"), MANY_BYTES, f"more than {MAX_WHOLE_FILE_BYTES:,} bytes"),
    "a.avif": (encode(make_noise(), "AVIF"), MANY_BYTES, f"more than {MAX_WHOLE_FILE_BYTES:,} bytes"),
    "a.heic": ((FAULTS / "img/phone.heic").read_bytes(), MANY_BYTES, f"more than {MAX_WHOLE_FILE_BYTES:,} bytes"),
    "b.webp": (encode(make_noise(), "WEBP"), 2 << 30, r"2,147,483,648 bytes, more than"),
    "b.png": (encode(make_noise(), "PNG"), 2 << 30, r"2,147,483,648 bytes, more than"),
}


@pytest.mark.parametrize("name", SPARSE_FILES)
def test_sparse_files_take_neither_memory_nor_time(tmp_path, measure_memory_peak, name):
    start, size, reason = SPARSE_FILES[name]
    path = write_sparse(tmp_path / name, start, size)
    measure_memory_peak()
    for read_fn in (read_image_size, load_image):
        with pytest.raises(UnusableSample, match=reason):
            read_fn(path)
    assert measure_memory_peak() < 50e6


def test_the_limit_of_pixels_is_a_flag(tmp_path, measure_memory_peak):
    """In both directions, and PIL's own setting stays as it is."""
    path = str(tmp_path / "a.png")
    Image.new("1", (20_000, 10_000)).save(path)  # more than twice PIL's default, where it would raise in any case
    for read_fn in (read_image_size, load_image):
        with pytest.raises(UnusableSample, match="it has 200000000 pixels, more than --max_image_pixels 89478485"):
            read_fn(path)
    allowed = ImageDecoding(max_pixels=200_000_000)
    assert read_image_size(path, allowed) == (20_000, 10_000)
    assert ImageDecoding().max_pixels == Image.MAX_IMAGE_PIXELS


SLOW_IMAGES = {
    "QOI": lambda side: b"qoif" + struct.pack(">IIBB", side, side, 3, 0),
    "PPM": lambda side: b"P6 %d %d 65535 " % (side, side),
}


@pytest.mark.parametrize("name", SLOW_IMAGES)
def test_images_that_pil_decodes_in_python_are_limited(tmp_path, name):
    side = int(MAX_PYTHON_DECODER_PIXELS**0.5)
    (tmp_path / "small").write_bytes(SLOW_IMAGES[name](side))
    (tmp_path / "large").write_bytes(SLOW_IMAGES[name](side + 1))
    assert read_image_size(str(tmp_path / "small")) == (side, side)
    for read_fn in (read_image_size, load_image):
        with pytest.raises(UnusableSample, match=f"this kind of {name} would take minutes"):
            read_fn(str(tmp_path / "large"))


def make_tiff(*tags: tuple[int, int, int, int], next_offset: int = 0) -> bytes:
    """Make a one-directory TIFF of 8 x 8 black pixels; `tags` are (tag, type, count, value)."""
    tags = ((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 0), *tags)
    tags += ((278, 4, 1, 8), (279, 4, 1, 64))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", next_offset) + bytes(1 << 20)


def test_metadata_bombs(tmp_path, measure_memory_peak):
    """Directories in a circle or without number, tags that share their bytes, texts that expand."""
    text = PngInfo()
    text.add(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27), 9))
    exif = make_tiff(*((tag, 7, 60_000, 9) for tag in range(1000, 6000)))[: 65_000 - 8]
    circle = make_tiff(next_offset=8)
    contents = {
        "circle.tif": circle,
        "tags.tif": make_tiff(*((tag, 7, 1 << 20, 9) for tag in range(1000, 60_000))),
        "exif.jpg": encode(make_noise(), "JPEG", exif=b"Exif\0\0" + exif),
        "exif.png": encode(make_noise(), "PNG", exif=b"Exif\0\0" + exif),
        "exif.webp": encode(make_noise(), "WEBP", exif=exif),
        "text.png": encode(make_noise(), "PNG", pnginfo=text),
    }
    measure_memory_peak()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        for read_fn in (read_image_size, load_image):
            try:
                read_fn(str(tmp_path / name))
            except UnusableSample as reason:
                assert name in str(reason)
    is_bounded_by_pillow = Version(PIL.__version__) >= Version("13")
    assert measure_memory_peak() < (100e6 if is_bounded_by_pillow else 400e6)


@pytest.mark.parametrize("name", [name for name in IMAGE_FORMATS if name != "PSD"])
def test_damaged_images_are_unusable_samples_or_images(tmp_path, measure_memory_peak, name):
    """Never another error; an image has the size that was measured."""
    content = encode(make_noise((24, 16)), name, **({"sizes": [(24, 16)]} if name == "ICO" else {}))
    generator = random.Random(name)
    measure_memory_peak()
    for trial in range(80):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3, 10])):
            damaged[generator.randrange(min(len(damaged), 100 if trial % 2 else 10**6))] = generator.randrange(256)
        (tmp_path / "a").write_bytes(damaged[: generator.randrange(len(damaged)) if trial % 7 == 0 else None])
        try:
            size = read_image_size(str(tmp_path / "a"))
        except UnusableSample:
            with pytest.raises(UnusableSample):
                load_image(str(tmp_path / "a"))
            continue
        with suppress(UnusableSample):
            assert load_image(str(tmp_path / "a")).size == size
    assert measure_memory_peak() < 1e9  # an image of the most pixels takes this, whatever its bytes


def test_compressed_tiffs(tmp_path):
    """libtiff reads the file itself."""
    noise = make_noise()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"):
        image = noise.convert("1") if compression == "group4" else noise
        image.save(tmp_path / "a.tif", compression=compression)
        assert np.array_equal(read_pixels(tmp_path / "a.tif"), np.asarray(image.convert("RGB")))
        assert np.array_equal(
            np.asarray(pil_loader((tmp_path / "a.tif").read_bytes())), np.asarray(image.convert("RGB"))
        )


# -- orientation -------------------------------------------------------------------------------------------------------

ORIENTED_FORMATS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100},
}


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(ORIENTED_FORMATS)),
    st.integers(0, 9),
    st.tuples(st.integers(20, 40), st.integers(20, 40)),
)
def test_images_are_upright(tmp_path_factory, name, orientation, size):
    path = tmp_path_factory.mktemp("upright") / "a"
    stored = Image.new("RGB", size, (200, 40, 40))
    stored.paste((40, 40, 200), (0, 0, 9, 7))
    stored.save(path, name, exif=make_exif(orientation), **ORIENTED_FORMATS[name])
    pixels = read_pixels(path)
    transposed = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(pixels, np.asarray(transposed))
    is_swapped = orientation in SWAPPING_ORIENTATIONS
    assert pixels.shape[:2] == (size if is_swapped else size[::-1])


def test_orientation_behind_the_pixels_of_a_png(tmp_path):
    """exiftool writes it there."""
    content = encode(make_noise((40, 20)), "PNG", exif=make_exif(6))
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    exif, rest = content[start:end], content[:start] + content[end:]
    (tmp_path / "late.png").write_bytes(rest[:-12] + exif + rest[-12:])
    (tmp_path / "broken.png").write_bytes(rest[:-12] + exif[:-1] + b"?" + rest[-12:])
    assert read_pixels(tmp_path / "late.png").shape == (40, 20, 3)
    assert read_image_size(str(tmp_path / "broken.png")) == (40, 20)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0XX*\0", b"Exif\0\0" + bytes(99)]
)
def test_broken_exif_is_ignored(tmp_path, exif):
    for name in ("JPEG", "PNG", "WEBP"):
        make_noise((40, 20)).save(tmp_path / "a", name, exif=exif)
        assert read_pixels(tmp_path / "a").shape == (20, 40, 3)


def test_tiles_of_rotated_images_are_counted_right(make_dataset, tmp_path):
    for name, options in ORIENTED_FORMATS.items():
        make_noise((300, 100)).save(tmp_path / f"{name}.bin", name, exif=make_exif(6), **options)
    images = [f"{name}.bin" for name in ORIENTED_FORMATS]
    records = [{"image": image, "conversations": [QUESTION, ANSWER]} for image in images]
    for upstream in (False, True):
        flags = {"min_dynamic_patch": 1, "max_dynamic_patch": 5, "upstream_image_decoding": upstream}
        dataset = make_dataset(*records, max_length=4000, dynamic_image_size=True, **flags)
        for index in range(len(records)):
            sample = dataset.get(index, 0)
            assert dataset.measure(index)[0] == len(sample["input_ids"])
            assert dataset.measure(index)[2] == len(sample["pixel_values"])


# -- depth -------------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def save_tiff(path, values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1) -> None:
    """Write a gray TIFF of any depth and type; `photometric` 0: zero is white."""
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 8)]
    tags += [(279, 4, values.nbytes), (339, 3, sample_format)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, t, 1, v) for tag, t, v in tags)
    header = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    Path(path).write_bytes(header + values.tobytes() + directory + bytes(4))


def save_16_bit(path, name: str) -> None:
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path, name)


def save_pgm(path, maximum: int) -> None:
    Path(path).write_bytes(b"P5 8 8 %d\n" % maximum + (RAMP * maximum).astype(">u2").tobytes())


def save_12_bit_tiff(path) -> None:
    values = (RAMP * 4095).astype(np.uint16).reshape(-1, 2)
    pairs = [bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.tolist()]
    save_tiff(path, np.frombuffer(b"".join(pairs), np.uint8), 12)


DEEP_IMAGES = {
    "16-bit PNG": lambda path: save_16_bit(path, "PNG"),
    "16-bit TIFF": lambda path: save_16_bit(path, "TIFF"),
    "16-bit JPEG 2000": lambda path: save_16_bit(path, "JPEG2000"),
    "16-bit big-endian TIFF": lambda path: Image.frombytes(
        "I;16B", (8, 8), (RAMP * 65535).astype(">u2").tobytes()
    ).save(path, "TIFF"),
    "16-bit PGM": lambda path: save_pgm(path, 65535),
    "12-bit PGM": lambda path: save_pgm(path, 4095),
    "12-bit TIFF": save_12_bit_tiff,
    "signed 16-bit TIFF": lambda path: save_tiff(path, (RAMP * 4000 - 1000).astype("<i2"), 16, 2),
    "32-bit TIFF": lambda path: save_tiff(path, (RAMP * 100_000).astype("<u4"), 32),
    "32-bit TIFF of 8-bit levels": lambda path: save_tiff(path, (RAMP * 255).astype("<i4"), 32, 2),
    "float TIFF 0..1": lambda path: save_tiff(path, RAMP.astype("<f4"), 32, 3),
    "float TIFF 0..255": lambda path: save_tiff(path, (RAMP * 255).astype("<f4"), 32, 3),
    "float TIFF 0..3000": lambda path: save_tiff(path, (RAMP * 3000).astype("<f4"), 32, 3),
    "float TIFF -1..1": lambda path: save_tiff(path, (RAMP * 2 - 1).astype("<f4"), 32, 3),
}


@pytest.mark.parametrize("name", DEEP_IMAGES)
def test_deep_gray_is_scaled_by_its_depth(tmp_path, name):
    DEEP_IMAGES[name](tmp_path / "a")
    pixels = read_pixels(tmp_path / "a")
    assert np.abs(pixels - (RAMP * 255)[..., None]).max() <= 1.1


WHITE_IS_ZERO = {
    "1-bit": (np.packbits(RAMP > 0.5), 1, 1),
    "4-bit": (np.packbits((RAMP * 15).astype(np.uint8)[..., None] >> (3 - np.arange(4, dtype=np.uint8)) & 1), 4, 1),
    "8-bit": ((RAMP * 255).astype(np.uint8), 8, 1),
    "16-bit": ((RAMP * 65535).astype("<u2"), 16, 1),
    "float 0..1": (RAMP.astype("<f4"), 32, 3),
    "float 0..255": ((RAMP * 255).astype("<f4"), 32, 3),
}


@pytest.mark.parametrize("name", WHITE_IS_ZERO)
def test_tiff_whose_zero_is_white_is_inverted(tmp_path, name):
    values, bits, sample_format = WHITE_IS_ZERO[name]
    for photometric in (0, 1):
        save_tiff(tmp_path / f"{photometric}.tif", values, bits, sample_format, photometric)
    black_is_zero, white_is_zero = (read_pixels(tmp_path / f"{kind}.tif").astype(int) for kind in (1, 0))
    assert black_is_zero[0, 0].max() == 0 and black_is_zero[-1, -1].min() == 255
    assert np.abs(white_is_zero - (255 - black_is_zero)).max() <= 1


def test_dark_deep_gray_stays_dark(tmp_path):
    """White is the depth's, not the image's."""
    Image.fromarray((RAMP * 6553).astype(np.uint16)).save(tmp_path / "a.png")
    assert 24 <= read_pixels(tmp_path / "a.png").max() <= 26


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_images_with_odd_values(tmp_path, value):
    values = RAMP.astype("<f4")
    values[0, 0] = value
    save_tiff(tmp_path / "a.tif", values, 32, 3)
    assert np.abs(read_pixels(tmp_path / "a.tif")[1:] - (RAMP * 255)[1:, :, None]).max() <= 1.1
    save_tiff(tmp_path / "a.tif", np.full((8, 8), value, "<f4"), 32, 3)
    assert read_pixels(tmp_path / "a.tif").max() == 0


# -- transparency ------------------------------------------------------------------------------------------------------


def make_half_transparent(mode: str) -> Image.Image:
    """Make an image whose left half is opaque and mid-gray, whose right half is transparent and hides black."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((120, 120, 120, 255), (0, 0, 4, 4))
    if mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([120, 120, 120, 0, 0, 0])
        image.paste(0, (0, 0, 4, 4))
        image.info["transparency"] = 1
        return image
    if mode in ("L", "RGB", "I;16"):
        gray = Image.new("L", (8, 4), 0)
        gray.paste(120, (0, 0, 4, 4))
        if mode == "I;16":
            return Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
        return gray.convert(mode)
    return image.convert(mode)


TRANSPARENT_IMAGES = {  # format, mode, options
    "RGBA PNG": ("PNG", "RGBA", {}),
    "LA PNG": ("PNG", "LA", {}),
    "palette PNG": ("PNG", "P", {"transparency": 1}),
    "palette PNG with levels": ("PNG", "P", {"transparency": b"\xff\0"}),
    "RGB PNG with a key": ("PNG", "RGB", {"transparency": (0, 0, 0)}),
    "gray PNG with a key": ("PNG", "L", {"transparency": 0}),
    "16-bit PNG with a key": ("PNG", "I;16", {"transparency": 0}),
    "GIF": ("GIF", "P", {"transparency": 1}),
    "WebP": ("WEBP", "RGBA", {"lossless": True, "exact": True}),
    "AVIF": ("AVIF", "RGBA", {"quality": 100}),
    "HEIC": ("HEIF", "RGBA", {"quality": -1}),
    "TIFF": ("TIFF", "RGBA", {}),
    "TGA": ("TGA", "RGBA", {}),
    "ICO": ("ICO", "RGBA", {"sizes": [(8, 4)]}),
    "DDS": ("DDS", "RGBA", {}),
    "JPEG 2000": ("JPEG2000", "RGBA", {"irreversible": False}),
}


@pytest.mark.parametrize("name", TRANSPARENT_IMAGES)
def test_transparent_pixels_show_the_background(tmp_path, name):
    pillow_heif.register_heif_opener()
    file_format, mode, options = TRANSPARENT_IMAGES[name]
    image = make_half_transparent(mode)
    if name == "HEIC":  # of at least 64 pixels
        image = image.resize((128, 64), Image.Resampling.NEAREST)
    image.save(tmp_path / "a", file_format, **options)
    for background in ((255, 255, 255), (200, 30, 10)):
        pixels = read_pixels(tmp_path / "a", ImageDecoding(background)).astype(int)
        assert np.abs(pixels[1, 1] - 120).max() <= 2
        assert np.abs(pixels[1, -2] - background).max() <= 2


def test_opaque_images_with_alpha_are_not_changed(tmp_path):
    noise = make_noise()
    noise.convert("RGBA").save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(tmp_path / "a.png"), np.asarray(noise))


# -- modes, formats and upstream's way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F") else "a.png")
    (Image.new("I;16", (20, 10)) if mode == "I;16" else make_noise((20, 10)).convert(mode)).save(path)
    assert read_pixels(path).shape == (10, 20, 3)


@pytest.mark.parametrize("name", [name for name in IMAGE_FORMATS if name not in ("PSD", "AVIF")])
def test_supported_formats(tmp_path, name):
    noise = make_noise((32, 16))
    noise.save(tmp_path / "a", name, **({"sizes": [(32, 16)]} if name == "ICO" else {}))
    expected = np.asarray(Image.open(tmp_path / "a").convert("RGB"))
    assert np.array_equal(read_pixels(tmp_path / "a"), expected)
    assert np.array_equal(np.asarray(pil_loader((tmp_path / "a").read_bytes())), expected)


def test_heic(tmp_path, monkeypatch):
    path = FAULTS / "img/phone.heic"
    pixels = read_pixels(path)
    assert np.abs(pixels - np.asarray(Image.open(FAULTS / "img/plain.png").convert("RGB")).astype(int)).mean() < 20
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read_fn in (load_image, read_image_size):
        with pytest.raises(UnusableSample, match="phone.heic.*HEIC requires .*pip install pillow-heif.*convert it"):
            read_fn(str(path))


@pytest.mark.parametrize("name", ["exif6.jpg", "grey16.png", "rgba_text.png", "phone.heic"])
def test_upstream_decoding_is_a_plain_conversion(make_dataset, name):
    expected = Image.open(FAULTS / "img" / name).convert("RGB")
    assert np.array_equal(read_pixels(FAULTS / "img" / name, UPSTREAM), np.asarray(expected))
    record = {"image": name, "conversations": [QUESTION, ANSWER]}
    meta = {"root": str(FAULTS / "img")}
    ours, upstreams = (
        make_dataset(record, meta=meta, upstream_image_decoding=value).get(0, 0)["pixel_values"]
        for value in (False, True)
    )
    assert (ours.shape == upstreams.shape and bool((ours == upstreams).all())) == (name == "phone.heic")


def test_fault_images():
    assert read_pixels(FAULTS / "img/exif6.jpg").shape == (40, 120, 3)
    assert read_pixels(FAULTS / "img/grey16.png").mean() < 250
    assert read_pixels(FAULTS / "img/rgba_text.png")[0, 0].tolist() == [255, 255, 255]
    for name in ("cut_half.jpg", "cut_last2.jpg", "crc.png"):
        path = str(FAULTS / "img" / name)
        assert min(read_image_size(path)) > 0
        with pytest.raises(UnusableSample, match=re.escape(name)):
            load_image(path)


def test_formats_run_no_other_program():
    """Each of PIL's plug-ins that starts a program or is a stub for an external one."""
    assert not {"EPS", "WMF", "EMF", "FPX", "MIC", "GRIB", "HDF5", "BUFR", "MPEG", "PDF"} & set(IMAGE_FORMATS)
    assert TiffImagePlugin.TiffImageFile.format in IMAGE_FORMATS
