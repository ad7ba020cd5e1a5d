"""Paired turns of the benchmarks: intervals, the order of turns, failing contenders."""

from math import comb

import numpy as np
import pytest

from internvl.tools.benchmark.turns import compare_turns, compute_median_interval, format_interval, measure_in_turns

CONTENDER_MODULE = """
import os
from pathlib import Path

def start(name, log, fails=False, error=None):
    print("printed by a library")

    def run_turn(number):
        if fails and number == 1:
            raise RuntimeError("cannot go on")
        with open(log, "a") as file:
            file.write(f"{name}{number} ")
        return {"number": number, "pid": os.getpid()}

    return {"error": error} if error else {"folder": str(Path.cwd())}, run_turn
"""


@pytest.mark.parametrize(
    ("num_values", "low", "high"),
    [(1, 0, 0), (2, 0, 1), (5, 0, 4), (6, 0, 5), (8, 0, 7), (9, 1, 7), (12, 2, 9), (15, 3, 11), (20, 5, 14)],
)
def test_interval_of_the_median(num_values, low, high):
    """The ranks are those of published tables for the sign test at 5 %."""
    values = np.random.default_rng(0).permutation(num_values).tolist()
    assert compute_median_interval(values) == ((num_values - 1) / 2, low, high)
    if num_values >= 6:
        miss = [2 * sum(comb(num_values, i) for i in range(low + extra)) / 2**num_values for extra in (1, 2)]
        assert miss[0] <= 0.05 < miss[1], "the narrowest interval that covers 95 %"


def test_interval_covers_the_median_of_a_skewed_distribution():
    rng = np.random.default_rng(0)
    intervals = [compute_median_interval(rng.exponential(size=9)) for _ in range(4000)]
    covered = np.mean([low <= np.log(2) <= high for _, low, high in intervals])
    assert covered == pytest.approx(1 - 20 / 512, abs=0.01)


def test_ratios_are_paired_by_turn():
    """A machine that is four times slower in some turns does not change the ratio of two contenders."""
    load = np.array([1, 4, 1, 4, 1, 1, 4, 1, 1.0])
    assert compare_turns(3 * load, 2 * load) == (1.5, 1.5, 1.5)
    ratios = np.arange(1, 10)
    assert compare_turns(ratios * load, load) == (5, 2, 8)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare_turns([1, 2], [1])


def test_format_of_an_interval():
    assert format_interval(compute_median_interval([1000, 2000, 3000]), ",.0f") == "2,000 [1,000, 3,000]"
    assert format_interval(compare_turns([3, 3], [2, 2]), ".2f", "x") == "1.50x [1.50, 1.50]"


@pytest.fixture
def measure(tmp_path):
    """Return a function that measures contenders of CONTENDER_MODULE, and the file that they log their turns in."""
    (tmp_path / "contender.py").write_text(CONTENDER_MODULE)
    log = tmp_path / "log"

    def measure(contenders: dict[str, dict], together: bool = True):
        tasks = {name: options | {"name": name, "log": str(log)} for name, options in contenders.items()}
        turns = [{"number": number} for number in range(3)]
        return measure_in_turns("contender:start", tasks, turns, together, dict.fromkeys(tasks, str(tmp_path)))

    return measure, log


@pytest.mark.multiprocess
@pytest.mark.parametrize(("together", "order"), [(True, "a0 b0 b1 a1 a2 b2 "), (False, "a0 a1 a2 b0 b1 b2 ")])
def test_order_of_turns(measure, together, order, tmp_path):
    measure_fn, log = measure
    measured = measure_fn({"a": {}, "b": {}}, together)
    assert log.read_text() == order
    for measurement in measured.values():
        assert measurement.facts == {"folder": str(tmp_path)} and measurement.list_values("number") == [0, 1, 2]
    assert len({turn["pid"] for measurement in measured.values() for turn in measurement.turns}) == 2


@pytest.mark.multiprocess
def test_contender_with_an_error_takes_no_turn(measure):
    measure_fn, log = measure
    measured = measure_fn({"a": {"error": "out of memory"}, "b": {}})
    assert measured["a"] == ({"error": "out of memory"}, []) and log.read_text() == "b0 b1 b2 "


@pytest.mark.multiprocess
def test_failing_contender_ends_the_measurement(measure, capfd):
    measure_fn, _ = measure
    with pytest.raises(ValueError, match="a contender failed with exit status 1, see above: {'number': 1}"):
        measure_fn({"a": {"fails": True}, "b": {}})
    assert "RuntimeError: cannot go on" in capfd.readouterr().err
