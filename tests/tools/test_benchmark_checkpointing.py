"""tools/benchmark_checkpointing.py on a model of two layers: its table and JSON file."""

import json

import pytest

from internvl.tools.benchmark_checkpointing import main

SMALL = "--width 128 --layers 2 --tokens 512 --tiles 4 --steps 2 --device cpu".split()


@pytest.mark.multiprocess
def test_checkpointing_saves_memory_and_keeps_the_loss(tmp_path, capfd):
    names = ["no checkpointing", "all layers", "all layers, vision frozen"]
    main([*SMALL, "--variants", *names, "--output", str(tmp_path / "results.json")])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith(name) for line, name in zip(lines[1:], names, strict=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len({row["loss"] for row in results.values()}) == 1, "new adapters must not change the loss"
    assert results[names[2]]["memory"] <= results["all layers"]["memory"] < results[names[0]]["memory"]
    for row in results.values():
        median, low, high = row["seconds"]
        assert 0 < low < median < high and len(row["turns"]) == 2
    assert results[names[0]]["relative"] == [1, 1, 1]


def test_invalid_sizes_are_rejected():
    with pytest.raises(SystemExit, match="error: --width 100 --tiles 4 --tokens 1024 is invalid"):
        main(["--width", "100"])
