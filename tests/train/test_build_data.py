"""Datasets are opened and measured; truncated answers are reported."""

import json
import logging

import numpy as np
import pytest
from helpers.samples import make_turns
from helpers.training_runs import write_meta_file

from internvl.train import build_data as build_data_module
from internvl.train.build_data import build_data
from internvl.train.build_model import build_tokenizer


@pytest.fixture
def build(parse_flags, tmp_path, monkeypatch):
    """Return a function that builds the data of records."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))

    def build(records: list[dict], *flags: str):
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
        write_meta_file(tmp_path, tmp_path)
        model_args, data_args, training_args = parse_flags("--meta_path", str(tmp_path / "meta.json"), *flags)
        return build_data(data_args, training_args, build_tokenizer(model_args, data_args), 4)

    return build


SHORT, LONG = ({"conversations": make_turns("Hi", "word " * n)} for n in (1, 900))


@pytest.mark.parametrize(
    ("num_long", "flags"), [(1, "--max_seq_length 300"), (2, "--max_seq_length 900"), (0, "--max_seq_length 100")]
)
def test_truncated_answers_give_a_warning_above_one_percent(build, caplog, num_long, flags):
    caplog.set_level(logging.WARNING)
    data = build([*[SHORT] * 30, *[LONG] * num_long], *flags.split())
    assert np.count_nonzero(data.lost_loss_tokens) == num_long
    warnings = [message for message in caplog.messages if "Truncated answers" in message]
    assert len(warnings) == min(1, num_long)
    if warnings:
        counts = f"{num_long} of {30 + num_long} samples, {data.lost_loss_tokens.sum():,} of "
        assert warnings[0].startswith(f"Truncated answers: {counts}") and "raise --max_seq_length (now " in warnings[0]


def test_few_truncated_answers_give_no_warning(build, caplog):
    data = build([*[SHORT | {"id": n} for n in range(300)], LONG], "--max_seq_length", "1850")
    assert 0 < data.lost_loss_tokens.sum() < 0.01 * data.lengths["loss_tokens"].sum()
    assert not [message for message in caplog.messages if "Truncated answers" in message]


def test_more_samples_than_a_plan_can_number_are_refused(build, monkeypatch):
    monkeypatch.setattr(build_data_module, "MAX_TOTAL_SAMPLES", 2)
    with pytest.raises(ValueError, match="have 3 samples, more than the supported 2: lower their repeat_time"):
        build([SHORT] * 3)
