"""Outages are distinguished from broken files and retried with growing pauses."""

import errno

import pytest

from internvl.data import outages
from internvl.data.outages import StoreUnavailableError, is_outage, retry_during_outage


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock; return the pauses."""
    pauses: list[float] = []
    monkeypatch.setattr(outages.time, "sleep", pauses.append)
    monkeypatch.setattr(outages.time, "monotonic", lambda: sum(pauses))
    return pauses


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StoreUnavailableError("no route"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), True),
        (FileNotFoundError(errno.ENOENT, "missing"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (OSError("broken data stream"), False),
        (ValueError("cut"), False),
    ],
)
def test_outages_are_distinguished_from_other_errors(error, expected):
    assert is_outage(error) == expected


def test_an_outage_is_retried_until_the_store_answers(clock, caplog):
    errors = [OSError(errno.ESTALE, "Stale file handle")] * 4

    def read() -> str:
        if errors:
            raise errors.pop()
        return "content"

    assert retry_during_outage(read, 600) == "content"
    assert clock == [0.5, 1, 2, 4]
    assert len(caplog.records) == 1 and "Stale file handle" in caplog.text


def test_a_longer_outage_ends_with_the_reason(clock, caplog):
    def read():
        raise StoreUnavailableError("Could not connect to the endpoint URL\nmore")

    with pytest.raises(
        StoreUnavailableError, match=r"no answer for \d+ s .*--store_retry_seconds.*: Could not connect to"
    ):
        retry_during_outage(read, 600)
    assert max(clock) == 30 and 570 <= sum(clock) <= 600
    assert 5 <= len(caplog.records) <= 11  # one a minute


def test_other_errors_are_not_retried(clock):
    def read():
        raise FileNotFoundError(errno.ENOENT, "missing")

    with pytest.raises(FileNotFoundError):
        retry_during_outage(read, 600)
    assert clock == []
