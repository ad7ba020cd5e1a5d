"""check_data finds what training would find; the planners are measured beside each other."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.training_runs import copy_model, write_meta
from tools import benchmark_loader, benchmark_plan, check_data

FLAGS = """--conv_style internvl2_5 --force_image_size 56 --dynamic_image_size True --use_thumbnail True
    --max_dynamic_patch 4 --use_packed_ds True --max_packed_tokens 420""".split()


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    copy_model(goldens, folder)
    shutil.copy(goldens / "dataset/ds_main.jsonl", folder / "train.jsonl")
    write_meta(folder, goldens / "dataset/images")
    return folder


def check(folder: Path, report: Path, *flags: str) -> int:
    argv = [str(folder / "meta.json"), "--model_name_or_path", str(folder / "model"), "--report", str(report)]
    with pytest.raises(SystemExit) as end:
        check_data.main([*argv, *FLAGS, *flags])
    return end.value.code


def test_what_is_wrong_is_named_and_what_is_there_is_counted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    lines = (folder / "train.jsonl").read_text().splitlines()
    broken = dict(enumerate(lines)) | {3: lines[3].replace(".png", ".gif"), 5: lines[5][:40]}
    (folder / "train.jsonl").write_text("\n".join(broken.values()))
    assert check(folder, tmp_path / "broken", "--ranks", "2") == 1
    text = capsys.readouterr().out
    bad = [json.loads(line) for line in (tmp_path / "broken/bad_samples.jsonl").read_text().splitlines()]
    found = {entry["line"]: entry["reason"] for entry in bad}
    assert "does not exist" in found[4] and "line 6 is not JSON" in found[6]
    assert all(entry["data_set"] == "tiny" and entry["file"] == str(folder / "train.jsonl") for entry in bad)
    for part in ("most tiles", "smallest share trained", "tokens of a sample", "2 ranks x", f"bad samples: {len(bad)}"):
        assert part in text
    assert (tmp_path / "broken/summary.txt").read_text().splitlines()[0] in text
    assert (tmp_path / "broken/lengths.png").read_bytes().startswith(b"\x89PNG")

    good = [line for number, line in enumerate(lines, start=1) if number not in found]
    (folder / "train.jsonl").write_text("\n".join(good))
    assert check(folder, tmp_path / "good") == 0
    assert (tmp_path / "good/bad_samples.jsonl").read_text() == ""
    assert check(folder, tmp_path / "none", "--max_packed_tokens", "9") == 1, "nothing fits a row"
    assert "do not fit into a row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--conv_style", "vicuna"], "--conv_style vicuna"),
        (["--colour", "red"], "not a flag of this program: --colour red"),
    ],
)
def test_wrong_flags_are_one_sentence(folder, tmp_path, flags, reason):
    assert str(check(folder, tmp_path, *flags)).startswith(f"error: {reason}")


def test_our_rows_are_fuller_and_wait_less(tmp_path, capsys):
    benchmark_plan.main(["--samples", "20000", "--output", str(tmp_path / "plan")])
    results = json.loads((tmp_path / "plan.json").read_text())
    assert len(results) == 2 * len(benchmark_plan.PLANNERS) and (tmp_path / "plan.png").exists()
    for mixture, full in (("images", 0.97), ("with text", 0.99)):
        ours, *others = [result for result in results if result["mixture"] == mixture]
        assert ours["planner"] == "ours" and ours["fill"] >= full
        assert ours["idle at 8"] <= 0.01 and ours["idle at 64"] <= 0.03
        assert all(
            other["idle at 8"] > 2 * ours["idle at 8"] and other["fill"] < ours["fill"] + 0.005 for other in others
        )
    assert capsys.readouterr().out.count("first fit") == 2


def test_the_loader_is_measured(capsys):
    benchmark_loader.main(["--lines", "3000", "--workers", "1"])
    text = capsys.readouterr().out
    for part in ("opened first", "growth:", "samples a second on one core", "tiles a second with 1 workers"):
        assert part in text
