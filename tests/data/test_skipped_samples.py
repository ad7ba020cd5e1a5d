"""Skipped samples are reported once; too many end the run."""

import json

import pytest

from internvl.data.skipped_samples import NUM_LISTED, SkippedSampleReport, make_too_many_skipped_error


def describe(line: int) -> str:
    return f"data.jsonl line {line}: a.png does not exist"


def test_each_sample_is_logged_once(caplog):
    report = SkippedSampleReport([describe(1)], max_skipped=3)
    report.add([describe(1), describe(2), describe(2)])
    report.add([describe(2), describe(3)])
    report.add([])
    assert caplog.messages == [f"Skipped sample: {describe(2)}", f"Skipped sample: {describe(3)}"]
    assert report.skipped == [describe(1), describe(2), describe(3)]


def test_more_samples_than_allowed_end_the_run(caplog):
    report = SkippedSampleReport([describe(1)], max_skipped=2)
    report.add([describe(2)])
    message = f"3 samples are unusable, --max_bad_samples allows 2; fix or remove them:\n  {describe(1)}\n"
    with pytest.raises(ValueError) as caught:
        report.add([describe(3)])
    assert str(caught.value).startswith(message)
    assert caplog.messages[-1] == f"Skipped sample: {describe(3)}", "it is logged before the run ends"


def test_known_samples_alone_do_not_end_the_run():
    """They were found, and their number was checked, before training."""
    report = SkippedSampleReport([describe(1), describe(2)], max_skipped=1)
    report.add([describe(1), describe(2)])


@pytest.mark.parametrize("num_more", [0, 1, 5])
def test_error_lists_the_first_samples(num_more):
    skipped = [describe(line) for line in range(NUM_LISTED + num_more)]
    first_line, *listed = str(make_too_many_skipped_error(skipped, 7)).splitlines()
    assert first_line == f"{len(skipped)} samples are unusable, --max_bad_samples allows 7; fix or remove them:"
    assert listed[:NUM_LISTED] == [f"  {sample}" for sample in skipped[:NUM_LISTED]]
    assert listed[NUM_LISTED:] == ([f"  ... and {num_more} more"] if num_more else [])


def test_file_has_each_sample_also_after_resuming(tmp_path):
    file = tmp_path / "skipped_samples.jsonl"
    for is_resumed, new in ((False, 2), (True, 3)):
        report = SkippedSampleReport([describe(1)], max_skipped=3)
        report.open_file(file, is_resumed)
        report.add([describe(1), describe(new)])
    lines = [json.loads(line)["sample"] for line in file.read_text().splitlines()]
    assert lines == [describe(1), describe(2), describe(1), describe(3)]
    SkippedSampleReport([], max_skipped=3).open_file(file, is_resumed=False)
    assert not file.exists(), "of an earlier run"
