"""Held-out records: chosen by their content, the same whatever else changes, and never trained."""

import json
import random

import numpy as np
import pytest
from helpers.samples import make_turns
from helpers.training_runs import build_run_flags, prepare_trainer

from internvl.data.record_identity import hash_record
from internvl.planning.epoch_plan import plan_epoch
from internvl.planning.measured_data import find_held_out
from internvl.train.build_data import build_data, build_plan_layout
from internvl.train.build_model import build_tokenizer

SHARE = 0.2


def make_record(number: int) -> dict:
    return {"id": number, "conversations": make_turns(f"What is {number} + 1?", f"It is {number + 1}.")}


@pytest.fixture
def build(parse_flags, tmp_path):
    """Return a function that builds the data of files: name -> records, or (records, further meta keys)."""

    def build(files: dict, *flags: str, share: float = SHARE):
        meta = {}
        for name, content in files.items():
            records, entry = content if isinstance(content, tuple) else (content, {})
            lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
            meta[name] = {"root": str(tmp_path), "annotation": str(tmp_path / f"{name}.jsonl"), **entry}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        argv = ["--meta_path", str(tmp_path / "meta.json"), "--eval_share", str(share), *flags]
        model_args, data_args, training_args = parse_flags(*argv)
        return build_data(data_args, training_args, build_tokenizer(model_args, data_args), 4), data_args, training_args

    return build


def list_questions(datasets) -> set[str]:
    """Return the first turns of all records of datasets."""
    records = (dataset.read_record(index) for dataset in datasets for index in range(len(dataset)))
    return {record["conversations"][0]["value"] for record in records}


def get_sides(data) -> tuple[set[str], set[str]]:
    """Return the questions of the training data, and of the held-out records."""
    return list_questions(data.dataset.datasets), list_questions(part.dataset for part in data.held_out)


def test_a_share_of_the_records_is_held_out_and_not_trained(build):
    data, data_args, training_args = build({"numbers": [make_record(n) for n in range(1000)]})
    trained, held_out = get_sides(data)
    assert len(trained) + len(held_out) == 1000 and not trained & held_out
    assert len(held_out) == pytest.approx(1000 * SHARE, abs=40)  # three standard deviations
    assert len(data.lengths) == len(data.digests) == len(trained) and data.is_usable.all()
    plan = plan_epoch(data.lengths, build_plan_layout(data_args, training_args, 2, None), 0)
    located = [data.dataset.locate(sample) for sample in plan.samples.tolist()]
    assert {dataset.read_record(index)["conversations"][0]["value"] for dataset, index in located} == trained


@pytest.mark.parametrize(
    ("meta", "flags"),
    [
        ({"repeat_time": 3}, []),
        ({"repeat_time": 2.5}, []),
        ({"repeat_time": 0.5}, []),
        ({"data_augment": True}, []),
        ({}, ["--use_data_resampling", "True"]),
        ({}, ["--seed", "7"]),
        ({}, ["--use_packed_ds", "True", "--allow_overflow", "True", "--max_packed_tokens", "24"]),
    ],
)
def test_no_record_changes_sides_with_the_settings(build, meta, flags):
    records = [make_record(n) for n in range(200)]
    trained, held_out = get_sides(build({"numbers": records})[0])
    data, data_args, training_args = build({"numbers": (records, meta)}, *flags)
    trained_now, held_out_now = get_sides(data)
    assert trained_now <= trained and held_out_now <= held_out
    if meta.get("repeat_time", 1) >= 1:
        assert (trained_now, held_out_now) == (trained, held_out)
    assert [len(part.dataset) for part in data.held_out] == [len(held_out_now)], "each record once"
    if "--allow_overflow" in flags:
        assert data.dataset.pieces
        sources = data.dataset.get_source_samples()[data.is_usable].tolist()
        located = [data.dataset.locate(sample) for sample in sources]
        assert {dataset.read_record(index)["conversations"][0]["value"] for dataset, index in located} <= trained


def test_no_record_changes_sides_when_data_is_added_or_reordered(build):
    records = [make_record(n) for n in range(200)]
    trained, held_out = get_sides(build({"numbers": records})[0])
    more = records + [make_record(n) for n in range(1000, 2000)]
    random.Random(0).shuffle(more)
    files = {"first": [make_record(n) for n in range(5000, 5050)], "renamed": more[:600], "rest": more[600:]}
    for order in (list(files), list(files)[::-1]):
        trained_now, held_out_now = get_sides(build({name: files[name] for name in order})[0])
        assert trained <= trained_now and held_out <= held_out_now


def test_a_larger_share_holds_out_more_of_the_same(build):
    records = [make_record(n) for n in range(200)]
    sides = [get_sides(build({"numbers": records}, share=share)[0])[1] for share in (0.05, 0.2, 0.7)]
    assert sides[0] < sides[1] < sides[2]


def test_all_copies_of_a_record_are_on_one_side(build):
    """Ids, the order of keys, spaces, keys without effect and other files do not matter."""
    records = [make_record(n) for n in range(100)]
    copies = [json.dumps({"source": "b", **record, "id": -1}, indent=None, separators=(",", ":")) for record in records]
    reordered = [{key: record[key] for key in reversed(record)} for record in records]
    swapped = [record | {"conversations": [{k: t[k] for k in ("value", "from")} for t in record["conversations"]]} for
               record in records]  # fmt: skip
    data, *_ = build({"one": records + reordered, "other": copies + swapped})
    trained, held_out = get_sides(data)
    assert not trained & held_out and len(trained) + len(held_out) == 100 and len(held_out) > 5


def test_the_paths_of_images_count_but_not_their_root(make_dataset, tmp_path):
    turns = make_turns("<image>\nWhat?", "A.")
    records = [{"image": name, "conversations": turns} for name in ("a.png", "b.jpg", ["a.png"])]
    records += [{"images": ["a.png"], "conversations": turns}, {"image": "a.png", "id": 5, "conversations": turns}]
    dataset, elsewhere = make_dataset(*records), make_dataset(*records, meta={"root": "/elsewhere"})
    hashes = [hash_record(dataset, index) for index in range(5)]
    assert hashes == [hash_record(elsewhere, index) for index in range(5)]
    assert hashes[0] == hashes[2] == hashes[3] == hashes[4] != hashes[1]


def test_hashes_are_uniform(make_dataset):
    """Each tenth of their range has a tenth of them, also for records that differ in few bits."""
    dataset = make_dataset(*[{"conversations": make_turns("x", f"{n:05}")} for n in range(3000)])
    hashes = np.array([hash_record(dataset, index) for index in range(3000)])
    bounds = np.linspace(0, 1, 11)[1:-1]
    counts = np.diff([0, *(np.count_nonzero(find_held_out(hashes, bound)) for bound in bounds), 3000])
    assert (abs(counts - 300) < 60).all()


def test_malformed_records_are_on_one_side_too(build):
    records = [make_record(n) for n in range(50)]
    lines = ['{"conversations": [', '{"conversations": 3}', "[1]"] * 8
    data, *_ = build({"numbers": records + lines}, "--max_bad_samples", "24")
    num_unusable = [len(data.skipped_samples), *(len(part.measurements.unusable) for part in data.held_out)]
    assert num_unusable[0] > 0 and num_unusable[0] % 8 == 0


def test_share_that_holds_out_nothing_or_everything(build, caplog):
    records = [make_record(n) for n in range(20)]
    with pytest.raises(ValueError, match=r"--eval_share 1e-06 holds out none of the 20 training samples: raise it"):
        build({"numbers": records}, share=0.000001)
    with pytest.raises(ValueError, match=r"--eval_share 0.999999 holds out all of the 20 training samples: lower it"):
        build({"numbers": records}, share=0.999999)
    data, *_ = build({"numbers": records, "one": [make_record(1)]})
    assert "dataset one (--eval_share 0.2)" in caplog.messages[-1] and "of the 1 samples" in caplog.messages[-1]
    assert len(data.dataset.datasets) + len(data.held_out) == 3


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_invalid_share(parse_flags, share):
    with pytest.raises(ValueError, match=r"--eval_share \S+ is invalid: expected a number in \[0, 1\)"):
        parse_flags("--eval_share", share)


def test_without_the_flag_nothing_is_held_out(build):
    data, *_ = build({"numbers": [make_record(n) for n in range(20)]}, share=0)
    assert len(data.lengths) == 20 and not data.held_out


def test_a_resumed_run_keeps_its_held_out_records(parse_flags, tiny_inputs, tmp_path, caplog):
    """Another share is changed data."""
    flags = [*build_run_flags(tiny_inputs, tmp_path / "run"), "--eval_strategy", "epoch", "--save_steps", "2"]
    caplog.set_level("INFO", "internvl")
    trainer = prepare_trainer([*flags, "--eval_share", "0.3", "--max_steps", "2"])
    assert "Evaluation plan:\n  evaluation sets     tiny\n" in caplog.text
    held_out = get_sides_of(trainer)[1]
    trainer.train()

    resumed = prepare_trainer([*flags, "--eval_share", "0.3", "--max_steps", "3"])
    assert get_sides_of(resumed)[1] == held_out
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    changed = prepare_trainer([*flags, "--eval_share", "0.6", "--max_steps", "4"])
    assert get_sides_of(changed)[1] > held_out
    with pytest.raises(ValueError, match="The data has changed since the checkpoint was written: 0 of .* are removed"):
        changed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def get_sides_of(trainer) -> tuple[set[str], set[str]]:
    """Return the questions of a trainer's training data, and of its evaluation set."""
    return list_questions(trainer.train_dataset.datasets), list_questions(trainer.evaluation.data.dataset.datasets)
