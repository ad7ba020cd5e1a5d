"""Measured lengths equal those in training; caching, resuming, several ranks."""

import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from helpers.samples import UNUSABLE_RECORDS, build_recorded_dataset, make_turns, read_recorded_configs
from PIL import Image

from internvl.constants import UnusableSample
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.planning import sample_lengths
from internvl.planning.epoch_plan import SAMPLE_LENGTHS
from internvl.planning.sample_lengths import MeasuredDataset, RankGroup, make_lengths_cache_key, measure_dataset

DECODING_ONLY = ("truncated PNG", "truncated JPEG")  # their headers are valid


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def are_equal(one: MeasuredDataset, other: MeasuredDataset) -> bool:
    names = ("lengths", "digests", "lost_loss_tokens", "content_hashes")
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
    return arrays and one.unusable == other.unusable


def assert_equal_to_samples(dataset):
    """Compare measurements with samples, reasons with the errors of `get`."""
    lengths, _, unusable, *_ = measure_dataset(dataset, show_progress=False)
    reasons = dict(unusable)
    assert len(lengths) == len(dataset) and lengths.dtype == SAMPLE_LENGTHS
    for index in range(len(dataset)):
        measured = lengths[index].item()
        try:
            sample = dataset.get(index, epoch=index % 3)
        except UnusableSample as error:
            assert reasons[index] == str(error) and measured == (0, 0, 0)
        else:
            num_loss_tokens = int((sample["labels"] != -100).sum())
            assert measured == (len(sample["input_ids"]), num_loss_tokens, len(sample["pixel_values"]))
            assert index not in reasons


def test_lengths_of_recorded_datasets(goldens):
    for config in read_recorded_configs(goldens).values():
        assert_equal_to_samples(build_recorded_dataset(goldens, config))


def test_lengths_of_videos_and_truncated_samples(make_dataset):
    video = {"video": "frames", "conversations": make_turns("What?", "A. " * 30)}
    images = {"image": ["a.png", "b.jpg"], "conversations": make_turns("Which?", "B.")}
    for limit in (40, 60, 80, 120, 400):
        assert_equal_to_samples(make_dataset(video, images, video, max_length=limit, min_num_frame=1, max_num_frame=9))


def test_unusable_samples_are_found_with_the_reason_that_get_gives(make_dataset):
    good = {"image": "a.png", "conversations": make_turns("What?", "A.")}
    names = [name for name in UNUSABLE_RECORDS if name not in DECODING_ONLY]
    dataset = make_dataset(good, *(UNUSABLE_RECORDS[name][0] for name in names), good)
    lengths, _, unusable, *_ = measure_dataset(dataset, show_progress=False)
    tokens = lengths["tokens"]
    assert [index for index, _ in unusable] == list(range(1, len(names) + 1))
    assert all(tokens[[0, -1]]) and not tokens[1:-1].any()
    for index, reason in unusable:
        with pytest.raises(UnusableSample) as caught:
            dataset.get(index, 0)
        assert str(caught.value) == reason


def test_repeated_records_are_measured_once(make_dataset, monkeypatch):
    good = {"image": "a.png", "conversations": make_turns("What?", "A.")}
    bad = {"image": "absent.png", "conversations": make_turns("What?", "A.")}
    dataset = make_dataset(good, bad, good, meta={"repeat_time": 2.4})
    seen = []
    monkeypatch.setattr(type(dataset), "measure", lambda self, index: seen.append(index) or (5, 2, 1, 0))
    lengths = measure_dataset(dataset, show_progress=False).lengths
    assert seen == [0, 1, 2] and lengths["tokens"].tolist() == [5] * 7
    monkeypatch.undo()


def test_unusable_repeats_are_all_listed(make_dataset):
    good = {"image": "a.png", "conversations": make_turns("What?", "A.")}
    bad = {"image": "absent.png", "conversations": make_turns("What?", "A.")}
    dataset = make_dataset(good, bad, good, meta={"repeat_time": 2.4})
    expected = [index for index, record in enumerate(dataset.record_indices) if record == 1]
    assert [index for index, _ in measure_dataset(dataset, show_progress=False).unusable] == expected and len(
        expected
    ) >= 2
    assert_equal_to_samples(dataset)


@pytest.mark.parametrize("repeat_time", [0.3, 0.8, 1.8])
def test_lengths_of_a_random_part(make_dataset, repeat_time):
    good = [{"image": "a.png", "conversations": make_turns("What? " * (1 + n), "A.")} for n in range(9)]
    bad = {"image": "absent.png", "conversations": make_turns("What?", "A.")}
    datasets = [make_dataset(*good, bad, meta={"repeat_time": repeat_time}, seed=seed) for seed in range(4)]
    for dataset in datasets:
        assert_equal_to_samples(dataset)
        assert_equal_to_samples(dataset)  # from the cache
    names = {make_lengths_cache_key(dataset) for dataset in datasets}
    assert len(names) == (1 if repeat_time > 1 else 4), "parts have caches of their own, repeats do not"


def test_only_the_random_part_is_measured(make_dataset, monkeypatch):
    dataset = make_dataset(*[{"conversations": make_turns("What?", "A.")}] * 10, meta={"repeat_time": 0.3})
    seen = []
    monkeypatch.setattr(
        type(dataset), "measure", lambda self, index: seen.append(self.record_indices[index]) or (5, 2, 1, 0)
    )
    lengths = measure_dataset(dataset, show_progress=False).lengths
    assert lengths["tokens"].tolist() == [5] * 3 and seen == dataset.record_indices.tolist()


@pytest.mark.multiprocess
def test_worker_processes_measure_the_same(make_dataset, monkeypatch):
    good = {"image": "a.png", "conversations": make_turns("What?", "A.")}
    records = [good | {"conversations": make_turns("What? " * (n % 7), "A. " * (1 + n % 5))} for n in range(30)]
    records[11] = {"image": "absent.png", "conversations": make_turns("What?", "A.")}
    dataset = make_dataset(*records)
    alone = measure_dataset(dataset, show_progress=False, cache_dir=dataset.root + "/one")
    monkeypatch.setattr(sample_lengths, "MIN_SAMPLES_PER_PROCESS", 10)
    monkeypatch.setattr(sample_lengths, "SAMPLES_PER_TASK", 4)
    assert are_equal(
        alone, measure_dataset(dataset, num_processes=2, show_progress=False, cache_dir=dataset.root + "/two")
    )
    assert [index for index, _ in alone.unusable] == [11]


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting_dataset(make_dataset, monkeypatch):
    """Makes a dataset of 6 records, the third unusable.

    Second value: the list of indices that have been measured.
    """
    good = {"image": "a.png", "conversations": make_turns("What?", "A.")}
    bad = {"image": "late.png", "conversations": make_turns("What?", "A.")}
    dataset = make_dataset(good, good, bad, good, good, good)
    measured = []
    measure_sample = sample_lengths._measure_sample
    monkeypatch.setattr(sample_lengths, "_measure_sample", lambda d, i: measured.append(i) or measure_sample(d, i))
    return dataset, measured


def test_cached_results_are_used_and_only_unusable_samples_measured_again(counting_dataset):
    dataset, measured = counting_dataset
    first = measure_dataset(dataset, show_progress=False)
    assert measured == list(range(6)) and [index for index, _ in first.unusable] == [2]
    measured.clear()
    assert are_equal(first, measure_dataset(dataset, show_progress=False)) and measured == [2]
    shutil.copy(os.path.join(dataset.root, "a.png"), os.path.join(dataset.root, "late.png"))
    repaired = measure_dataset(dataset, show_progress=False)
    assert repaired.unusable == [] and repaired.lengths[2] == repaired.lengths[0]
    measured.clear()
    assert are_equal(repaired, measure_dataset(dataset, show_progress=False)) and measured == []


def test_samples_whose_images_changed_are_measured_again(make_dataset):
    """The path and the annotation stay the same."""
    two = {"image": ["a.png", "b.jpg"], "conversations": make_turns("<image><image>What?", "A.")}
    text = {"conversations": make_turns("What?", "A.")}
    dataset = make_dataset(
        {"image": "b.jpg", "conversations": make_turns("What?", "A.")}, two, text, max_dynamic_patch=8
    )
    before = measure_dataset(dataset, show_progress=False)
    Image.new("RGB", (200, 100)).save(os.path.join(dataset.root, "a.png"))
    after = measure_dataset(dataset, show_progress=False)
    tiles_before, tiles_after = before.lengths["tiles"], after.lengths["tiles"]
    assert tiles_after.tolist() == [dataset.measure(index)[2] for index in range(3)]
    assert (tiles_after != tiles_before).tolist() == [False, True, False]
    assert (after.digests == before.digests).all(), "the record is unchanged"


def flip_bits(content: bytes, seed: int) -> bytes:
    generator = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(generator.choice([1, 1, 3, 40])):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0" * 16,
    "text": lambda content: b"hm",
    "zeros": lambda content: bytes(len(content)),
}
DAMAGES |= {f"bits {seed}": partial(flip_bits, seed=seed) for seed in range(40)}


def test_damaged_cache_files_are_replaced(counting_dataset, cache, caplog):
    dataset, measured = counting_dataset
    first = measure_dataset(dataset, show_progress=False)
    (file,) = cache.glob("lengths-*")
    content = file.read_bytes()
    for name, damage in DAMAGES.items():
        if (damaged := damage(content)) == content:
            continue
        file.write_bytes(damaged)
        measured.clear()
        caplog.clear()
        assert are_equal(first, measure_dataset(dataset, show_progress=False)), name
        assert measured == list(range(6)) and file.read_bytes() == content, name
        assert f"Damaged cache file: {file} (checksum mismatch)" in caplog.text
    assert list(cache.iterdir()) == [file]


def test_cache_file_of_another_dataset_is_not_used(make_dataset, cache):
    """Though it is complete, and has as many rows."""
    short = make_dataset({"conversations": make_turns("What?", "A.")})
    measure_dataset(short, show_progress=False)
    (file_of_short,) = cache.iterdir()
    long = make_dataset({"conversations": make_turns("What?", "A. " * 9)})
    expected = measure_dataset(long, show_progress=False)
    (file_of_long,) = set(cache.iterdir()) - {file_of_short}
    content = file_of_short.read_bytes()
    stem_of_long = file_of_long.name.rpartition("-")[0]
    checksum_of_short = file_of_short.name.rpartition("-")[2]
    for name in (file_of_long.name, f"{stem_of_long}-{checksum_of_short}"):
        file_of_long.unlink()
        (cache / name).write_bytes(content)
        assert are_equal(expected, measure_dataset(long, show_progress=False))


def test_interrupted_measurement_resumes(counting_dataset, cache, monkeypatch):
    dataset, measured = counting_dataset
    unbroken = measure_dataset(dataset, show_progress=False, cache_dir=str(cache / "unbroken"))
    measured.clear()
    measure_sample = sample_lengths._measure_sample

    def interrupt(dataset, index):
        if index == 4:
            raise KeyboardInterrupt
        return measure_sample(dataset, index)

    monkeypatch.setattr(sample_lengths, "SAMPLES_PER_ROUND", 2)
    monkeypatch.setattr(sample_lengths, "SECONDS_PER_SAVE", 0)
    with monkeypatch.context() as patch:
        patch.setattr(sample_lengths, "_measure_sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure_dataset(dataset, show_progress=False)
    assert measured == [0, 1, 2, 3]
    measured.clear()
    assert are_equal(unbroken, measure_dataset(dataset, show_progress=False))
    assert measured == [2, 4, 5], "2 is unusable: measured again"
    assert len(list(cache.glob("lengths-*"))) == 1


def test_ranks_measure_together(counting_dataset, cache):
    """Each measures a share and gets all results; rank 0 caches."""
    dataset, measured = counting_dataset
    alone = measure_dataset(dataset, show_progress=False, cache_dir=str(cache / "alone"))
    world_size, barrier, values = 3, threading.Barrier(3), [None] * 3

    def gather(rank: int, value):
        values[rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def measure_on(rank: int):
        group = RankGroup(rank, world_size, partial(gather, rank))
        return measure_dataset(dataset, show_progress=False, cache_dir=str(cache / str(rank)), rank_group=group)

    measured.clear()
    with ThreadPoolExecutor(world_size) as pool:
        assert all(are_equal(alone, result) for result in pool.map(measure_on, range(world_size)))
    assert sorted(measured) == list(range(6)) and (cache / "0").exists() and not (cache / "1").exists()


def test_ranks_with_different_files_are_refused(make_dataset, tmp_path):
    """As when nodes have copies of their own."""
    dataset = make_dataset({"conversations": make_turns("What?", "A.")})
    group = RankGroup(1, 3, lambda value: ["other", value, value])
    with pytest.raises(ValueError, match="mine: the records of .*data.jsonl differ between rank 0 and rank 1"):
        measure_dataset(dataset, show_progress=False, rank_group=group)


def test_cache_key_depends_on_everything_that_determines_lengths(make_dataset, goldens):
    record = {"image": "a.png", "conversations": make_turns("What?", "A.")}
    base = make_dataset(record)
    names = {make_lengths_cache_key(base)}
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
        names.add(make_lengths_cache_key(make_dataset(record, **variant)))
    assert len(names) == 1 + len(variants)
    again = make_dataset(record, pad2square=True, normalize_type="clip", seed=5)
    assert make_lengths_cache_key(again) == make_lengths_cache_key(base), "irrelevant settings are ignored"


def test_cache_key_depends_on_the_content_of_the_annotation_file_only(make_dataset):
    """Not on its times: a program may rewrite a file and set its old time, or copy it and set a new one."""
    dataset = make_dataset({"conversations": make_turns("What?", "A.")})
    path, key = dataset.annotations.path, make_lengths_cache_key(dataset)
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    other = make_dataset({"conversations": make_turns("What?", "B.")})
    os.utime(path, ns=times)
    assert make_lengths_cache_key(other) != key
    assert make_lengths_cache_key(make_dataset({"conversations": make_turns("What?", "A.")})) == key


def test_cache_key_depends_on_the_tokenizer_but_not_on_its_last_call(make_dataset, goldens):
    dataset = make_dataset({"conversations": make_turns("What?", "A.")})
    name = make_lengths_cache_key(dataset)
    dataset.tokenizer("What?", padding="max_length", truncation=True)
    assert make_lengths_cache_key(dataset) == name
    dataset.tokenizer = load_tokenizer(goldens / "tokenizer")
    dataset.tokenizer.model_max_length = 400
    assert make_lengths_cache_key(dataset) == name
    dataset.tokenizer.add_tokens(["What?"])
    assert make_lengths_cache_key(dataset) != name


def test_unwritable_cache_dir_is_one_error(make_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/cache.*cannot be written.*INTERNVL_CACHE"):
        measure_dataset(
            make_dataset({"conversations": make_turns("What?", "A.")}),
            cache_dir=str(tmp_path / "file" / "cache"),
            show_progress=False,
        )
