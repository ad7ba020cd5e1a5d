"""Which frames, and that the frames read are those: from films, GIFs and folders."""

import json
import random
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.video_files import TOTAL, film, folder, gif, number

from internvl.constants import UnusableSample
from internvl.data.videos import count_frames, get_frame_indices, read_frames, sort_frames
from internvl.train.dataset import TCSLoader, read_frames_decord, read_frames_folder, read_frames_gif


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


# -- readers ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "name, options",
    {
        "h264.mp4": {"codec": "libx264", "b_frames": 2},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "xvid.avi": {"b_frames": 2},
        "seeks land behind.ts": {"codec": "mpeg2video", "b_frames": 2},
        "seeks land anywhere.mpg": {"codec": "mpeg2video", "b_frames": 2},
        "no times.h264": {"codec": "libx264", "b_frames": 2},
        "sound.mp4": {"sound": True},
        "odd.mp4": {"size": (47, 31)},
        "rates.mkv": {"hundredths": [k * k for k in range(TOTAL)]},
        "rates.mp4": {"codec": "libx264", "hundredths": [k + 50 * (k > 20) for k in range(TOTAL)]},
    }.items(),
)
def test_any_film(tmp_path, name, options):
    path = film(tmp_path / name, **options)
    for n, sample in ((3, "middle"), (9, "rand"), (TOTAL, "middle")):
        frames = read_frames(path, n, sample, generator=random.Random(1))
        assert [number(frame) for frame in frames] == get_frame_indices(n, TOTAL, sample, generator=random.Random(1))
        assert frames[0].size == options.get("size", (48, 32))


def test_frames_per_second_are_those_of_the_film(tmp_path):
    path = film(tmp_path / "a.mp4")  # 10 frames per second, 4 seconds
    assert [number(frame) for frame in read_frames(path, 99, "fps1")] == [5, 15, 25, 35]
    assert [number(frame) for frame in read_frames(path, 99, "fps2", clip=(1, 3))] == [12, 18, 22, 28]
    with pytest.raises(UnusableSample, match="fps0.01 chooses no frame of video .*a.mp4"):
        read_frames(path, 99, "fps0.01")


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_films_of_a_turned_camera_stand_upright(tmp_path, turned):
    """The film says by how much its frames are to be turned against the clock."""
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write such films")
    dark_above = np.broadcast_to(np.arange(0, 240, 5, np.uint8)[:, None, None], (48, 32, 3)).copy()
    tall = {"frames": 1, "size": (32, 48), "draw": lambda k, *size: dark_above}
    lying = read_frames(film(tmp_path / "lying.mp4", **tall), 1)[0]
    upright = read_frames(film(tmp_path / "upright.mp4", turned=turned, **tall), 1)[0]
    assert upright.tobytes() == lying.rotate(turned, expand=True).tobytes() != lying.tobytes()


def test_clip_is_a_stretch_of_seconds(tmp_path):
    path = film(tmp_path / "a.mp4")  # 10 frames per second
    numbers = [number(frame) for frame in read_frames(path, 5, "middle", clip=(1.5, 2.5))]
    assert numbers == [15 + index for index in get_frame_indices(5, 10, "middle")]
    assert number(read_frames(path, 1, "middle", clip=(3.8, 99))[0]) == 38, "a clip that is too long ends with the film"
    with pytest.raises(
        UnusableSample, match=r"clip \(7, 8\) of video .*a.mp4 \(40 frames, 10 per second\) holds no frame"
    ):
        read_frames(path, 5, "middle", clip=(7, 8))


@pytest.mark.parametrize("clip", [3, [1], [1, 2, 3], ["1", "2"], [2, 1], [-1, 1], [1, 1], [True, 2], {}])
def test_clips_that_are_none(tmp_path, clip):
    path = film(tmp_path / "a.mp4", 3)
    for use in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match=r"is not \[start, end\] in seconds"):
            use(path, 2, clip=clip)


@pytest.mark.parametrize("name", ["film.gif", "film"])
def test_a_clip_of_what_has_no_seconds_is_refused(tmp_path, name):
    path = MAKERS[name](tmp_path / name, 3)
    for use in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match=rf"clip \[0, 1\] is in seconds, which the (gif|folder) {path}"):
            use(path, 2, clip=[0, 1])


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
    # This one has its index in front, so that it can be opened.
    whole = Path(film(tmp_path / "stream.mp4", movflags="faststart")).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    film(tmp_path / "none.mkv", 0)
    film(tmp_path / "none.mp4", 0, sound=True)
    for name, reason in [
        ("absent.mp4", "does not exist"),
        ("absent.gif", "does not exist"),
        ("text.mp4", "cannot be read"),
        ("text.gif", "not an image"),
        ("half.mp4", "cannot be read"),
        ("cut.mp4", r"is cut short: it holds \d+ of its 40 frames"),
        ("none.mkv", "cannot be read: .*End of file"),
        ("none.mp4", "has no (frame|pictures)"),
        ("empty", "empty folder"),
    ]:
        with pytest.raises(UnusableSample, match=reason) as caught:
            read_frames(str(tmp_path / name), 4)
        assert name in str(caught.value)


def test_a_film_of_sound_alone(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    with pytest.raises(UnusableSample, match="has no pictures, only .*audio"):
        read_frames(str(tmp_path / "a.wav"), 4)


def test_fix_start_behind_the_end(tmp_path):
    path = film(tmp_path / "a.mp4", 8)
    assert [number(frame) for frame in read_frames(path, 2, "middle", fix_start=1)] == [1, 5]
    with pytest.raises(ValueError, match="fix_start 4 leads to frame 8 of the 8"):
        read_frames(path, 2, "middle", fix_start=4)


# -- upstream's names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_upstream_readers_draw_how_many_frames(tmp_path, name):
    path = MAKERS[name](tmp_path / name)
    reader = {"film.mp4": read_frames_decord, "film.gif": read_frames_gif, "film": read_frames_folder}[name]
    assert {len(reader(path, 6)) for _ in range(40)} == {4, 5, 6}, "min_num_frames is 4 by default"
    frames = reader(path, 5, "middle", min_num_frames=5)
    assert [number(frame) for frame in frames] == get_frame_indices(5, TOTAL, "middle")
    with pytest.raises(ValueError, match="min_num_frames 4 is not between 1 and num_frames 3"):
        reader(path, 3)
    with pytest.raises(ValueError, match="client 'petrel' is not asked for .*film"):
        reader(path, 6, client="petrel")


def test_loader_of_upstream(tmp_path, caplog):
    load = TCSLoader("~/petreloss.conf")
    assert "does not read ~/petreloss.conf" in caplog.text
    path = film(tmp_path / "a.mp4")
    frames = load(path, image_type="video", max_num_frames=3, min_num_frames=3, sample="middle", clip=(1, 2))
    assert [number(frame) for frame in frames] == [10 + index for index in get_frame_indices(3, 10, "middle")]
    frames[1].save(tmp_path / "a.png")
    assert number(load(str(tmp_path / "a.png"))) == number(frames[1])
    with pytest.raises(ValueError, match="image_type 'sound' is not image or video"):
        load(path, image_type="sound")
