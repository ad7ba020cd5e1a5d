"""tools/benchmark_loss.py: all contenders compute the same loss."""

import pytest

from internvl.tools import benchmark_loss


@pytest.mark.parametrize("train_head", [False, True])
def test_all_contenders_compute_the_same_loss(train_head):
    losses = []
    for name in benchmark_loss.CONTENDERS:
        facts, run_turn = benchmark_loss.start_contender(name, 64, 300, 16, train_head)
        turn = run_turn()
        assert facts["peak"] >= 0 and turn["seconds"] > 0
        losses += [facts["loss"], turn["loss"]]
    assert len(losses) == 6 and losses == pytest.approx([losses[0]] * 6, rel=1e-6)


@pytest.mark.multiprocess
def test_every_contender_has_a_row(capfd):
    benchmark_loss.main("--tokens 64 --vocabulary 300 --hidden 16 --turns 2".split())
    header, *rows = capfd.readouterr().out.splitlines()
    assert header.split()[:2] == ["tokens", "vocabulary"] and len(rows) == 3
    assert len({row.split()[-1] for row in rows}) == 1
    assert all(row.count("[") == 2 for row in rows) and "1.00 [1.00, 1.00]" in rows[2]


def test_only_our_loss_fits_at_any_size():
    fits = {
        name: benchmark_loss.fits_in_memory(logits_share, 10**9, 10**5)
        for name, (_, logits_share) in benchmark_loss.CONTENDERS.items()
    }
    assert fits == {"logits of all tokens": False, "logits of loss tokens": False, "ours": True}
