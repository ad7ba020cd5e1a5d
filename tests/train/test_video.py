"""Which frames, and that the frames read are those: from films, GIFs and folders."""

import json
import random
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from internvl.train.constants import BadSample
from internvl.train.video import count_frames, get_frame_indices, read_frames, sort_frames

TOTAL = 40


def test_recorded_frame_indices(goldens):
    for line in (goldens / "video_sampling.jsonl").read_text().splitlines():
        row = json.loads(line)
        # Upstream draws from the shared generator; ours from the one it is given, in the same way.
        args = row["args"] | {"generator": random.Random(row["seed"])}
        if "error" in row:
            with pytest.raises((ValueError, ZeroDivisionError)):
                get_frame_indices(**args)
        else:
            assert get_frame_indices(**args) == row["frame_indices"], row


def test_random_frames_are_spread_and_decided_by_the_generator():
    for seed in range(50):
        draw = random.Random(seed)
        n, total = draw.randint(1, 20), draw.randint(1, 100)
        chosen = get_frame_indices(n, total, "rand", generator=random.Random(seed))
        assert chosen == get_frame_indices(n, total, "rand", generator=random.Random(seed))
        assert len(chosen) == n and chosen == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < total
        assert len(set(chosen)) == min(n, total)
        if total >= 2 * n:
            assert all(k * total / n - 1 <= index < (k + 1) * total / n for k, index in enumerate(chosen))


# -- readers: frame k is grey of level 6 k, so that a frame tells its number ------------------------------------------


def grey(k: int) -> np.ndarray:
    return np.full((32, 48, 3), 6 * k, np.uint8)


def number(frame: Image.Image) -> int:
    assert frame.mode == "RGB" and frame.size == (48, 32)
    return round(np.asarray(frame).mean() / 6)


def film(path: Path, frames: int = TOTAL, key_every: int = 12, **options) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", key_every
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        stream.codec_context.max_b_frames = options.get("b_frames", 0)
        for k in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(k), format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def gif(path: Path, frames: int = TOTAL) -> str:
    first, *rest = [Image.fromarray(grey(k)) for k in range(frames)]
    first.save(path, save_all=True, append_images=rest)
    return str(path)


def folder(path: Path, frames: int = TOTAL) -> str:
    path.mkdir()
    for k in range(frames):
        Image.fromarray(grey(k)).save(path / f"frame_{k}.png")
    return str(path)


MAKERS = {"film.mp4": film, "film.gif": gif, "film": folder}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sample", ["rand", "middle"])
@pytest.mark.parametrize("n", [1, 7, 16, TOTAL])
def test_frames_read_are_the_frames_chosen(tmp_path, name, sample, n):
    path = MAKERS[name](tmp_path / name)
    frames = read_frames(path, n, sample, generator=random.Random(3))
    assert [number(frame) for frame in frames] == get_frame_indices(n, TOTAL, sample, generator=random.Random(3))
    assert count_frames(path, n) == len(frames)


@pytest.mark.parametrize("key_every, b_frames", [(1, 0), (12, 2), (1000, 0), (1000, 2)])
def test_any_spacing_of_key_frames(tmp_path, key_every, b_frames):
    path = film(tmp_path / "a.mp4", key_every=key_every, b_frames=b_frames)
    for n in (3, TOTAL):
        assert [number(frame) for frame in read_frames(path, n, "middle")] == get_frame_indices(n, TOTAL, "middle")


def test_clip_is_a_stretch_of_seconds(tmp_path):
    path = film(tmp_path / "a.mp4")  # 10 frames per second
    numbers = [number(frame) for frame in read_frames(path, 5, "middle", clip=(1.5, 2.5))]
    assert numbers == [15 + index for index in get_frame_indices(5, 10, "middle")]
    assert number(read_frames(path, 1, "middle", clip=(3.8, 99))[0]) == 38, "a clip that is too long ends with the film"
    with pytest.raises(BadSample, match=r"clip \(7, 8\) of a video of 40 frames at 10 per second"):
        read_frames(path, 5, "middle", clip=(7, 8))


@pytest.mark.parametrize(
    "name, expected", [("film.mp4", [0, 1, 2, 2, 2, 2]), ("film.gif", [0, 1, 2]), ("film", [0, 1, 2])]
)
def test_short_videos(tmp_path, name, expected):
    path = MAKERS[name](tmp_path / name, 3)
    assert [number(frame) for frame in read_frames(path, 6, generator=random.Random(0))] == expected
    assert count_frames(path, 6) == len(expected)


def test_folders_are_read_in_the_order_of_their_numbers():
    assert sort_frames(["a_10.jpg", "a_2.jpg", "cover.jpg", "b_1.png"]) == [
        "cover.jpg",
        "b_1.png",
        "a_2.jpg",
        "a_10.jpg",
    ]


def test_videos_that_cannot_be_read(tmp_path):
    (tmp_path / "text.mp4").write_text("not a film")
    (tmp_path / "text.gif").write_text("not a film")
    (tmp_path / "empty").mkdir()
    whole = Path(film(tmp_path / "whole.mp4")).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    for name, reason in [
        ("absent.mp4", "does not exist"),
        ("absent.gif", "does not exist"),
        ("text.mp4", "cannot be read"),
        ("text.gif", "not an image"),
        ("half.mp4", "cannot be read"),
        ("empty", "empty folder"),
    ]:
        with pytest.raises(BadSample, match=reason):
            read_frames(str(tmp_path / name), 4)
