"""tools/benchmark_loss.py: all contenders compute the same loss."""

import pytest
from tools import benchmark_loss


@pytest.mark.parametrize("train_head", [False, True])
def test_all_contenders_compute_the_same_loss(train_head):
    rows = [benchmark_loss.measure_loss(name, 64, 300, 16, train_head) for name in benchmark_loss.CONTENDERS]
    assert len(rows) == 3 and all(row["seconds"] > 0 and row["peak"] >= 0 for row in rows)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 3, rel=1e-6)


@pytest.mark.multiprocess
def test_every_contender_has_a_row(capsys):
    benchmark_loss.main("--tokens 64 --vocabulary 300 --hidden 16".split())
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["tokens", "vocabulary"] and len(rows) == 3
    assert len({row.split()[-1] for row in rows}) == 1


def test_only_our_loss_fits_at_any_size():
    fits = {
        name: benchmark_loss.fits_in_memory(logits_share, 10**9, 10**5)
        for name, (_, logits_share) in benchmark_loss.CONTENDERS.items()
    }
    assert fits == {"logits of all tokens": False, "logits of loss tokens": False, "ours": True}
