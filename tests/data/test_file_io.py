"""Remote paths: an object store gives the samples that the disk gives."""

import json
import re
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch
from helpers.s3_server import BUCKET, serve_s3
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


@pytest.fixture(scope="module")
def server():
    """Start an S3 server with an empty bucket."""
    with pytest.MonkeyPatch.context() as patch, serve_s3(patch) as server:
        server.upload({})
        yield server
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def store(server, tmp_path, monkeypatch):
    """Return the file system of the server; bucket and cache are empty."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("s3")
    yield system
    system.invalidate_cache()
    if keys := system.find(BUCKET):
        system.rm(keys)
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def make_local_and_remote(store, make_dataset, tmp_path):
    """Return a function that makes a dataset on disk and in a store."""

    def make_local_and_remote(root: str):
        write_video(tmp_path / "video.mp4")
        write_gif(tmp_path / "video.gif", 9)
        (tmp_path / "text.mp4").write_text("not a video")
        local = make_dataset(*RECORDS, meta={"data_augment": True}, min_num_frame=2, max_num_frame=5)
        system, folder = fsspec.core.url_to_fs(root)
        for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
            system.pipe_file(f"{folder}/{file.relative_to(tmp_path)}", file.read_bytes())
        entry = {"root": root, "annotation": f"{root}/data.jsonl", "data_augment": True}
        remote = type(local)("mine", entry, local.tokenizer, local.num_image_token, local.data_args)
        return local, remote

    return make_local_and_remote


def get_reason(dataset, index: int) -> str:
    """Return the reason for an unusable sample, without root and file size."""
    with pytest.raises(UnusableSample) as caught:
        dataset.get(index, 1)
    return re.sub(r" \(\d+ bytes\)|: .*", "", str(caught.value)).replace(dataset.root, "ROOT")


@pytest.mark.parametrize("root", [f"s3://{BUCKET}/deep/folder", "memory://bucket"])
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
    local, remote = make_local_and_remote(f"s3://{BUCKET}")
    usable = torch.utils.data.Subset(remote, range(6))
    assert are_samples_equal(remote[0], local[0])  # this process has a file system open, too
    loader = torch.utils.data.DataLoader(usable, batch_size=None, num_workers=1, multiprocessing_context=start_method)
    assert all(are_samples_equal(sample, local[index]) for index, sample in enumerate(loader))


def test_remote_dataset_is_measured_as_the_local_one(make_local_and_remote):
    local, remote = make_local_and_remote(f"s3://{BUCKET}")
    here, there = measure_dataset(local, show_progress=False), measure_dataset(remote, show_progress=False)
    assert here.lengths.tolist() == there.lengths.tolist()
    # The truncated image has a header and fails only when it is decoded.
    assert [index for index, _ in there.unusable] == [8, 10, 11]
    assert f"s3://{BUCKET}/absent.png does not exist" in dict(there.unusable)[8]


def test_remote_annotation_file_is_copied_once_per_version(server, store, tmp_path):
    url = f"s3://{BUCKET}/a.jsonl"
    store.pipe_file(url, b'{"id": 0}\n')
    assert open_annotations(url)[0] == {"id": 0}
    (copy,) = get_cache_dir().iterdir()
    time_of_copy = copy.stat().st_mtime_ns
    assert open_annotations(url)[0] == {"id": 0} and copy.stat().st_mtime_ns == time_of_copy
    copy.write_text('{"id": 1}\n')
    assert open_annotations(url)[0] == {"id": 0}, "a damaged copy is fetched again"
    (tmp_path / "changed.jsonl").write_text('{"id": 2, "changed": true}\n')
    server.upload({"a.jsonl": tmp_path / "changed.jsonl"})  # by another client: s3fs of this process does not know
    assert open_annotations(url)[0]["id"] == 2 and len(list(get_cache_dir().iterdir())) == 2
    for absent in (f"s3://{BUCKET}/absent.jsonl", "s3://absent/a.jsonl"):
        with pytest.raises(ValueError, match=f"{absent} does not exist"):
            open_annotations(absent)
    store.pipe_file(f"{BUCKET}/meta.json", json.dumps({"mine": {"root": f"s3://{BUCKET}", "annotation": url}}).encode())
    assert list(load_meta(f"s3://{BUCKET}/meta.json")) == ["mine"]
    (tmp_path / "a.jsonl").touch()
    assert fetch_local_copy(str(tmp_path / "a.jsonl")) == str(tmp_path / "a.jsonl"), "local files are not copied"


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


def test_tcs_loader_reads_object_stores(store, make_dataset, tmp_path):
    make_dataset(ANSWER)
    store.put(str(tmp_path / "frames"), f"{BUCKET}/frames", recursive=True)
    load, url = TCSLoader(), f"s3://{BUCKET}/frames/"
    assert load(f"{url}frame_3.png").size == load(f"my-cluster:{url}frame_3.png").size == (60, 40)
    assert len(load(url, image_type="video", max_num_frames=9, min_num_frames=9)) == 9


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


@pytest.fixture
def http_server():
    """Return the address of a server that answers /STATUS/... with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_only_not_found_of_an_http_server_is_an_answer(http_server, make_dataset):
    def make(url: str):
        records = [{"image": f"{url}/a.png", **ANSWER}, {"video": f"{url}/a.mp4", **ANSWER}]
        return make_dataset(*records, allow_outside_root=True, store_retry_seconds=0)

    outages = {f"{http_server}/503": "503", f"{http_server}/403": "403", "http://127.0.0.1:9": "ClientConnectorError"}
    for url in (f"{http_server}/404", *outages):
        dataset = make(url)
        for method in (dataset.__getitem__, dataset.measure):
            for index in range(2):
                with pytest.raises(StoreUnavailableError if url in outages else UnusableSample) as caught:
                    method(index)
                assert outages.get(url, "does not exist") in str(caught.value)
        with pytest.raises(ValueError, match="cannot be fetched" if url in outages else "does not exist"):
            open_annotations(f"{url}/a.jsonl?download=true")


def test_failing_object_store_is_an_outage(store, make_dataset, monkeypatch):
    """Whatever it raises: the exceptions of cloud packages are no OSErrors."""
    paths = {"image": "a.png", "video": "a.mp4", "videos": "f/"}
    records = [{key: f"s3://{BUCKET}/{path}", **ANSWER} for key, path in paths.items()]
    dataset = make_dataset(*records, allow_outside_root=True, store_retry_seconds=0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(store).clear_instance_cache()
    for method in (dataset.__getitem__, dataset.measure):
        for index in range(len(records)):
            with pytest.raises(StoreUnavailableError, match=rf"s3://{BUCKET}/.* \(NoCredentialsError: "):
                method(index)
    with pytest.raises(ValueError, match=f"s3://{BUCKET}/a.jsonl cannot be fetched: .*NoCredentialsError: "):
        open_annotations(f"s3://{BUCKET}/a.jsonl")
    type(store).clear_instance_cache()
