"""Sampling frames and reading them from video files, GIFs and folders."""

import json
import os
import random
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.samples import ANSWER as SAMPLE_ANSWER
from helpers.samples import QUESTION
from helpers.video_files import (
    NUM_FRAMES,
    read_frame_number,
    read_frame_numbers,
    write_frame_folder,
    write_gif,
    write_video,
)
from hypothesis import given
from hypothesis import strategies as st

from internvl.constants import UnusableSample
from internvl.data.image_files import load_image
from internvl.data.videos import count_frames, get_frame_indices, read_frames, sort_frames
from internvl.train.dataset import TCSLoader, read_frames_decord, read_frames_folder, read_frames_gif

FAULTS = Path(__file__).parent / "faults/vid"

# -- sampling ----------------------------------------------------------------------------------------------------------


def test_recorded_frame_indices(goldens):
    for line in (goldens / "video_sampling.jsonl").read_text().splitlines():
        row = json.loads(line)
        args = row["args"]
        random.seed(row["seed"])
        np.random.seed(row["seed"])
        if "error" in row:
            with pytest.raises((ValueError, ZeroDivisionError)):
                get_frame_indices(**args)
        else:
            assert get_frame_indices(**args) == row["frame_indices"], row


@pytest.mark.parametrize(("num_frames", "total"), [(8, 10), (5, 9), (12, 13), (31, 32)])
def test_short_videos_are_drawn_like_upstreams(num_frames, total):
    """Where an interval has one frame, upstream takes the first of numpy's permutation, after draws from `random`."""
    random.seed(3)
    np.random.seed(3)
    indices = get_frame_indices(num_frames, total)
    assert indices == sorted(np.random.RandomState(3).permutation(total)[:num_frames])
    assert all(type(index) is int for index in indices)
    # A generator makes all draws, and leaves the global ones alone.
    states = random.getstate(), np.random.get_state()[1].tolist()
    drawn = get_frame_indices(num_frames, total, generator=random.Random(3))
    assert drawn == sorted(random.Random(3).sample(range(total), num_frames))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_random_frames_are_spread_and_determined_by_the_generator():
    for seed in range(50):
        generator = random.Random(seed)
        num_frames, total = generator.randint(1, 20), generator.randint(1, 100)
        indices = get_frame_indices(num_frames, total, "rand", generator=random.Random(seed))
        assert indices == get_frame_indices(num_frames, total, "rand", generator=random.Random(seed))
        assert len(indices) == num_frames and indices == sorted(indices) and indices[0] >= 0 and indices[-1] < total
        assert len(set(indices)) == min(num_frames, total)
        if total >= 2 * num_frames:
            width = total / num_frames
            assert all(k * width - 1 <= index < (k + 1) * width for k, index in enumerate(indices))


# -- readers -----------------------------------------------------------------------------------------------------------

WRITERS = {"video.mp4": write_video, "video.gif": write_gif, "frames": write_frame_folder}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("sample", ["rand", "middle"])
@pytest.mark.parametrize("num_frames", [1, 7, 16, NUM_FRAMES])
def test_frames_read_are_those_sampled(tmp_path, name, sample, num_frames):
    path = WRITERS[name](tmp_path / name)
    frames = read_frames(path, num_frames, sample, generator=random.Random(3))
    expected = get_frame_indices(num_frames, NUM_FRAMES, sample, generator=random.Random(3))
    assert read_frame_numbers(frames) == expected
    assert count_frames(path, num_frames) == len(frames)


@pytest.mark.parametrize("key_every, b_frames", [(1, 0), (12, 2), (1000, 0), (1000, 2)])
def test_any_distance_of_key_frames(tmp_path, key_every, b_frames):
    path = write_video(tmp_path / "a.mp4", key_every=key_every, b_frames=b_frames)
    for num_frames in (3, NUM_FRAMES):
        frames = read_frames(path, num_frames, "middle")
        assert read_frame_numbers(frames) == get_frame_indices(num_frames, NUM_FRAMES, "middle")


@pytest.mark.parametrize(
    "name, options",
    {
        "h264.mp4": {"codec": "libx264", "b_frames": 2},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "xvid.avi": {"b_frames": 2},
        "seeks land after.ts": {"codec": "mpeg2video", "b_frames": 2},
        "seeks land anywhere.mpg": {"codec": "mpeg2video", "b_frames": 2},
        "no times.h264": {"codec": "libx264", "b_frames": 2},
        "sound.mp4": {"has_sound": True},
        "odd size.mp4": {"size": (47, 31)},
        "variable rate.mkv": {"hundredths": [k * k for k in range(NUM_FRAMES)]},
        "variable rate.mp4": {"codec": "libx264", "hundredths": [k + 50 * (k > 20) for k in range(NUM_FRAMES)]},
    }.items(),
)
def test_containers_and_codecs(tmp_path, name, options):
    path = write_video(tmp_path / name, **options)
    for num_frames, sample in ((3, "middle"), (9, "rand"), (NUM_FRAMES, "middle")):
        frames = read_frames(path, num_frames, sample, generator=random.Random(1))
        expected = get_frame_indices(num_frames, NUM_FRAMES, sample, generator=random.Random(1))
        assert read_frame_numbers(frames) == expected
        assert frames[0].size == options.get("size", (48, 32))


def test_frames_per_second_are_those_of_the_file(tmp_path):
    path = write_video(tmp_path / "a.mp4")  # 10 frames per second, 4 seconds
    assert read_frame_numbers(read_frames(path, 99, "fps1")) == [5, 15, 25, 35]
    assert read_frame_numbers(read_frames(path, 99, "fps2", clip=(1, 3))) == [12, 18, 22, 28]
    with pytest.raises(UnusableSample, match="fps0.01 selects no frame of video .*a.mp4"):
        read_frames(path, 99, "fps0.01")


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_are_turned_upright(tmp_path, rotation):
    """The file stores the degrees of counterclockwise rotation."""
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this version of PyAV cannot write rotated videos")
    gradient = np.broadcast_to(np.arange(0, 240, 5, np.uint8)[:, None, None], (48, 32, 3)).copy()
    options = {"frames": 1, "size": (32, 48), "draw_fn": lambda index, *size: gradient}
    stored = read_frames(write_video(tmp_path / "stored.mp4", **options), 1)[0]
    upright = read_frames(write_video(tmp_path / "upright.mp4", rotation=rotation, **options), 1)[0]
    assert upright.tobytes() == stored.rotate(rotation, expand=True).tobytes() != stored.tobytes()


def test_clip_is_in_seconds(tmp_path):
    path = write_video(tmp_path / "a.mp4")  # 10 frames per second
    numbers = read_frame_numbers(read_frames(path, 5, "middle", clip=(1.5, 2.5)))
    assert numbers == [15 + index for index in get_frame_indices(5, 10, "middle")]
    numbers = read_frame_numbers(read_frames(path, 1, "middle", clip=(3.8, 99)))
    assert numbers == [38], "a clip that is too long ends with the video"
    reason = r"clip \[7, 8\] of video .*a.mp4 contains no frame: the video ends at 4 s"
    for function in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match=reason):
            function(path, 5, clip=(7, 8))


@pytest.mark.parametrize("clip", [3, [1], [1, 2, 3], ["1", "2"], [2, 1], [-1, 1], [1, 1], [True, 2], {}])
def test_invalid_clips_are_reported(tmp_path, clip):
    path = write_video(tmp_path / "a.mp4", 3)
    for function in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match=r"is not \[start, end\] in seconds"):
            function(path, 2, clip=clip)


@pytest.mark.parametrize("name", ["video.gif", "frames"])
def test_clip_requires_a_video_file(tmp_path, name):
    path = WRITERS[name](tmp_path / name, 3)
    for function in (count_frames, read_frames):
        with pytest.raises(UnusableSample, match=rf"clip \[0, 1\] is not supported for the (GIF|folder) {path}"):
            function(path, 2, clip=[0, 1])


@pytest.mark.parametrize(
    "name, expected", [("video.mp4", [0, 1, 2, 2, 2, 2]), ("video.gif", [0, 1, 2]), ("frames", [0, 1, 2])]
)
def test_short_videos(tmp_path, name, expected):
    path = WRITERS[name](tmp_path / name, 3)
    assert read_frame_numbers(read_frames(path, 6, generator=random.Random(0))) == expected
    assert count_frames(path, 6) == len(expected)


def test_frames_of_a_folder_are_sorted_by_number():
    names = ["a_10.jpg", "a_2.jpg", "cover.jpg", "b_1.png"]
    assert sort_frames(names) == ["cover.jpg", "b_1.png", "a_2.jpg", "a_10.jpg"]


def test_files_without_a_number_at_the_end_are_in_natural_order():
    names = ["1.jpg", "2.jpg", "10.jpg", "11.jpg", "shot2 a9.png", "shot2 a10.png", "shot10 a1.png", "frame_0.jpg"]
    assert sort_frames(names[::-1]) == names
    # Names with `_N` keep upstream's order, by N alone.
    assert sort_frames(["b2_1.jpg", "a1_2.jpg", "b10_1.jpg", "a_10.jpg"]) == [
        "b2_1.jpg",
        "b10_1.jpg",
        "a1_2.jpg",
        "a_10.jpg",
    ]


@given(st.lists(st.text("ab1_.é9²٣ -", min_size=1, max_size=9), min_size=1, max_size=8, unique=True))
def test_any_names_have_one_order(names):
    in_order = sort_frames(names)
    assert sorted(in_order) == sorted(names) and in_order == sort_frames(sorted(names))


@pytest.mark.parametrize("name", ["frames_plain", "frames_noise"])
def test_fault_folders(name):
    """Unpadded numbers; beside the frames lie Thumbs.db and captions.txt."""
    folder = FAULTS / name
    names = [f"{'' if name == 'frames_plain' else 'frame_'}{number}.jpg" for number in range(12)]
    frames = read_frames(str(folder), 12)
    assert [frame.tobytes() for frame in frames] == [load_image(str(folder / name)).tobytes() for name in names]
    assert count_frames(str(folder), 32) == 12


def test_only_image_files_of_a_folder_are_frames(tmp_path):
    path = Path(write_frame_folder(tmp_path / "frames", 5))  # with .DS_Store
    for name in ("Thumbs.db", "captions.txt", "index.json", "frame_7", "._frame_1.png", "sound.wav", "frame_8.mp4"):
        (path / name).write_text("no frame")
    os.mkfifo(path / "control")
    (path / "frame_9.png").mkdir()
    (path / "frame_3.png").rename(path / "frame_3.PNG")
    assert read_frame_numbers(read_frames(str(path), 9)) == list(range(5)) and count_frames(str(path), 9) == 5


def test_frames_that_are_links_are_checked_when_measured(make_dataset, tmp_path, tmp_path_factory):
    elsewhere = write_frame_folder(tmp_path_factory.mktemp("elsewhere") / "frames", 3)
    path = Path(write_frame_folder(tmp_path / "linked", 3))
    (path / "frame_3.png").symlink_to("frame_1.png")
    record = {"video": "linked", "conversations": [QUESTION | {"value": "<video>\nWhat?"}, SAMPLE_ANSWER]}
    dataset = make_dataset(record, max_length=4000)
    assert dataset.measure(0)[2] == 4 == len(dataset.get(0, 0)["pixel_values"])
    (path / "frame_4.png").symlink_to(f"{elsewhere}/frame_1.png")
    for method in (dataset.measure, lambda index: dataset.get(index, 0)):
        with pytest.raises(UnusableSample, match="frame_4.png lies outside the root"):
            method(0)


def test_unreadable_videos_are_reported(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.gif").write_text("not a video")
    (tmp_path / "empty").mkdir()
    content = Path(write_video(tmp_path / "full.mp4")).read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    # With its index in front, a truncated file can still be opened.
    content = Path(write_video(tmp_path / "stream.mp4", movflags="faststart")).read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(content[: len(content) * 3 // 4])
    write_video(tmp_path / "no frame.mkv", 0)
    write_video(tmp_path / "no frame.mp4", 0, has_sound=True)
    for name, reason in [
        ("absent.mp4", "does not exist"),
        ("absent.gif", "does not exist"),
        ("text.mp4", "cannot be read"),
        ("text.gif", "not an image"),
        ("half.mp4", "cannot be read"),
        ("truncated.mp4", r"is truncated: it has \d+ of its 40 frames"),
        ("no frame.mkv", "cannot be read: .*End of file"),
        ("no frame.mp4", "has no (frame|video stream)"),
        ("empty", "is a folder without image files"),
    ]:
        with pytest.raises(UnusableSample, match=reason) as caught:
            read_frames(str(tmp_path / name), 4)
        assert name in str(caught.value)


def test_sound_without_video_is_reported(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    with pytest.raises(UnusableSample, match="has no video stream, only audio"):
        read_frames(str(tmp_path / "a.wav"), 4)


def test_fix_start_after_the_last_frame_is_reported(tmp_path):
    path = write_video(tmp_path / "a.mp4", 8)
    assert read_frame_numbers(read_frames(path, 2, "middle", fix_start=1)) == [1, 5]
    with pytest.raises(ValueError, match="fix_start 4 selects frame 8 of the 8"):
        read_frames(path, 2, "middle", fix_start=4)


# -- upstream's functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_upstream_readers_draw_the_number_of_frames(tmp_path, name):
    path = WRITERS[name](tmp_path / name)
    read_fn = {"video.mp4": read_frames_decord, "video.gif": read_frames_gif, "frames": read_frames_folder}[name]
    assert {len(read_fn(path, 6)) for _ in range(40)} == {4, 5, 6}, "min_num_frames is 4 by default"
    frames = read_fn(path, 5, "middle", min_num_frames=5)
    assert read_frame_numbers(frames) == get_frame_indices(5, NUM_FRAMES, "middle")
    with pytest.raises(ValueError, match="min_num_frames 4 is not between 1 and num_frames 3"):
        read_fn(path, 3)
    with pytest.raises(ValueError, match=f"client 'petrel' is not supported .reading .*{name}"):
        read_fn(path, 6, client="petrel")


def test_tcs_loader(tmp_path, caplog):
    load_fn = TCSLoader("~/petreloss.conf")
    assert "~/petreloss.conf is ignored" in caplog.text
    path = write_video(tmp_path / "a.mp4")
    frames = load_fn(path, image_type="video", max_num_frames=3, min_num_frames=3, sample="middle", clip=(1, 2))
    assert read_frame_numbers(frames) == [10 + index for index in get_frame_indices(3, 10, "middle")]
    frames[1].save(tmp_path / "a.png")
    assert read_frame_number(load_fn(str(tmp_path / "a.png"))) == read_frame_number(frames[1])
    with pytest.raises(ValueError, match="image_type 'sound' is not supported: expected image or video"):
        load_fn(path, image_type="sound")
