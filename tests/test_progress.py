"""Progress outside a terminal: a line every half minute, never a bar."""

import logging

import pytest

from internvl import progress
from internvl.progress import Progress


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "internvl")
    return caplog


def test_a_line_every_interval_and_no_bar(log, monkeypatch, capsys):
    now = iter(range(0, 1000, 12))  # 12 s between two calls
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with Progress(10, "Measuring mine") as shown:
        for _ in range(10):
            shown.update()
    assert [record.getMessage() for record in log.records] == [
        "Measuring mine: 3 of 10 samples (30%)",
        "Measuring mine: 6 of 10 samples (60%)",
        "Measuring mine: 9 of 10 samples (90%)",
    ]
    assert capsys.readouterr().err == ""


def test_silent_ranks_show_nothing(log, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    with Progress(2, "Measuring mine", is_shown=False) as shown:
        shown.update(2)
    assert not log.records and capsys.readouterr().err == ""
