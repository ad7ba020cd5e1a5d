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

from internvl.tools.extract_video_frames import get_index, transform_video
from internvl.tools.extract_video_frames import main as extract_video_frames
from internvl.tools.images_stitching import main as images_stitching
from internvl.tools.json2jsonl import main as json2jsonl
from internvl.tools.jsonl2jsonl import main as jsonl2jsonl
from internvl.tools.upstream.images_stitching import CAMERAS, LABEL_COLOR

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
        (json2jsonl, "a.json", '[{"id": 1, "id": 2}]', "is ambiguous: the key 'id' is used twice"),
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


ESCAPES = {
    "absolute scene": (lambda a: a.update({"/tmp/evil": a.pop("s1")}), "'/tmp/evil_f1' has a slash"),
    "scene above": (lambda a: a.update({"../../evil": a.pop("s1")}), "'../../evil_f1' has a slash"),
    "frame above": (lambda a: a["s1"].update(key_frames={"/../../x": a["s1"]["key_frames"]["f1"]}), "has a slash"),
    "camera above": (
        lambda a: a["s1"]["key_frames"]["f1"]["image_paths"].update(CAM_BACK="../../x.png"),
        "leads out of",
    ),
    "link": (lambda a: a["s1"]["key_frames"]["f1"]["image_paths"].update(CAM_BACK="link.png"), "leads out of"),
    "number": (lambda a: a["s1"]["key_frames"]["f1"].update(image_paths=5), "is not a DriveLM annotation"),
}


@pytest.mark.parametrize(("change_fn", "message"), ESCAPES.values(), ids=ESCAPES)
def test_stitching_stays_below_its_folder(tmp_path, change_fn, message):
    root = tmp_path / "a/b"
    root.mkdir(parents=True)
    for file in (root / "x.png", tmp_path / "x.png"):
        Image.new("RGB", (8, 8)).save(file)
    (root / "link.png").symlink_to(tmp_path / "x.png")
    annotation = {"s1": {"key_frames": {"f1": {"image_paths": dict.fromkeys(CAMERAS, "x.png")}}}}
    change_fn(annotation)
    (tmp_path / "ann.json").write_text(json.dumps(annotation))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        images_stitching(["--data-root", str(root), "--ann-file", str(tmp_path / "ann.json")])
    assert not list(tmp_path.rglob("*.jpg")) and not Path("/tmp/evil_f1.jpg").exists()


def test_stitching_does_not_follow_links_out_of_its_folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "x.png")
    annotation = {"s1": {"key_frames": {"f1": {"image_paths": dict.fromkeys(CAMERAS, "x.png")}}}}
    (tmp_path / "ann.json").write_text(json.dumps(annotation))
    args = ["--data-root", str(root), "--ann-file", str(tmp_path / "ann.json")]
    (root / "stitch").symlink_to(tmp_path)
    with pytest.raises(SystemExit, match="^error: 'stitch' leads out of the folder"):
        images_stitching(args)
    (root / "stitch").unlink()
    (root / "stitch").mkdir()
    (root / "stitch/s1_f1.jpg").symlink_to(tmp_path / "victim")
    with pytest.raises(SystemExit, match="^error: 's1_f1.jpg' leads out of the folder"):
        images_stitching(args)
    assert not (tmp_path / "victim").exists()


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


WRONG_QUESTIONS = {
    "id above": ({"question_id": "/../../evil"}, "leads out of"),
    "id with a slash": ({"question_id": "x/evil"}, "has a slash"),
    "video above": ({"data_id": "../a.mp4"}, "leads out of"),
    "absolute video": ({"data_id": "/etc/passwd"}, "leads out of"),
    "object as id": ({"question_id": {}}, "must be texts"),
    "segment of texts": ({"question_type_id": 12, "segment": ["a", "b"]}, r"segment .* is not \[first, last\]"),
    "segment behind the end": ({"question_type_id": 12, "segment": [60, 70]}, "contains no frame"),
    "infinite segment": ({"segment": [0, float("inf")]}, "clip"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG_QUESTIONS.values(), ids=WRONG_QUESTIONS)
def test_questions_name_files_below_their_folders(tmp_path, fields, message):
    write_video(tmp_path / "videos/a.mp4", 20)
    (tmp_path / "out/10_x").mkdir(parents=True)
    question = {"question_type_id": 10, "question_id": "1", "data_id": "a.mp4"} | fields
    (tmp_path / "ann.json").write_text(json.dumps({"questions": [question]}))
    args = ["--ann-file", tmp_path / "ann.json", "--output", tmp_path / "out", "--workers", "1"]
    args += ["--ssv2", tmp_path / "videos", "--breakfast", tmp_path / "videos"]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        extract_video_frames([str(arg) for arg in args])
    assert not list(tmp_path.rglob("*.png"))


def test_importable_names_of_upstreams_module():
    assert get_index(50, 1).tolist() == [24] and get_index(3, 8).tolist() == [0, 1, 2]
    buffer = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    assert [np.asarray(image).tolist() for image in transform_video(buffer)] == buffer.tolist()
