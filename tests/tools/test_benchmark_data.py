"""Benchmarks of planners and of the loader."""

import json
import re

import pytest

from internvl.tools import benchmark_loader, benchmark_plan


def test_our_plan_has_the_best_packing_and_load_balance(tmp_path, capsys):
    benchmark_plan.main(["--samples", "20000", "--draws", "2", "--output", str(tmp_path / "plan")])
    results = json.loads((tmp_path / "plan.json").read_text())
    assert len(results) == 2 * len(benchmark_plan.PLANNERS) and (tmp_path / "plan.png").exists()
    keys = ("packing_efficiency", *(f"load_imbalance_{world_size}" for world_size in (8, 64)))
    assert all(0 < result[key][1] < result[key][0] < result[key][2] <= 1 for result in results for key in keys)
    results = [result | {key: result[key][0] for key in keys} for result in results]  # medians
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
    for line in ("Opening, from cache", "Measuring", "Loading"):
        assert re.search(rf"{line}: [\d,.]+ \[[\d,.]+, [\d,.]+\]", text), text
