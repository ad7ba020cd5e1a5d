"""tools/benchmark_lora.py measures every contender and prints a row for it."""

import re

import pytest

from internvl.tools import benchmark_lora

SMALL = "--llm 1 --width 64 --tokens 32 --vit 1 --vit_width 64 --rank 2 --steps 2 --threads 1 --device cpu".split()
INTERVAL = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]")


@pytest.mark.multiprocess
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16", "--lora_fp32", "--grad_checkpoint"]], ids=["fp32", "bf16"])
def test_every_contender_has_a_row(capsys, options):
    assert not benchmark_lora.main([*SMALL, *options])
    _, *rows, summary = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(benchmark_lora.CONTENDERS)
    for row in rows:
        forward, step, share = (tuple(map(float, interval)) for interval in INTERVAL.findall(row))
        for median, low, high in (forward, step, share):
            assert low <= median <= high
        assert 0 < forward[0] < step[0] and float(row.split()[-1]) > 0
    assert rows[0].count("1.00 [1.00, 1.00]") == 1 and "times as fast" in summary
