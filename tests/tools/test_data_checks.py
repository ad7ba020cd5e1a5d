"""tools/check_data.py, and the benchmarks of planners and loader."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.training_runs import copy_tiny_model, write_meta_file
from tools import benchmark_loader, benchmark_plan, check_data

FLAGS = """--conv_style internvl2_5 --force_image_size 56 --dynamic_image_size True --use_thumbnail True
    --max_dynamic_patch 4 --use_packed_ds True --max_packed_tokens 420""".split()


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    copy_tiny_model(goldens, folder)
    shutil.copy(goldens / "dataset/ds_main.jsonl", folder / "train.jsonl")
    write_meta_file(folder, goldens / "dataset/images")
    return folder


def check(folder: Path, report: Path, *flags: str) -> int:
    argv = [str(folder / "meta.json"), "--model_name_or_path", str(folder / "model"), "--report", str(report)]
    with pytest.raises(SystemExit) as end:
        check_data.main([*argv, *FLAGS, *flags])
    return end.value.code


def test_report_lists_skipped_samples_and_statistics(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    lines = (folder / "train.jsonl").read_text().splitlines()
    broken = dict(enumerate(lines)) | {3: lines[3].replace(".png", ".gif"), 5: lines[5][:40]}
    (folder / "train.jsonl").write_text("\n".join(broken.values()))
    assert check(folder, tmp_path / "broken", "--ranks", "2") == 1
    text = capsys.readouterr().out
    skipped = [json.loads(line) for line in (tmp_path / "broken/skipped_samples.jsonl").read_text().splitlines()]
    reasons = {entry["line"]: entry["reason"] for entry in skipped}
    assert "does not exist" in reasons[4] and "line 6 is not JSON" in reasons[6]
    assert all(entry["dataset"] == "tiny" and entry["file"] == str(folder / "train.jsonl") for entry in skipped)
    expected = ["Most tiles:", "Smallest share of loss tokens:", "Tokens per sample:", "= 2 ranks x", "Epoch plan:"]
    for line in [*expected, f"Skipped samples: {len(skipped)}"]:
        assert line in text
    assert (tmp_path / "broken/summary.txt").read_text().splitlines()[0] in text
    assert (tmp_path / "broken/lengths.png").read_bytes().startswith(b"\x89PNG")

    good = [line for number, line in enumerate(lines, start=1) if number not in reasons]
    (folder / "train.jsonl").write_text("\n".join(good))
    assert check(folder, tmp_path / "good") == 0
    assert (tmp_path / "good/skipped_samples.jsonl").read_text() == ""
    assert check(folder, tmp_path / "none", "--max_packed_tokens", "9") == 1, "no sample fits into a row"
    assert "do not fit into a row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--conv_style", "vicuna"], "--conv_style vicuna"),
        (["--colour", "red"], "unknown flag: --colour red"),
    ],
)
def test_invalid_flags_are_one_error(folder, tmp_path, flags, reason):
    assert str(check(folder, tmp_path, *flags)).startswith(f"error: {reason}")


def test_our_plan_has_the_best_packing_and_load_balance(tmp_path, capsys):
    benchmark_plan.main(["--samples", "20000", "--output", str(tmp_path / "plan")])
    results = json.loads((tmp_path / "plan.json").read_text())
    assert len(results) == 2 * len(benchmark_plan.PLANNERS) and (tmp_path / "plan.png").exists()
    for mixture, min_efficiency in (("images", 0.97), ("with text", 0.99)):
        ours, *others = [result for result in results if result["mixture"] == mixture]
        assert ours["planner"] == "ours" and ours["packing_efficiency"] >= min_efficiency
        assert ours["load_imbalance_8"] <= 0.01 and ours["load_imbalance_64"] <= 0.03
        for other in others:
            assert other["load_imbalance_8"] > 2 * ours["load_imbalance_8"]
            assert other["packing_efficiency"] < ours["packing_efficiency"] + 0.005
    assert capsys.readouterr().out.count("first fit") == 2


@pytest.mark.multiprocess
def test_benchmark_of_the_loader(capsys):
    benchmark_loader.main(["--lines", "3000", "--workers", "1"])
    text = capsys.readouterr().out
    for line in ("Opening, first time:", "Memory growth:", "samples/s on one core", "tiles/s with 1 workers"):
        assert line in text
