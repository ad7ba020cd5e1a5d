"""The benchmark of the towers on a model of two layers: what it prints and writes."""

import json

import pytest
from tools.benchmark_towers import main

SMALL = "--width 128 --layers 2 --tokens 512 --tiles 4 --steps 2 --device cpu".split()


@pytest.mark.slow
def test_checkpoints_save_memory_and_change_no_loss(tmp_path, capfd):
    ways = ["no checkpoints", "all layers", "all layers, vision frozen"]
    main([*SMALL, "--ways", *ways, "--output", str(tmp_path / "numbers.json")])
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == 4 and all(line.startswith(name) for line, name in zip(printed[1:], ways, strict=True))
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert len({row["loss"] for row in found.values()}) == 1, "fresh adapters change nothing"
    assert found["all layers, vision frozen"]["memory"] <= found["all layers"]["memory"] < found[ways[0]]["memory"]
    assert all(row["seconds"] > 0 for row in found.values())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(SystemExit, match="error: --width 100 --tiles 4 --tokens 1024: steps of 128"):
        main(["--width", "100"])
