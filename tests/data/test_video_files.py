"""Video files: clips by timestamps, and what measuring finds without decoding."""

import math
import random
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.samples import ANSWER, QUESTION
from helpers.video_files import NUM_FRAMES, read_frame_numbers, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl.constants import UnusableSample
from internvl.data.image_files import ImageDecoding
from internvl.data.videos import count_frames, read_frames

FAULTS = Path(__file__).parent / "faults/vid"
VIDEO_TURNS = [QUESTION | {"value": "<video>\nWhat happens?"}, ANSWER]


def get_outcomes(path, clip=None, num_frames: int = 4) -> tuple[str, str]:
    """Return the reasons of measuring and of reading, "" where the video is usable; their counts must agree."""
    outcomes = []
    for function in (count_frames, lambda *args: len(read_frames(*args, clip=clip, generator=random.Random(0)))):
        try:
            result = (
                function(str(path), num_frames, clip) if function is count_frames else function(str(path), num_frames)
            )
            outcomes.append(("", result))
        except UnusableSample as reason:
            outcomes.append((str(reason), 0))
    if not any(reason for reason, _ in outcomes):
        assert outcomes[0] == outcomes[1]
    return outcomes[0][0], outcomes[1][0]


# -- clips -------------------------------------------------------------------------------------------------------------

# Hundredths of a second at which frames are first shown. The last one is shown for as long as a mean frame.
VARIABLE_TIMES = [0, 5, 10, 20, 40, 80, 160, 300, 310, 320, 700]


def write_variable(path: Path, **options) -> str:
    return write_video(path, len(VARIABLE_TIMES), hundredths=VARIABLE_TIMES, codec="libx264", key_every=3, **options)


def list_shown_frames(start: float, end: float) -> list[int]:
    """List the frames of `write_variable` that are shown at some time in [start, end)."""
    ends = [*VARIABLE_TIMES[1:], math.inf]
    return [k for k, time in enumerate(VARIABLE_TIMES) if time < end * 100 and ends[k] > start * 100]


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def variable_video(request, tmp_path_factory) -> str:
    return write_variable(tmp_path_factory.mktemp("variable") / f"a.{request.param}")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 699), st.integers(1, 800))
def test_clips_of_variable_frame_rate(variable_video, start, length):
    clip = (start / 100, (start + length) / 100)
    expected = list_shown_frames(*clip)
    frames = read_frames(variable_video, len(expected), "middle", clip=clip)
    assert read_frame_numbers(frames) == expected
    assert count_frames(variable_video, 3, clip) == 3


def test_seconds_start_with_the_first_frame(tmp_path):
    """Streams of MPEG-TS begin at any time."""
    path = write_video(tmp_path / "a.ts", codec="mpeg2video")
    assert read_frame_numbers(read_frames(path, 10, "middle", clip=(1, 2))) == list(range(10, 20))


@pytest.mark.parametrize("name", ["a.mp4", "a.h264"])
def test_a_clip_within_one_frame_gives_that_frame(tmp_path, name):
    path = write_video(tmp_path / name, codec="libx264")  # 10 frames per second; H.264 has no times
    fps = 10 if name == "a.mp4" else av.open(path).streams.video[0].average_rate
    assert read_frame_numbers(read_frames(path, 3, clip=(15.2 / fps, 15.6 / fps))) == [15] * 3
    assert read_frame_numbers(read_frames(path, 1, clip=(39.2 / fps, 39.6 / fps))) == [39]


def test_fault_clip_of_a_phone():
    """60 frames in the first second, one in each of the next."""
    frames = read_frames(str(FAULTS / "phone.mp4"), 3, "middle", clip=(2, 5))
    with av.open(str(FAULTS / "phone.mp4")) as container:
        shown = {round(frame.time): frame.to_image() for frame in container.decode(video=0)}
    assert [frame.tobytes() for frame in frames] == [shown[second].tobytes() for second in (2, 3, 4)]


@pytest.mark.parametrize(
    "clip",
    [
        [0, math.inf],
        [math.nan, 1],
        [0, math.nan],
        [0, 1e308],
        [0, 10**400],
        [10**400, 10**401],
        ["0", "1"],
        [False, True],
    ]
    + [[-(10**400), 1], [[0], 1], [None, 1], "01", {"0": 1}, [0, 2, 4], ["9" * 10**6, 1]],
)
def test_odd_clips_are_reported_in_a_sentence(tmp_path, clip):
    path = write_video(tmp_path / "a.mp4", 3)
    measured, read = get_outcomes(path, clip)
    assert measured == read and len(read) < 250
    assert "is not [start, end] in seconds with 0 <= start < end <= 1,000,000" in read


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_measuring_finds_unusable_video_files(tmp_path):
    content = Path(write_video(tmp_path / "full.mp4", movflags="faststart")).read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.mp4").write_bytes(content[:-1])
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    write_video(tmp_path / "none.mkv", 0)
    write_video(tmp_path / "none.mp4", 0, has_sound=True)
    for path, reason in {
        FAULTS / "empty.mp4": "is empty",
        FAULTS / "html.mp4": "HTML page|cannot be read",
        FAULTS / "audio_only.mp4": "has no video stream, only audio",
        tmp_path / "half.mp4": r"is truncated: it has \d+ of its 40 frames",
        tmp_path / "cut.mp4": r"is truncated: it has 39 of its 40 frames",
        tmp_path / "lfs.mp4": "pointer of Git LFS",
        tmp_path / "none.mkv": "cannot be read",
        tmp_path / "none.mp4": "has no (frame|video stream)",
        tmp_path / "absent.mp4": "does not exist",
    }.items():
        measured, read = get_outcomes(path)
        assert measured == read
        with pytest.raises(UnusableSample, match=f"{path.name}.*({reason})"):
            count_frames(str(path), 4)
    measured, read = get_outcomes(FAULTS / "plain.mp4", [100, 200])
    assert measured == read and "clip [100, 200] of video" in read and "the video ends at 1.2 s" in read


def test_messages_of_ffmpeg_are_not_logged_by_python(tmp_path):
    """Threads of FFmpeg would wait for the GIL. torchvision 0.21 to 0.24 turn it on."""
    av.logging.set_level(av.logging.ERROR)
    read_frames(write_video(tmp_path / "a.mp4", 4), 2)
    assert av.logging.get_level() is None


CONTAINERS = {
    "a.mp4": {"codec": "libx264", "b_frames": 2},
    "b.mkv": {"codec": "libx264", "b_frames": 2},
    "c.webm": {"codec": "libvpx-vp9"},
    "d.avi": {},
    "e.ts": {"codec": "mpeg2video", "b_frames": 2},
    "f.gif": None,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_files_are_unusable_samples_or_videos(tmp_path, name):
    """Never another error. What measuring refuses, reading refuses for the same reason."""
    if name.endswith("gif"):
        path = tmp_path / "f.bin"
        frames = [Image.new("P", (20, 10), k) for k in range(9)]
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    else:
        path = Path(write_video(tmp_path / name, 12, **CONTAINERS[name]))
    content = path.read_bytes()
    generator = random.Random(name)
    for trial in range(60):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3, 30])):
            damaged[generator.randrange(len(damaged) if trial % 2 else min(600, len(damaged)))] = generator.randrange(
                256
            )
        if trial % 5 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        clip = generator.choice([None, None, (0, 0.5), (0.95, 1), (1.3, 2)])
        measured, read = get_outcomes(path, clip)
        assert not measured or measured == read, trial


def test_metadata_in_another_encoding(tmp_path):
    path = Path(write_video(tmp_path / "a.mkv", 3))
    content = path.read_bytes()
    assert content.count(b"Lavf") >= 1
    path.write_bytes(content.replace(b"Lavf", b"L\xffvf"))
    assert get_outcomes(path) == ("", "")


# -- frames ------------------------------------------------------------------------------------------------------------


def test_transparent_frames_show_the_background(tmp_path):
    frames = [Image.new("RGBA", (16, 16), (120, 120, 120, 255 * (k % 2))) for k in range(4)]
    frames[0].save(tmp_path / "a.apng", "PNG", save_all=True, append_images=frames[1:], blend=0)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    for name in ("a.apng", "a.gif"):
        for background in ((255, 255, 255), (9, 99, 199)):
            pixels = [
                np.asarray(f)[3, 3] for f in read_frames(str(tmp_path / name), 4, decoding=ImageDecoding(background))
            ]
            assert np.abs(np.stack(pixels[:2]).astype(int) - [background, (120, 120, 120)]).max() <= 1


def test_videos_are_opened_by_content_alone(tmp_path):
    """PyAV gets the open file: a name like a URL or an option opens nothing else."""
    write_video(tmp_path / "a.mp4")
    for name in ("concat:x|y.mp4", "-i.mp4", "http:a.mp4", "%03d.mp4", "a b\n.mp4"):
        (tmp_path / "a.mp4").rename(tmp_path / name)
        assert len(read_frames(str(tmp_path / name), NUM_FRAMES)) == NUM_FRAMES
        (tmp_path / name).rename(tmp_path / "a.mp4")


def test_check_and_training_agree_on_fault_videos(make_dataset):
    lines = {"F06_bad_films.jsonl": 4, "F08_vfr_clip.jsonl": 0}
    for name, num_unusable in lines.items():
        meta = {"root": str(FAULTS), "annotation": str(FAULTS.parent / name)}
        dataset = make_dataset(meta=meta, max_length=9000)
        reasons = []
        for method in (dataset.measure, lambda index, dataset=dataset: dataset.get(index, 0)):
            for index in range(len(dataset)):
                try:
                    method(index)
                except UnusableSample as reason:
                    reasons.append((index, str(reason)))
        assert len(reasons) == 2 * num_unusable and reasons[:num_unusable] == reasons[num_unusable:]
