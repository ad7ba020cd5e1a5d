import pytest
from tools import benchmark_loss


@pytest.mark.parametrize("train_head", [False, True])
def test_what_is_measured_is_the_same_loss(train_head):
    rows = [benchmark_loss.measure(name, 64, 300, 16, train_head) for name in benchmark_loss.CONTENDERS]
    assert len(rows) == 3 and all(row["seconds"] > 0 and row["peak"] >= 0 for row in rows)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 3, rel=1e-6)


def test_a_row_of_the_table_is_measured_in_a_process_of_its_own(capsys):
    benchmark_loss.main("--tokens 64 --vocabulary 300 --hidden 16".split())
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["tokens", "vocabulary"] and len(rows) == 3
    assert len({row.split()[-1] for row in rows}) == 1


def test_only_ours_fits_whatever_the_size():
    fit = {name: benchmark_loss.fits(share, 10**9, 10**5) for name, (_, share) in benchmark_loss.CONTENDERS.items()}
    assert fit == {"logits of all tokens": False, "logits of trained tokens": False, "ours": True}
