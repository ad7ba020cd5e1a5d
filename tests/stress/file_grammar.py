"""A grammar of untrusted files: content, entries of a folder, references to paths, JSON values."""

import io
import os
import random
import shutil
import socket
import struct
import zlib
from pathlib import Path

from PIL import Image


class Grammar:
    """Random content, entries and references of one case.

    Args:
        folder: the case's own folder.
        outside: a folder beside it with bait files, which nothing may open.
    """

    def __init__(self, draw: random.Random, folder: Path, outside: Path):
        self.draw, self.folder, self.outside = draw, folder, outside

    def make_content(self) -> bytes:
        """Make the content of a file that claims to be an image, a video or anything else."""
        draw = self.draw
        size = (draw.choice([1, 7, 40]), draw.choice([1, 9, 30]))
        image = Image.new(draw.choice(["RGB", "L", "RGBA", "P", "1"]), size, draw.randrange(2))
        name = draw.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "ICO", "TGA", "PPM", "PCX", "QOI"])
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, name)
        valid = buffer.getvalue()
        bait = str(self.outside / "bait.png").encode()
        return draw.choice(
            [
                lambda: valid,
                lambda: valid[: draw.randrange(len(valid) + 1)],
                lambda: self.flip_bytes(valid),
                lambda: b"",
                lambda: draw.randbytes(draw.randrange(2000)),
                lambda: (
                    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + bait + b") (r) file closefile\nshowpage\n"
                ),
                lambda: b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\n",
                lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://' + bait + b'"/></svg>',
                lambda: b"#EXTM3U\n#EXTINF:1,\nfile://" + bait + b"\n",
                lambda: b"ffconcat version 1.0\nfile '" + bait + b"'\n",
                lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                lambda: make_png_header(draw.choice([2**31 - 1, 60_000, 2**20]), draw.choice([2**31 - 1, 60_000])),
                lambda: b"<html>Not found</html>",
                lambda: b"[" * draw.choice([10, 100_000]),
                lambda: b'{"a":' * 50_000,
                lambda: b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBPVP8X" + bytes(30),
            ]
        )()

    def flip_bytes(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self.draw.randrange(1, 8)):
            changed[self.draw.randrange(len(changed))] = self.draw.randrange(256)
        return bytes(changed)

    def place(self, path: Path, content: bytes | None = None, may_link_outside: bool = True) -> None:
        """Place an entry at a path: mostly a file, sometimes something else.

        A path that the user names may be a link to anywhere: then `may_link_outside` is False, as no fault is seen.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        content = self.make_content() if content is None else content
        kind = self.draw.choices(
            ["file", "sparse", "outside", "FIFO", "socket", "device", "folder", "loop", "dangling", "absent"],
            [12, 1, 2 * may_link_outside, 1, 1, 1, 1, 1, 1, 1],
        )[0]
        if kind == "file":
            path.write_bytes(content)
        elif kind == "sparse":
            path.write_bytes(content)
            os.truncate(path, self.draw.choice([10**8, 2 * 10**9, 10**11]))
        elif kind == "outside":
            path.symlink_to(self.outside / self.draw.choice(["bait.png", "bait.json", "bait.arrow"]))
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                os.chdir(path.parent)  # the path of a socket is short
                server.bind(path.name)
        elif kind == "device":
            path.symlink_to(self.draw.choice(["/dev/zero", "/dev/random", "/dev/tty", "/proc/self/mem"]))
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "dangling":
            path.symlink_to("nowhere")

    def refer(self) -> object:
        """Return what a record or a JSON file may give as a path."""
        bait = self.draw.choice(["bait.png", "bait.json", "bait.arrow"])
        return self.draw.choice(
            ["a.png", "b.jpg", "c.mp4", "frames", "d.gif", "./a.png", "frames/../a.png"] * 3
            + [f"../outside/{bait}", str(self.outside / bait), f"file://{self.outside / bait}", str(self.outside)]
            + [f"frames/../../outside/{bait}", f"{self.folder}/../outside/{bait}", "..", "/", "~", ""]
            + ["s3://bucket/a.png", "zip://a::file:///etc/passwd", "http://127.0.0.1:9/a.png", "data:,a"]
            + ["a\0.png", "\ud800.png", "x" * 100_000, "/dev/zero", "/proc/self/fd/0", "|id", "-", None, 1, True]
            + [[f"../outside/{bait}"], {"path": str(self.outside / bait)}, {"": str(self.outside / bait)}]
        )

    def make_value(self, depth: int = 0) -> object:
        """Make a JSON value: a path, a number, a name of code on the hub, or a nested value."""
        leaf = [-1, 0, 1, 2**31, 10**9, 10**30, 1e308, float("nan"), float("inf"), True, None, "", "a", "9" * 5000]
        leaf += ["org/kernel", "org/repo--module.Class", "trust_remote_code", [], {}, self.refer(), self.refer()]
        if depth > 2 or self.draw.random() < 0.7:
            return self.draw.choice(leaf)
        children = [self.make_value(depth + 1) for _ in range(self.draw.randrange(4))]
        keys = ["path", "bytes", "", "filename", "size", "crc32", "attn_implementation", "auto_map", "__class__"]
        nested: object = {self.draw.choice(keys): child for child in children}
        for _ in range(self.draw.choice([0, 0, 0, 400])):
            nested = [nested]
        return self.draw.choice([children, nested])

    def change_json(self, value: object) -> object:
        """Replace some leaves of a JSON value, and add keys."""
        if isinstance(value, dict) and value:
            key = self.draw.choice(list(value))
            extra = ["attn_implementation", "auto_map", "quantization_config", "transformers_weights", "base_model"]
            if self.draw.random() < 0.3:
                return value | {self.draw.choice(extra): self.make_value()}
            return value | {key: self.change_json(value[key])}
        if isinstance(value, list) and value and self.draw.random() < 0.7:
            index = self.draw.randrange(len(value))
            return [*value[:index], self.change_json(value[index]), *value[index + 1 :]]
        return self.make_value()


def make_png_header(width: int, height: int) -> bytes:
    """Make a PNG that declares a size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
