"""Generate records and media files as odd as people have them: each valid, changed at random, or damaged."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers.samples import make_turns
from helpers.video_files import write_frame_folder, write_gif, write_video
from PIL import Image
from stress.mutations import mutate_bytes, mutate_json

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
IMAGE_NAMES = ("rgb.png", "rgb.jpg", "gray16.png", "rgba.png", "palette.gif", "rgb.webp", "rgb.bmp", "rgb.tiff")
VIDEO_NAMES = ("film.mp4", "film.mkv", "film.gif", "frames")


def write_media(folder: Path) -> None:
    """Write valid images and videos, from which the odd ones are made."""
    folder.mkdir()
    noise = Image.effect_noise((90, 50), 80).convert("RGB")
    for name in ("rgb.png", "rgb.jpg", "rgb.webp", "rgb.bmp", "rgb.tiff"):
        noise.save(folder / name)
    noise.convert("RGBA").save(folder / "rgba.png")
    noise.convert("P").save(folder / "palette.gif")
    Image.fromarray(np.arange(90 * 50, dtype=np.uint16).reshape(50, 90)).save(folder / "gray16.png")
    write_video(folder / "film.mp4", frames=12)
    write_video(folder / "film.mkv", frames=12, b_frames=2)
    write_gif(folder / "film.gif", frames=6)
    write_frame_folder(folder / "frames", frames=5)


# -- media -------------------------------------------------------------------------------------------------------------


def change_bytes(path: Path, generator: random.Random) -> None:
    path.write_bytes(mutate_bytes(path.read_bytes(), generator))


def truncate(path: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * generator.choice([0, 0.1, 0.5, 0.9, 0.99]))])


def replace_by(content: bytes) -> Callable[[Path, random.Random], None]:
    return lambda path, _: path.write_bytes(content) and None


def replace_by_fifo(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


MEDIA_CHANGES: list[Callable[[Path, random.Random], None]] = [
    *[change_bytes] * 4,
    *[truncate] * 4,
    replace_by(b"<html>404 Not Found</html>"),
    replace_by(LFS_POINTER),
    replace_by_fifo,
    replace_by_folder,
    lambda path, _: path.unlink(),
]


def change_media(path: Path, generator: random.Random) -> None:
    """Damage a file, or one of the files of a folder."""
    if path.is_dir():
        path = generator.choice(sorted(path.glob("frame*")))
    generator.choice(MEDIA_CHANGES)(path, generator)


# -- records -----------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "What?",
    "<image>\nWhat?",
    "<video>\nWhat?",
    "<image> <image>",
    "",
    "Where is <box>[[1, 2, 3, 4000]]</box>?",
)
ANSWERS = ("A house.", "", "<image>", "word " * 400, "cut \ud83d", "<|im_end|>", "<IMG_CONTEXT>")
RECORD_CHANGES: list[Callable[[dict, random.Random], dict]] = [
    mutate_json,
    mutate_json,
    lambda record, generator: record | {"conversations": make_turns(generator.choice(QUESTIONS), "A.")},
    lambda record, generator: record | {"conversations": make_turns("What?", generator.choice(ANSWERS))},
    lambda record, _: {f"{key}s" if key in ("image", "video") else key: value for key, value in record.items()},
    lambda record, _: record | {"image": record.get("image", record.get("video"))},
    lambda record, generator: record | {"clip": generator.choice([[0, 0.5], [0.2, 99], [50, 60], [1, 0], None, "a"])},
    lambda record, generator: record | {generator.choice(["messages", "system", "loss", "width", "objects"]): "x"},
    lambda record, _: record | {"conversations": [{**turn, "from": "user"} for turn in record["conversations"]]},
]


def make_odd_samples(source: Path, folder: Path, seed: int, num_samples: int) -> list[bool]:
    """Write `train.jsonl` and its media files; return where media are damaged.

    Args:
        source: what `write_media` has written.
    """
    (folder / "media").mkdir(parents=True)
    lines, has_damage = [], []
    for number in range(num_samples):
        generator = random.Random(f"{seed} {number}")
        kind, names = generator.choice([("image", IMAGE_NAMES), ("image", IMAGE_NAMES), ("video", VIDEO_NAMES)])
        name = f"{number}_{generator.choice(names)}"
        origin, path = source / name.partition("_")[2], folder / "media" / name
        shutil.copytree(origin, path) if origin.is_dir() else shutil.copy(origin, path)
        record = {"id": number, kind: name, "conversations": make_turns(f"<{kind}>\nWhat?", "A house by the river.")}
        is_damaged, is_changed = generator.choice(
            [(True, False), (True, False), (False, True), (True, True), (False, False)]
        )
        if is_damaged:
            change_media(path, generator)
        if is_changed:
            record = generator.choice(RECORD_CHANGES)(record, generator)
        line = json.dumps(record)
        lines.append(line if generator.random() < 0.95 else line[: len(line) // 2])
        has_damage.append(is_damaged)
    (folder / "train.jsonl").write_text("\n".join(lines))
    return has_damage
