"""Measured before training = produced in training, for every sample; and the files that keep it."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from helpers.samples import BAD, recorded_configs, recorded_dataset, turns
from PIL import Image

from internvl.constants import UnusableSample
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.planning import sample_lengths
from internvl.planning.sample_lengths import lengths_cache_key, measure_dataset

DECODING_ONLY = ("truncated PNG", "truncated JPEG")  # their headers are whole


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one: sample_lengths.MeasuredDataset, other: sample_lengths.MeasuredDataset) -> bool:
    arrays = zip((*one.lengths, one.digests), (*other.lengths, other.digests), strict=True)
    return all(np.array_equal(a, b) for a, b in arrays) and one.bad == other.bad


def assert_true(dataset):
    """Each measured number is that of the sample itself, each reason the one that `get` gives."""
    measured, _, bad = measure_dataset(dataset, progress=False)
    reasons = dict(bad)
    assert len(measured.tokens) == len(measured.trained) == len(measured.tiles) == len(dataset)
    for index in range(len(dataset)):
        found = measured.tokens[index], measured.trained[index], measured.tiles[index]
        try:
            sample = dataset.get(index, epoch=index % 3)
        except UnusableSample as reason:
            assert reasons[index] == str(reason) and found == (0, 0, 0)
        else:
            trained = int((sample["labels"] != -100).sum())
            assert found == (len(sample["input_ids"]), trained, len(sample["pixel_values"])) and index not in reasons


def test_lengths_of_recorded_data_sets(goldens):
    for config in recorded_configs(goldens).values():
        assert_true(recorded_dataset(goldens, config))


def test_lengths_of_videos_and_cut_samples(make):
    film = {"video": "film", "conversations": turns("What?", "A. " * 30)}
    pictures = {"image": ["a.png", "b.jpg"], "conversations": turns("Which?", "B.")}
    for limit in (40, 60, 80, 120, 400):
        assert_true(make(film, pictures, film, max_length=limit, min_num_frame=1, max_num_frame=9))


def test_bad_samples_are_found_before_training_with_their_reason(make):
    good = {"image": "a.png", "conversations": turns("What?", "A.")}
    names = [name for name in BAD if name not in DECODING_ONLY]
    dataset = make(good, *(BAD[name][0] for name in names), good)
    # The record that is broken JSON names its line.
    (tokens, _, _), _, bad = measure_dataset(dataset, progress=False)
    assert [index for index, _ in bad] == list(range(1, len(names) + 1))
    assert all(tokens[[0, -1]]) and not tokens[1:-1].any()
    for index, reason in bad:
        with pytest.raises(UnusableSample) as caught:
            dataset.get(index, 0)
        assert str(caught.value) == reason


def test_repeats_are_measured_once_and_counted_as_often_as_they_come(make, monkeypatch):
    good = {"image": "a.png", "conversations": turns("What?", "A.")}
    bad = {"image": "absent.png", "conversations": turns("What?", "A.")}
    dataset = make(good, bad, good, meta={"repeat_time": 2.4})
    seen = []
    monkeypatch.setattr(type(dataset), "measure", lambda self, index: seen.append(index) or (5, 2, 1))
    measured = measure_dataset(dataset, progress=False)
    assert seen == [0, 1, 2] and measured.lengths.tokens.tolist() == [5] * 7
    monkeypatch.undo()


def test_bad_repeats_are_all_listed(make):
    good = {"image": "a.png", "conversations": turns("What?", "A.")}
    bad = {"image": "absent.png", "conversations": turns("What?", "A.")}
    dataset = make(good, bad, good, meta={"repeat_time": 2.4})
    expected = [index for index, record in enumerate(dataset.order) if record == 1]
    assert [index for index, _ in measure_dataset(dataset, progress=False).bad] == expected and len(expected) >= 2
    assert_true(dataset)


@pytest.mark.parametrize("repeat_time", [0.3, 0.8, 1.8])
def test_a_random_part_is_measured_as_what_it_is(make, repeat_time):
    good = [{"image": "a.png", "conversations": turns("What? " * (1 + n), "A.")} for n in range(9)]
    bad = {"image": "absent.png", "conversations": turns("What?", "A.")}
    datasets = [make(*good, bad, meta={"repeat_time": repeat_time}, seed=seed) for seed in range(4)]
    for dataset in datasets:
        assert_true(dataset)
        assert_true(dataset)  # from the disk
    names = {lengths_cache_key(dataset) for dataset in datasets}
    assert len(names) == (1 if repeat_time > 1 else 4), "another part is another measurement, a repeat is none"


def test_only_the_part_is_measured(make, monkeypatch):
    dataset = make(*[{"conversations": turns("What?", "A.")}] * 10, meta={"repeat_time": 0.3})
    seen = []
    monkeypatch.setattr(type(dataset), "measure", lambda self, index: seen.append(self.order[index]) or (5, 2, 1))
    assert (
        measure_dataset(dataset, progress=False).lengths.tokens.tolist() == [5] * 3 and seen == dataset.order.tolist()
    )


def test_processes_measure_the_same(make, monkeypatch):
    good = {"image": "a.png", "conversations": turns("What?", "A.")}
    records = [good | {"conversations": turns("What? " * (n % 7), "A. " * (1 + n % 5))} for n in range(30)]
    records[11] = {"image": "absent.png", "conversations": turns("What?", "A.")}
    dataset = make(*records)
    alone = measure_dataset(dataset, progress=False, cache_dir=dataset.root + "/one")
    monkeypatch.setattr(sample_lengths, "WORTH_A_PROCESS", 10)
    monkeypatch.setattr(sample_lengths, "CHUNK", 4)
    assert same(alone, measure_dataset(dataset, processes=2, progress=False, cache_dir=dataset.root + "/two"))
    assert [index for index, _ in alone.bad] == [11]


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(make, monkeypatch):
    """A data set of 6 records, the third bad, and the list of records that were looked at."""
    good = {"image": "a.png", "conversations": turns("What?", "A.")}
    bad = {"image": "late.png", "conversations": turns("What?", "A.")}
    dataset = make(good, good, bad, good, good, good)
    looked_at = []
    plain = sample_lengths._measure_one
    monkeypatch.setattr(sample_lengths, "_measure_one", lambda d, record: looked_at.append(record) or plain(d, record))
    return dataset, looked_at


def test_kept_results_are_used_and_only_bad_samples_looked_at_again(counted):
    dataset, looked_at = counted
    first = measure_dataset(dataset, progress=False)
    assert looked_at == list(range(6)) and [index for index, _ in first.bad] == [2]
    looked_at.clear()
    assert same(first, measure_dataset(dataset, progress=False)) and looked_at == [2]
    shutil.copy(os.path.join(dataset.root, "a.png"), os.path.join(dataset.root, "late.png"))
    mended = measure_dataset(dataset, progress=False)
    assert mended.bad == [] and mended.lengths.tokens[2] == mended.lengths.tokens[0]
    looked_at.clear()
    assert same(mended, measure_dataset(dataset, progress=False)) and looked_at == []


def test_samples_whose_pictures_changed_are_measured_again(make):
    """Under the same name, in an annotation that is the same."""
    two = {"image": ["a.png", "b.jpg"], "conversations": turns("<image><image>What?", "A.")}
    text = {"conversations": turns("What?", "A.")}
    dataset = make({"image": "b.jpg", "conversations": turns("What?", "A.")}, two, text, max_dynamic_patch=8)
    before = measure_dataset(dataset, progress=False)
    Image.new("RGB", (200, 100)).save(os.path.join(dataset.root, "a.png"))
    after = measure_dataset(dataset, progress=False)
    assert after.lengths.tiles.tolist() == [dataset.measure(index)[2] for index in range(3)]
    assert (after.lengths.tiles != before.lengths.tiles).tolist() == [False, True, False]
    assert (after.digests == before.digests).all(), "its record is what it was"


@pytest.mark.parametrize("damage", ["absent", "empty", "half", "text", "of another data set"])
def test_damaged_files_are_made_anew(counted, cache, damage):
    dataset, looked_at = counted
    first = measure_dataset(dataset, progress=False)
    looked_at.clear()
    (file,) = cache.glob("lengths-*")
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    elif damage == "of another data set":
        np.save(file, np.ones((4, 5), np.int32))
    else:
        new = {"empty": b"", "half": content[: len(content) // 2], "text": b"hm"}
        file.write_bytes(new[damage])
    assert same(first, measure_dataset(dataset, progress=False)) and looked_at == list(range(6))


def test_an_interrupted_measurement_goes_on(counted, cache, monkeypatch):
    dataset, looked_at = counted
    whole = measure_dataset(dataset, progress=False, cache_dir=str(cache / "whole"))
    looked_at.clear()
    counting = sample_lengths._measure_one

    def stop(dataset, record):
        if record == 4:
            raise KeyboardInterrupt
        return counting(dataset, record)

    monkeypatch.setattr(sample_lengths, "ROUND", 2)
    with monkeypatch.context() as patch:
        patch.setattr(sample_lengths, "_measure_one", stop)
        with pytest.raises(KeyboardInterrupt):
            measure_dataset(dataset, progress=False)
    assert looked_at == [0, 1, 2, 3] and len(list(cache.glob("lengths-*.part.npy"))) == 1
    looked_at.clear()
    assert same(whole, measure_dataset(dataset, progress=False)) and looked_at == [2, 4, 5], "2 is bad: looked at again"
    assert not list(cache.glob("*.part.npy"))


def test_ranks_measure_together(counted, cache):
    """Each its share; all know all; rank 0 keeps it."""
    dataset, looked_at = counted
    alone = measure_dataset(dataset, progress=False, cache_dir=str(cache / "alone"))
    ranks, meeting, values = 3, threading.Barrier(3), [None] * 3

    def gathered(rank: int, value):
        values[rank] = value
        meeting.wait()
        found = list(values)
        meeting.wait()
        return found

    def on(rank: int):
        together = sample_lengths.RankGroup(rank, ranks, partial(gathered, rank))
        return measure_dataset(dataset, progress=False, cache_dir=str(cache / str(rank)), ranks=together)

    looked_at.clear()
    with ThreadPoolExecutor(ranks) as pool:
        assert all(same(alone, found) for found in pool.map(on, range(ranks)))
    assert sorted(looked_at) == list(range(6)) and (cache / "0").exists() and not (cache / "1").exists()


def test_everything_that_decides_lengths_names_the_file(make, goldens):
    record = {"image": "a.png", "conversations": turns("What?", "A.")}
    base = make(record)
    names = {lengths_cache_key(base)}
    variants = [
        {"max_length": 399},
        {"use_thumbnail": False},
        {"dynamic_image_size": False},
        {"max_dynamic_patch": 3},
        {"min_dynamic_patch": 2},
        {"force_image_size": 56},
        {"conv_style": "Hermes-2"},
        {"max_num_frame": 9},
        {"meta": {"max_dynamic_patch": 4}},
        {"meta": {"root": "/"}},
    ]
    for variant in variants:
        names.add(lengths_cache_key(make(record, **variant)))
    assert len(names) == 1 + len(variants)
    time.sleep(0.01)
    assert lengths_cache_key(make(record, pad2square=True, seed=5)) not in names, "the annotation was written anew"
    path = base.records.path
    stamp = os.stat(path).st_mtime_ns
    again = make(record, pad2square=True, normalize_type="clip", seed=5)
    os.utime(path, ns=(stamp, stamp))
    os.utime(base.records.path, ns=(stamp, stamp))
    assert lengths_cache_key(again) == lengths_cache_key(base), "what does not matter for lengths does not count"


def test_the_tokenizer_names_the_file_but_not_how_it_was_called(make, goldens):
    dataset = make({"conversations": turns("What?", "A.")})
    name = lengths_cache_key(dataset)
    dataset.tokenizer("What?", padding="max_length", truncation=True)
    assert lengths_cache_key(dataset) == name
    dataset.tokenizer = load_tokenizer(goldens / "tokenizer")
    dataset.tokenizer.model_max_length = 400
    assert lengths_cache_key(dataset) == name
    dataset.tokenizer.add_tokens(["What?"])
    assert lengths_cache_key(dataset) != name


def test_a_folder_that_cannot_be_written_is_one_sentence(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/cache.*cannot be written.*INTERNVL_CACHE"):
        measure_dataset(
            make({"conversations": turns("What?", "A.")}), cache_dir=str(tmp_path / "file" / "cache"), progress=False
        )
