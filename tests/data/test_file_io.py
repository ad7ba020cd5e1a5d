"""Remote paths: an object store gives the samples that the disk gives."""

import importlib
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from helpers.samples import are_samples_equal, make_turns
from helpers.video_files import write_gif, write_video

from internvl.constants import UnusableSample
from internvl.data.annotations import open_annotations
from internvl.data.disk_cache import get_cache_dir
from internvl.data.file_io import MissingPackageError, fetch_local_copy, join_root
from internvl.data.outages import StoreUnavailableError
from internvl.data.schema import load_meta
from internvl.planning.sample_lengths import measure_dataset
from internvl.train.dataset import TCSLoader

ANSWER = {"conversations": make_turns("What?", "A.")}
RECORDS = [
    {"image": "a.png", **ANSWER},
    {"image": ["a.png", "b.jpg"], **ANSWER},
    {"video": "frames", **ANSWER},
    {"video": "frames/", **ANSWER},
    {"video": "video.gif", **ANSWER},
    {"video": "video.mp4", **ANSWER},
    {"video": "video.mp4", "clip": [1, 2], **ANSWER},
    ANSWER,
    {"image": "absent.png", **ANSWER},
    {"image": "half_a.png", **ANSWER},
    {"video": "absent.mp4", **ANSWER},
    {"video": "text.mp4", **ANSWER},
]
UNUSABLE = range(8, len(RECORDS))


@pytest.fixture
def buckets(tmp_path, monkeypatch):
    """Return the folder of the buckets of a fake s3fs.

    See helpers/object_store/s3fs.py. The cache is empty.
    """
    monkeypatch.setenv("BUCKETS", str(tmp_path / "buckets"))
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers/object_store"))
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    fsspec.register_implementation("s3", importlib.import_module("s3fs").S3FileSystem, clobber=True)
    yield tmp_path / "buckets"
    fsspec.filesystem("memory").store.clear()
    # Other modules use the real package.
    del sys.modules["s3fs"]
    monkeypatch.undo()
    fsspec.register_implementation("s3", importlib.import_module("s3fs").S3FileSystem, clobber=True)


@pytest.fixture
def make_local_and_remote(buckets, make_dataset, tmp_path):
    """Return a function that makes a dataset on disk and in a store."""

    def make_local_and_remote(root: str):
        write_video(tmp_path / "video.mp4")
        write_gif(tmp_path / "video.gif", 9)
        (tmp_path / "text.mp4").write_text("not a video")
        local = make_dataset(*RECORDS, meta={"data_augment": True}, min_num_frame=2, max_num_frame=5)
        system, bucket = fsspec.core.url_to_fs(root)
        for file in [path for path in tmp_path.rglob("*") if path.is_file() and buckets not in path.parents]:
            target = f"{bucket}/{file.relative_to(tmp_path)}"
            system.makedirs(os.path.dirname(target), exist_ok=True)
            system.pipe_file(target, file.read_bytes())
        entry = {"root": root, "annotation": f"{root}/data.jsonl", "data_augment": True}
        remote = type(local)("mine", entry, local.tokenizer, local.num_image_token, local.data_args)
        return local, remote

    return make_local_and_remote


def get_reason(dataset, index: int) -> str:
    """Return the reason for an unusable sample, without root and file size."""
    with pytest.raises(UnusableSample) as caught:
        dataset.get(index, 1)
    return re.sub(r" \(\d+ bytes\)|: .*", "", str(caught.value)).replace(dataset.root, "ROOT")


@pytest.mark.parametrize("root", ["s3://bucket/deep/folder", "memory://bucket"])
def test_remote_samples_equal_local_ones(make_local_and_remote, root):
    local, remote = make_local_and_remote(root)
    assert len(remote) == len(local) and remote.describe(2) == f"mine line 3 ({root}/data.jsonl)"
    for index, record in enumerate(RECORDS):
        if index in UNUSABLE:
            assert get_reason(remote, index) == get_reason(local, index)
            assert f"ROOT/{record.get('image') or record['video']} " in get_reason(remote, index)
        else:
            assert remote.measure(index) == local.measure(index)
            assert are_samples_equal(remote.get(index, 1), local.get(index, 1)), index


@pytest.mark.multiprocess
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_open_their_own_file_systems(make_local_and_remote, start_method):
    local, remote = make_local_and_remote("s3://bucket")
    usable = torch.utils.data.Subset(remote, range(6))
    assert are_samples_equal(remote[0], local[0])  # this process has a file system open, too
    loader = torch.utils.data.DataLoader(usable, batch_size=None, num_workers=1, multiprocessing_context=start_method)
    assert all(are_samples_equal(sample, local[index]) for index, sample in enumerate(loader))


def test_remote_dataset_is_measured_as_the_local_one(make_local_and_remote):
    local, remote = make_local_and_remote("s3://bucket")
    here, there = measure_dataset(local, show_progress=False), measure_dataset(remote, show_progress=False)
    assert here.lengths.tolist() == there.lengths.tolist()
    # The truncated image has a header and fails only when it is decoded.
    assert [index for index, _ in there.unusable] == [8, 10, 11]
    assert "s3://bucket/absent.png does not exist" in dict(there.unusable)[8]


def test_remote_annotation_file_is_copied_once_per_version(buckets):
    (buckets / "b").mkdir(parents=True)
    (buckets / "b" / "a.jsonl").write_text('{"id": 0}\n')
    assert open_annotations("s3://b/a.jsonl")[0] == {"id": 0}
    (copy,) = get_cache_dir().iterdir()
    time_of_copy = copy.stat().st_mtime_ns
    assert open_annotations("s3://b/a.jsonl")[0] == {"id": 0} and copy.stat().st_mtime_ns == time_of_copy
    copy.write_text('{"id": 1}\n')
    assert open_annotations("s3://b/a.jsonl")[0] == {"id": 0}, "a damaged copy is fetched again"
    (buckets / "b" / "a.jsonl").write_text('{"id": 2, "changed": true}\n')
    assert open_annotations("s3://b/a.jsonl")[0]["id"] == 2 and len(list(get_cache_dir().iterdir())) == 2
    for url in ("s3://b/absent.jsonl", "s3://absent/a.jsonl"):
        with pytest.raises(ValueError, match=f"{url} does not exist"):
            open_annotations(url)
    (buckets / "b" / "meta.json").write_text(json.dumps({"mine": {"root": "s3://b", "annotation": "s3://b/a.jsonl"}}))
    assert list(load_meta("s3://b/meta.json")) == ["mine"]
    assert fetch_local_copy(str(buckets / "b" / "a.jsonl")) == str(buckets / "b" / "a.jsonl"), (
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
def test_join_root(root, path, expected):
    assert join_root(root, path) == expected


def test_tcs_loader_reads_object_stores(buckets, make_dataset, tmp_path):
    make_dataset(ANSWER)
    shutil.copytree(tmp_path / "frames", buckets / "b" / "frames")
    load = TCSLoader()
    assert load("s3://b/frames/frame_3.png").size == load("my-cluster:s3://b/frames/frame_3.png").size == (60, 40)
    assert len(load("s3://b/frames/", image_type="video", max_num_frames=9, min_num_frames=9)) == 9


@pytest.mark.parametrize(
    "url, missing_module, reason",
    [
        ("nowhere://b/a.jsonl", None, "Protocol not known: nowhere"),
        ("gs://b/a.jsonl", "gcsfs", "gcsfs"),
        ("s3://b/a.jsonl", "fsspec.core", "fsspec"),
    ],
)
def test_missing_package_ends_the_run(make_dataset, monkeypatch, url, missing_module, reason):
    extensions = {"image": "png", "video": "mp4"}
    records = [{kind: url.replace("jsonl", extension), **ANSWER} for kind, extension in extensions.items()]
    dataset = make_dataset(*records, allow_outside_root=True)
    if missing_module:
        monkeypatch.setitem(sys.modules, missing_module, None)
    calls = [partial(open_annotations, url)]
    calls += [partial(method, index) for method in (dataset.__getitem__, dataset.measure) for index in (0, 1)]
    for call in calls:
        with pytest.raises(ValueError, match=f"{url[:8]}.* cannot be opened by fsspec: .*{reason}") as caught:
            call()
        assert isinstance(caught.value, MissingPackageError) and not isinstance(caught.value, UnusableSample)


def test_failing_object_store_is_an_outage(buckets, make_dataset, monkeypatch):
    """Whatever it raises: the exceptions of cloud packages are no OSErrors."""
    dataset = make_dataset(
        {"image": "s3://b/a.png", **ANSWER},
        {"video": "s3://b/a.mp4", **ANSWER},
        {"video": "s3://b/f/", **ANSWER},
        allow_outside_root=True,
        store_retry_seconds=0,
    )

    class NoCredentials(Exception):
        pass

    def raise_no_credentials(*args, **kwargs):
        raise NoCredentials("no key")

    for name in ("exists", "isdir", "ls", "cat_file", "open", "checksum"):
        monkeypatch.setattr(sys.modules["s3fs"].S3FileSystem, name, raise_no_credentials)
    for method in (dataset.__getitem__, dataset.measure):
        for index in range(3):
            with pytest.raises(StoreUnavailableError, match=r"s3://b/.* \(NoCredentials: no key\)"):
                method(index)
    with pytest.raises(ValueError, match="s3://b/a.jsonl cannot be fetched: .*NoCredentials: no key"):
        open_annotations("s3://b/a.jsonl")
