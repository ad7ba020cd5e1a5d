"""Paths with a protocol: what a data set reads from a store is what it reads from the disk."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from helpers.samples import samples_equal, turns
from helpers.video_files import film, gif

from internvl.constants import UnusableSample
from internvl.data.annotations import JsonlFile
from internvl.data.file_io import MissingPackage, fetch_local_copy, get_cache_dir, join_root
from internvl.data.schema import load_meta
from internvl.planning.sample_lengths import measure_dataset
from internvl.train.dataset import TCSLoader

ANSWER = {"conversations": turns("What?", "A.")}
RECORDS = [
    {"image": "a.png", **ANSWER},
    {"image": ["a.png", "b.jpg"], **ANSWER},
    {"video": "film", **ANSWER},
    {"video": "film/", **ANSWER},
    {"video": "film.gif", **ANSWER},
    {"video": "film.mp4", **ANSWER},
    {"video": "film.mp4", "clip": [1, 2], **ANSWER},
    ANSWER,
    {"image": "absent.png", **ANSWER},
    {"image": "half_a.png", **ANSWER},
    {"video": "absent.mp4", **ANSWER},
    {"video": "text.mp4", **ANSWER},
]
BROKEN = range(8, len(RECORDS))


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """The stand-in of s3fs (see object_store/s3fs.py), with its buckets, and a cache, in this test's folder."""
    monkeypatch.setenv("BUCKETS", str(tmp_path / "buckets"))
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers/object_store"))
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    fsspec.register_implementation("s3", importlib.import_module("s3fs").S3FileSystem, clobber=True)
    yield tmp_path / "buckets"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def twins(stores, make, tmp_path):
    """A function: the same data set on the disk and below a URL."""

    def twins(root: str):
        film(tmp_path / "film.mp4")
        gif(tmp_path / "film.gif", 9)
        (tmp_path / "text.mp4").write_text("not a film")
        local = make(*RECORDS, meta={"data_augment": True}, min_num_frame=2, max_num_frame=5)
        system, inner = fsspec.core.url_to_fs(root)
        for file in [path for path in tmp_path.rglob("*") if path.is_file() and stores not in path.parents]:
            target = f"{inner}/{file.relative_to(tmp_path)}"
            system.makedirs(os.path.dirname(target), exist_ok=True)
            system.pipe_file(target, file.read_bytes())
        entry = {"root": root, "annotation": f"{root}/data.jsonl", "data_augment": True}
        remote = type(local)("mine", entry, local.tokenizer, local.num_image_token, local.data_args)
        return local, remote

    return twins


def complaint(dataset, index: int) -> str:
    """What is wrong with a sample, where it lies and how many bytes it has left out."""
    with pytest.raises(UnusableSample) as caught:
        dataset.get(index, 1)
    return re.sub(r" \(\d+ bytes\)|: .*", "", str(caught.value)).replace(dataset.root, "ROOT")


@pytest.mark.parametrize("root", ["s3://bucket/deep/folder", "memory://bucket"])
def test_same_samples_from_a_store_as_from_the_disk(twins, root):
    local, remote = twins(root)
    assert len(remote) == len(local) and remote.describe(2) == f"mine line 3 ({root}/data.jsonl)"
    for index, record in enumerate(RECORDS):
        if index in BROKEN:
            assert complaint(remote, index) == complaint(local, index)
            assert f"ROOT/{record.get('image') or record['video']} " in complaint(remote, index)
        else:
            assert remote.measure(index) == local.measure(index)
            assert samples_equal(remote.get(index, 1), local.get(index, 1)), index


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_open_stores_themselves(twins, start):
    local, remote = twins("s3://bucket")
    good = torch.utils.data.Subset(remote, range(6))
    assert samples_equal(remote[0], local[0])  # this process has a file system open, too
    loader = torch.utils.data.DataLoader(good, batch_size=None, num_workers=1, multiprocessing_context=start)
    assert all(samples_equal(sample, local[index]) for index, sample in enumerate(loader))


def test_measured_like_the_local_one(twins):
    local, remote = twins("s3://bucket")
    here, there = measure_dataset(local, progress=False), measure_dataset(remote, progress=False)
    assert [sizes.tolist() for sizes in here.lengths] == [sizes.tolist() for sizes in there.lengths]
    # Only the films and pictures that are there and broken inside have to be decoded to be found.
    assert [index for index, _ in there.bad] == [8, 10]
    assert "s3://bucket/absent.png does not exist" in dict(there.bad)[8]


def test_an_annotation_is_copied_once_for_each_content(stores):
    (stores / "b").mkdir(parents=True)
    (stores / "b" / "a.jsonl").write_text('{"id": 0}\n')
    assert JsonlFile("s3://b/a.jsonl")[0] == {"id": 0}
    JsonlFile("s3://b/a.jsonl")
    (copy,) = get_cache_dir().iterdir()
    copy.write_text('{"id": 1}\n')
    assert JsonlFile("s3://b/a.jsonl")[0] == {"id": 1}, "it is the copy that is read"
    (stores / "b" / "a.jsonl").write_text('{"id": 2, "changed": true}\n')
    assert JsonlFile("s3://b/a.jsonl")[0]["id"] == 2 and len(list(get_cache_dir().iterdir())) == 2
    for url in ("s3://b/absent.jsonl", "s3://absent/a.jsonl"):
        with pytest.raises(ValueError, match=f"{url} does not exist"):
            JsonlFile(url)
    (stores / "b" / "meta.json").write_text(json.dumps({"mine": {"root": "s3://b", "annotation": "s3://b/a.jsonl"}}))
    assert list(load_meta("s3://b/meta.json")) == ["mine"]
    assert fetch_local_copy(str(stores / "b" / "a.jsonl")) == str(stores / "b" / "a.jsonl"), (
        "local files are not copied"
    )


@pytest.mark.parametrize(
    "root, path, expected",
    [
        ("data", "a.png", "data/a.png"),
        ("data/", "a.png", "data/a.png"),
        ("data", "/other/a.png", "/other/a.png"),
        ("", "s3://bucket/a.png", "s3://bucket/a.png"),
        ("data", "s3://bucket/a.png", "s3://bucket/a.png"),
        ("s3://bucket", "x/a.png", "s3://bucket/x/a.png"),
        ("s3://bucket/", "x/a.png", "s3://bucket/x/a.png"),
        ("s3://bucket/", "gs://other/a.png", "gs://other/a.png"),
        ("cluster:", "s3://bucket/a.png", "s3://bucket/a.png"),
    ],
)
def test_where_a_path_leads(root, path, expected):
    assert join_root(root, path) == expected


def test_loader_of_upstream_reads_stores(stores, make, tmp_path):
    make(ANSWER)
    shutil.copytree(tmp_path / "film", stores / "b" / "film")
    load = TCSLoader()
    assert load("s3://b/film/frame_3.png").size == load("my-cluster:s3://b/film/frame_3.png").size == (60, 40)
    assert len(load("s3://b/film/", image_type="video", max_num_frames=9, min_num_frames=9)) == 9


@pytest.mark.parametrize(
    "url, absent, reason",
    [
        ("nowhere://b/a.jsonl", None, "Protocol not known: nowhere"),
        ("gs://b/a.jsonl", "gcsfs", "gcsfs"),
        ("s3://b/a.jsonl", "fsspec.core", "fsspec"),
    ],
)
def test_a_missing_package_ends_the_run_in_one_sentence(make, monkeypatch, url, absent, reason):
    records = [{kind: url.replace("jsonl", end), **ANSWER} for kind, end in (("image", "png"), ("video", "mp4"))]
    dataset = make(*records, allow_outside_root=True)
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)
    uses = [lambda: JsonlFile(url)] + [
        lambda u=use, i=i: u(i) for use in (dataset.__getitem__, dataset.measure) for i in (0, 1)
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"{url[:8]}.* cannot be opened by fsspec: .*{reason}") as caught:
            use()
        assert isinstance(caught.value, MissingPackage) and not isinstance(caught.value, UnusableSample)


def test_a_store_that_fails_is_a_bad_sample_and_not_the_end(stores, make, monkeypatch):
    """Whatever it raises: those of cloud packages are no OSErrors."""
    dataset = make(
        {"image": "s3://b/a.png", **ANSWER},
        {"video": "s3://b/a.mp4", **ANSWER},
        {"video": "s3://b/f/", **ANSWER},
        allow_outside_root=True,
    )

    class NoCredentials(Exception):
        pass

    def refuse(*args, **kwargs):
        raise NoCredentials("no key")

    for name in ("exists", "isdir", "ls", "cat_file", "open", "checksum"):
        monkeypatch.setattr(sys.modules["s3fs"].S3FileSystem, name, refuse)
        for use in (dataset.__getitem__, dataset.measure):
            for index in range(3):
                with pytest.raises(
                    UnusableSample, match="s3://b/.* (does not exist|cannot be read: NoCredentials: no key)"
                ):
                    use(index)
    with pytest.raises(ValueError, match="s3://b/a.jsonl cannot be fetched: NoCredentials: no key"):
        JsonlFile("s3://b/a.jsonl")
