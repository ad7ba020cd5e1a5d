"""tools/benchmark_lora.py measures every contender and prints a row for it."""

import pytest
from tools import benchmark_lora

SMALL = "--llm 1 --width 64 --tokens 32 --vit 1 --vit_width 64 --rank 2 --steps 1 --threads 1 --device cpu".split()


@pytest.mark.multiprocess
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16", "--lora_fp32", "--grad_checkpoint"]], ids=["fp32", "bf16"])
def test_every_contender_has_a_row(capsys, options):
    assert not benchmark_lora.main([*SMALL, *options])
    _, *rows, summary = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(benchmark_lora.CONTENDERS)
    for row in rows:
        _, forward, _, step, _, share, memory, _ = row.split()
        assert 0 < float(forward) < float(step) and float(share.rstrip("%")) < 100 and float(memory) > 0
    assert "times as fast" in summary
