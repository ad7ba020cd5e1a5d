"""Open image files of unknown origin and decode them to upright RGB.

Every image, frame of a folder and GIF is opened here. Bytes, pixels and the work of parsing a header are bounded before
memory is taken. Sizes are those of the decoded, upright image, so tiles are counted right from headers alone.
"""

import io
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple, NoReturn, cast

import numpy as np
from PIL import ExifTags, Image, ImageColor
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import UnusableSample
from internvl.data.file_io import MissingPackageError, UnusableFileError, open_file
from internvl.data.outages import is_outage
from internvl.regular_files import LFS_POINTER_START

# Formats that are decoded, detected by content and not by file name. All decode within the process and open no other
# file. PIL supports more, among them EPS, for which it runs Ghostscript: unsafe for untrusted images.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
IMAGE_FORMATS += ("SGI", "QOI", "DDS", "PSD")
IMAGE_SUFFIXES = frozenset(
    """.jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .pbm .pgm .ppm .pnm .pfm .jp2 .j2k .jpc .jpf
    .jpx .j2c .avif .avifs .ico .tga .icb .vda .vst .pcx .bw .rgb .rgba .sgi .qoi .dds .psd .heic .heif .hif""".split()
)
# A file may have as many bytes as an uncompressed RGBA image of the most pixels.
MAX_BYTES_PER_PIXEL = 4
# PIL's decoders for WebP, AVIF and HEIC hold the complete file in memory, two or three times.
MAX_WHOLE_FILE_BYTES = 1 << 26
HEAD_BYTES = 512  # that tell what a file is
# Reading a header may cost as much as reading these bytes, where each of PIL's small reads counts as 64 bytes. PIL
# looks for the next marker of a JPEG or GIF byte by byte: minutes in a large file of zeros.
HEADER_BYTES, MIN_READ_COST = 1 << 26, 64
# Decoding may read the file this often: once per pass over the frames of a GIF, in blocks of 256 bytes.
MAX_PASSES = 8
# PIL's decoders in Python take up to 1.3 seconds per million pixels.
MAX_PYTHON_DECODER_PIXELS = 1 << 24

ORIENTATIONS = {  # EXIF value -> how to make the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING_ORIENTATIONS = (5, 6, 7, 8)  # they exchange width and height
PNG_TAIL_BYTES = 1 << 16  # searched for EXIF after the pixels

# Pattern of the first bytes -> what the file is, and what to do.
UNSUPPORTED_CONTENT = {
    rb"%PDF": "it is a PDF document, which is not supported: convert it to PNG",
    rb"%!PS|\xc5\xd0\xd3\xc6": "it is an EPS drawing, which is not supported: convert it to PNG",
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg|<svg)": "it is an SVG drawing, which is not "
    "supported: convert it to PNG",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "it is a JPEG XL image, which is not supported: convert it to JPEG or PNG",
    rb"(?i)\s*(<!doctype html|<html|<head|<body)": "it is an HTML page: download the file again",
    re.escape(LFS_POINTER_START): "it is a pointer of Git LFS, not the file itself: run `git lfs pull`",
}
VIDEO_START = rb"....ftyp(?!hei|hev|mif|msf|avi)|\x1a\x45\xdf\xa3|RIFF....AVI |\x00\x00\x01\xba"
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}


class ImageDecoding(NamedTuple):
    """Settings of decoding, from the flags.

    Attributes:
        background: RGB color behind transparent pixels.
        max_pixels: of an image.
        is_upstream: convert with PIL's `convert("RGB")` alone. EXIF orientation is ignored, 16-bit gray is clipped,
            and transparent pixels show their hidden color.
    """

    background: tuple[int, ...] = (255, 255, 255)
    max_pixels: int = 89_478_485  # PIL's default
    is_upstream: bool = False

    @classmethod
    def from_flags(cls, args: DataTrainingArguments) -> "ImageDecoding":
        """Take the settings from the flags."""
        background = ImageColor.getrgb(args.image_background)[:3]
        return cls(background, args.max_image_pixels, args.upstream_image_decoding)


DEFAULT_DECODING = ImageDecoding()

# -- reading -----------------------------------------------------------------------------------------------------------


def load_image(path: str, decoding: ImageDecoding = DEFAULT_DECODING) -> Image.Image:
    """Decode an image file to upright RGB.

    Raises:
        UnusableSample: the file is missing, broken, truncated, too large, or no regular file.
    """
    return read_image(path, lambda image: convert_to_rgb(image, decoding), decoding=decoding)


def read_image_size(path: str, decoding: ImageDecoding = DEFAULT_DECODING) -> tuple[int, int]:
    """Read (width, height) of the upright image from the header of a file.

    Raises:
        UnusableSample: see `load_image`. Damage that is only found while decoding pixels is not reported.
    """
    return read_image(path, lambda image: _get_upright_size(image, decoding), header_only=True, decoding=decoding)


def read_image(
    path: str,
    use_fn: Callable[[Image.Image], Any],
    header_only: bool = False,
    decoding: ImageDecoding = DEFAULT_DECODING,
) -> Any:
    """Open an image file and return `use_fn(image)`.

    Args:
        header_only: `use_fn` reads only the header, so a remote file is fetched in small blocks.

    Raises:
        UnusableSample: the image cannot be opened, or `use_fn` fails.
    """
    head = b""
    try:
        with open_file(path, header_only, MAX_BYTES_PER_PIXEL * decoding.max_pixels) as file:
            head = file.read(HEAD_BYTES)
            with _open_image(file, head, decoding.max_pixels) as image:
                return use_fn(image)
    except MissingPackageError:
        raise
    except FileNotFoundError as error:
        raise UnusableSample(f"image {path} does not exist") from error
    except Exception as error:  # PIL's parsers raise many types for broken files
        if is_outage(error):
            raise
        size = f" ({os.path.getsize(path)} bytes)" if os.path.isfile(path) else ""
        raise UnusableSample(
            f"image {path}{size} cannot be read: {_describe_error(error, path, head, decoding)}"
        ) from error


def pil_loader(img_str: bytes) -> Image.Image:
    """Decode the bytes of an image file to upright RGB."""
    with _open_image(io.BytesIO(img_str), img_str[:HEAD_BYTES], DEFAULT_DECODING.max_pixels) as image:
        return convert_to_rgb(image)


@contextmanager
def _open_image(file: BinaryIO, head: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image within the limits."""
    reader = _BoundedReader(file)
    with _limit_pixels(max_pixels):
        try:
            image = Image.open(cast(BinaryIO, reader), formats=_choose_formats(head))
        except Image.UnidentifiedImageError as error:  # pillow-heif makes it of any error
            raise reader.error or error from None
        with image:
            _require_fast_decoder(image)
            reader.allow_decoding()
            yield image


def _require_fast_decoder(image: Image.Image) -> None:
    """Raise UnusableSample for a large image that PIL decodes in Python."""
    is_slow = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    if is_slow and image.width * image.height > MAX_PYTHON_DECODER_PIXELS:
        raise UnusableSample(
            f"{image.width} x {image.height} pixels of this kind of {image.format} would take minutes to decode, the "
            f"limit is {MAX_PYTHON_DECODER_PIXELS:,} pixels: convert it to PNG"
        )


def _describe_error(error: Exception, path: str, head: bytes, decoding: ImageDecoding) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        is_video = re.match(VIDEO_START, head, re.DOTALL)
        return describe_content(head) or ("it is a video, not an image" if is_video else "not an image")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        num_pixels = re.search(r"\d+", str(error))
        return f"it has {num_pixels and num_pixels[0]} pixels, more than --max_image_pixels {decoding.max_pixels}"
    return str(error).replace(f"{path} ", "it ", 1)


def describe_content(head: bytes) -> str | None:
    """Describe a file of a known unsupported kind by its first bytes."""
    kinds = (kind for start, kind in UNSUPPORTED_CONTENT.items() if re.match(start, head, re.DOTALL))
    return next(kinds, None)


def _choose_formats(head: bytes) -> tuple[str, ...]:
    """Return the formats that a file with these first bytes may have.

    HEIC is decoded by the package pillow-heif, if installed.
    """
    if head[4:8] != b"ftyp":
        return IMAGE_FORMATS
    end = min(len(head), int.from_bytes(head[:4], "big"))  # of the first box
    brands = {head[start : start + 4] for start in (8, *range(16, end, 4))}
    if brands & AVIF_BRANDS or not brands & HEIC_BRANDS:
        return IMAGE_FORMATS
    try:
        import pillow_heif
    except ImportError as error:
        raise UnusableSample(
            "HEIC requires the package pillow-heif: pip install pillow-heif, or convert it to JPEG"
        ) from error
    pillow_heif.register_heif_opener()
    return ("HEIF",)


@contextmanager
def _limit_pixels(max_pixels: int) -> Iterator[None]:
    """Let PIL raise for an image of more pixels, on opening it."""
    default = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken metadata, which may give thousands of warnings
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL has no argument for it
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = default


class _BoundedReader:
    """A file of which PIL can read only as much as an image needs."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self._bytes_left = HEADER_BYTES
        self.error: OSError | None = None
        file.seek(0)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def allow_decoding(self) -> None:
        self._bytes_left += MAX_PASSES * self._size

    def read(self, size: int = -1) -> bytes:
        if size < 0 and self._size > MAX_WHOLE_FILE_BYTES:
            self._refuse(f"it has more than {MAX_WHOLE_FILE_BYTES:,} bytes, the limit for its format")
        try:
            content = self._file.read(size)
        except OSError as error:
            self.error = error
            raise
        self._bytes_left -= max(len(content), MIN_READ_COST)
        if self._bytes_left < 0:
            self._refuse("its header is too large, or nothing in it is an image")
        return content

    def _refuse(self, reason: str) -> NoReturn:
        self.error = UnusableFileError(reason)
        raise self.error


# -- decoding ----------------------------------------------------------------------------------------------------------


def convert_to_rgb(image: Image.Image, decoding: ImageDecoding = DEFAULT_DECODING) -> Image.Image:
    """Decode an opened image to upright RGB.

    Gray of more than 8 bits is scaled by its depth. Transparent pixels show the background.
    """
    if decoding.is_upstream:
        return image.convert("RGB")
    orientation, size = _read_orientation(image), image.size
    image.load()
    if image.mode[0] in "IF":
        image = _scale_to_8_bits(image)
    if image.has_transparency_data:
        image = blend_transparency(image, decoding.background)
    image = image.convert("RGB")
    if image.size != size:  # the planned number of tiles would be wrong
        raise UnusableSample("its header declares {} x {} pixels, it has {} x {}".format(*size, *image.size))
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def blend_transparency(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Put an image with transparency on a background; return RGB."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def _get_upright_size(image: Image.Image, decoding: ImageDecoding) -> tuple[int, int]:
    if not decoding.is_upstream and _read_orientation(image) in SWAPPING_ORIENTATIONS:
        return image.height, image.width
    return image.size


def _read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of an image that is not loaded yet; 1 is upright."""
    if image.format in ("TIFF", "HEIF"):  # decoded upright
        return 1
    if isinstance(image, PngImageFile) and image.fp and "exif" not in image.info:
        image.info |= _find_late_exif(image.fp)
    try:
        # Not `image.getexif`: for a PNG it decodes all pixels.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL's parser raises many types for broken EXIF, which does not make the image unusable
        return 1


def _find_late_exif(file: IO[bytes]) -> dict[str, bytes]:
    """Find the EXIF that a PNG has behind its pixels, near its end."""
    position = file.tell()
    file.seek(max(0, file.seek(0, io.SEEK_END) - PNG_TAIL_BYTES))
    tail = file.read(PNG_TAIL_BYTES)
    file.seek(position)
    start = tail.rfind(b"eXIf")
    length = int.from_bytes(tail[max(0, start - 4) : max(0, start)], "big")
    end = start + 4 + length
    if start < 4 or zlib.crc32(tail[start:end]) != int.from_bytes(tail[end : end + 4], "big"):
        return {}
    return {"exif": b"Exif\0\0" + tail[start + 4 : end]}


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray of more than 8 bits (modes I;16, I, F) to L, or to LA if a level is transparent."""
    values = np.asarray(image)
    if image.mode != "F" and (num_bits := _get_gray_bits(image)):
        levels = np.clip(values >> (num_bits - 8), 0, 255)
    else:
        # A TIFF of 32 bits does not say which value is white. Floats are commonly in 0..1, other values in 0..255.
        values = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0)
        low, high = min(0, values.min()), values.max()
        nominal = (1, 255) if image.mode == "F" else (255,)
        white = next((level for level in nominal if high <= level), high)
        levels = (values - low) * (255 / (white - low))
    if isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0:  # PhotometricInterpretation: 0 is white
        levels = 255 - levels
    gray = Image.fromarray(levels.astype(np.uint8))
    if isinstance(level := image.info.get("transparency"), int):
        return Image.merge("LA", (gray, Image.fromarray(np.where(np.asarray(image) == level, 0, 255).astype(np.uint8))))
    return gray


def _get_gray_bits(image: Image.Image) -> int | None:
    """Return the bits of integer gray levels, None if the file does not say."""
    if isinstance(image, TiffImageFile):
        (num_bits,) = image.tag_v2.get(258, (16,))  # BitsPerSample
        is_signed = image.tag_v2.get(339, (1,)) == (2,)  # SampleFormat
        return num_bits if num_bits <= 16 and not is_signed else None
    return 16  # PNG, JPEG 2000; PIL scales a PPM of any depth to 16 bits
