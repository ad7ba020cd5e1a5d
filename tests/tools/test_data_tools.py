"""Upstream's data tools, called by upstream's paths and names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.paths import PACKAGE_DIR
from PIL import Image
from tools.extract_video_frames import get_index, transform_video
from tools.extract_video_frames import main as extract_video_frames
from tools.images_stitching import main as images_stitching
from tools.json2jsonl import main as json2jsonl
from tools.jsonl2jsonl import main as jsonl2jsonl
from tools.upstream.images_stitching import CAMERAS, LABEL_COLOR

RECORDS = [
    {"conversations": [{"from": "system", "value": "Réponds."}, {"from": "human", "value": "猫?"}], "image": "a.jpg"},
    {"id": "seven", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


def run_tool(name: str, *args) -> subprocess.CompletedProcess:
    """Run a tool as upstream's users do, with internvl_chat/ on PYTHONPATH."""
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, args)],
        cwd=PACKAGE_DIR,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_DIR)},
        capture_output=True,
        text=True,
    )


def read_jsonl(file: Path) -> list:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.multiprocess
def test_json2jsonl_keeps_system_turns_and_changes_the_extension_only(tmp_path):
    folder = tmp_path / "old.json.files"
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps(RECORDS))
    result = run_tool("json2jsonl", folder / "data.json")
    assert result.returncode == 0, result.stderr
    assert read_jsonl(folder / "data.jsonl") == [record | {"id": index} for index, record in enumerate(RECORDS)]
    assert "猫" in (folder / "data.jsonl").read_text(encoding="utf-8")

    again = run_tool("json2jsonl", folder / "data.json")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "Traceback" not in again.stderr


def test_jsonl2jsonl_numbers_records(tmp_path):
    folder = tmp_path / "old.jsonl.files"
    folder.mkdir()
    file = folder / "data.jsonl"
    file.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8")
    jsonl2jsonl([str(file)])
    assert read_jsonl(folder / "data_new.jsonl") == [record | {"id": index} for index, record in enumerate(RECORDS)]


@pytest.mark.parametrize(
    "tool, name, text, message",
    [
        (json2jsonl, "a.txt", "[]", r"expected a \*\.json file, got"),
        (json2jsonl, "a.json", "{}", "expected a list of JSON objects"),
        (json2jsonl, "a.json", "[1]", "expected a list of JSON objects"),
        (json2jsonl, "a.json", "[", "is not JSON"),
        (jsonl2jsonl, "a.json", "{}", r"expected a \*\.jsonl file, got"),
        (jsonl2jsonl, "a.jsonl", "{}\n{x", "line 2 is not JSON"),
    ],
)
def test_wrong_files_are_errors_of_one_line(tmp_path, tool, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        tool([str(tmp_path / name)])


def test_six_views_become_one_image(tmp_path):
    paths = {}
    for index, camera in enumerate(CAMERAS):
        file = tmp_path / "nuscenes" / "samples" / camera / "view.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (160, 90), (40 * index, 100, 20)).save(file)
        paths[camera] = f"../nuscenes/samples/{camera}/view.png"
    annotation = {"s1": {"key_frames": {"f1": {"image_paths": paths}, "f2": {"image_paths": paths}}}}
    (tmp_path / "ann.json").write_text(json.dumps(annotation))
    images_stitching(["--data-root", str(tmp_path), "--ann-file", str(tmp_path / "ann.json")])

    assert sorted(file.name for file in (tmp_path / "stitch").iterdir()) == ["s1_f1.jpg", "s1_f2.jpg"]
    image = np.asarray(Image.open(tmp_path / "stitch" / "s1_f2.jpg")).astype(int)
    assert image.shape == (896, 2688, 3)
    for index, camera in enumerate(CAMERAS):
        row, column = divmod(index, 3)
        view = image[row * 448 : (row + 1) * 448, column * 896 : (column + 1) * 896]
        assert abs(view[300, 600] - [40 * index, 100, 20]).max() < 6, camera
        assert (abs(view[:70] - LABEL_COLOR).max(axis=-1) < 60).any(), "no label"

    del paths["CAM_BACK"]
    (tmp_path / "ann.json").write_text(json.dumps(annotation))
    with pytest.raises(SystemExit, match="s1_f1 has no image of CAM_BACK"):
        images_stitching(["--data-root", str(tmp_path), "--ann-file", str(tmp_path / "ann.json")])


def write_video(path: Path, num_frames: int, fps: int = 10):
    """Write a video whose frame n has brightness 4 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 64
        for index in range(num_frames):
            frame = np.full((64, 64, 3), 4 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_each_video_question_gets_the_middle_frame_of_its_segment(tmp_path, capsys):
    questions = [
        {"question_type_id": 1, "question_id": "0", "data_id": "a.jpg"},
        {"question_type_id": 10, "question_id": "1", "data_id": "a.mp4"},
        {"question_type_id": 11, "question_id": "2", "data_id": "P01/b.mp4", "segment": [2.0, 4.0]},
        {"question_type_id": 12, "question_id": "3", "data_id": "P02/c.avi", "segment": [7, 30]},
    ]
    for name in ("ssv2/a.mp4", "epic/b.mp4", "breakfast/P02/c.avi"):
        write_video(tmp_path / name, 50)
    (tmp_path / "ann.json").write_text(json.dumps({"questions": questions}))
    args = ["--ann-file", tmp_path / "ann.json", "--output", tmp_path / "out", "--ssv2", tmp_path / "ssv2"]
    args += ["--epic-kitchens", tmp_path / "epic", "--breakfast", tmp_path / "breakfast", "--workers", "2"]
    extract_video_frames([str(arg) for arg in args])

    # Middle of frames 0..49, of seconds 2..4 (20..39), of frames 7..29.
    for name, frame in (("10_1", 24), ("11_2", 29), ("12_3", 18)):
        brightness = np.asarray(Image.open(tmp_path / "out" / f"{name}.png")).mean()
        assert round(brightness / 4) == frame, name
    assert len(list((tmp_path / "out").iterdir())) == 3 and "Images: 3" in capsys.readouterr().out

    (tmp_path / "ssv2" / "a.mp4").unlink()
    with pytest.raises(SystemExit, match=r"failed for 1 of 3 questions: 1: .*a\.mp4 does not exist"):
        extract_video_frames([str(arg) for arg in args])


def test_importable_names_of_upstreams_module():
    assert get_index(50, 1).tolist() == [24] and get_index(3, 8).tolist() == [0, 1, 2]
    buffer = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    assert [np.asarray(image).tolist() for image in transform_video(buffer)] == buffer.tolist()
