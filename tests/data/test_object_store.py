"""A real S3 server: adapters from `s3://` equal those from the disk, also if the server goes away for a while."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.s3_server import BUCKET, S3Server, serve_s3
from helpers.training_runs import TRAIN_ADAPTERS, run_training

from internvl.constants import UnusableSample
from internvl.data.image_files import load_image, read_image_size
from internvl.data.outages import StoreUnavailableError
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS

ADAPTERS = [f"{part}/adapter_model.safetensors" for part in ("vision_model", "language_model")]


@pytest.fixture(scope="module")
def server(tiny_inputs, goldens, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, serve_s3(patch) as server:
        images = (goldens / "dataset/images").iterdir()
        files = {f"images/{file.name}": file for file in images} | {"train.jsonl": tiny_inputs / "train.jsonl"}
        empty = tmp_path_factory.mktemp("empty") / "empty.png"
        empty.touch()
        server.upload(files | {"images/empty.png": empty})
        yield server


@pytest.fixture
def s3_inputs(server, tiny_inputs, tmp_path, monkeypatch) -> Path:
    """Return the inputs of a tiny run whose data is in the store."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_inputs / "model")
    entry = {"root": f"s3://{BUCKET}/images", "annotation": f"s3://{BUCKET}/train.jsonl"}
    (folder / "meta.json").write_text(json.dumps({"tiny": entry}))
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return folder


def read_adapters(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in ADAPTERS}


@pytest.fixture(scope="module")
def train_from_disk(tiny_inputs, tmp_path_factory) -> Callable[[int], dict]:
    """Return a function that trains on the disk with a number of ranks and returns the adapters."""

    @cache
    def train_from_disk(ranks: int) -> dict:
        output = tmp_path_factory.mktemp("disk") / "out"
        run_training(tiny_inputs, output, *TRAIN_ADAPTERS, ranks=ranks)
        return read_adapters(output)

    return train_from_disk


@contextlib.contextmanager
def stop_server_after_step(server: S3Server, output: Path, step: int, seconds: float | None) -> Iterator[None]:
    """Stop the server after a step; start it again after some seconds, by default at the end."""

    def stop() -> None:
        metrics = output / "metrics.jsonl"
        while not has_ended.is_set() and (not metrics.exists() or metrics.read_text().count("\n") < step):
            time.sleep(0.02)
        server.stop()
        if seconds is not None:
            time.sleep(seconds)
            server.start()

    has_ended, thread = threading.Event(), threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
        if seconds is None:
            server.start()


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_workers", [0, 2])
def test_adapters_equal_those_of_the_disk(s3_inputs, train_from_disk, tmp_path, num_workers):
    run_training(s3_inputs, tmp_path / "out", *TRAIN_ADAPTERS, "--dataloader_num_workers", num_workers)
    assert read_adapters(tmp_path / "out") == train_from_disk(1)


@pytest.mark.multiprocess
def test_a_server_that_comes_back_changes_nothing(server, s3_inputs, train_from_disk, tmp_path):
    """The server is away for longer than s3fs itself retries."""
    with stop_server_after_step(server, tmp_path / "out", step=2, seconds=20):
        printed = run_training(s3_inputs, tmp_path / "out", *TRAIN_ADAPTERS).stdout
    assert "Outage, trying again for up to" in printed and f"s3://{BUCKET}/images" in printed
    assert read_adapters(tmp_path / "out") == train_from_disk(1)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "num_workers"), [(1, 0), (2, 2)])
def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(
    server, s3_inputs, train_from_disk, tmp_path, ranks, num_workers
):
    output = tmp_path / "out"
    flags = [*TRAIN_ADAPTERS, "--dataloader_num_workers", num_workers]
    with stop_server_after_step(server, output, step=1, seconds=None):
        done = run_training(
            s3_inputs, output, *flags, "--store_retry_seconds", 1, ranks=ranks, status=PREEMPTED_EXIT_STATUS
        )
    printed = done.stdout + done.stderr
    assert "The next batch cannot be read: no answer for" in printed and "Traceback" not in printed
    (checkpoint,) = output.glob("checkpoint-*")
    assert f"(a store does not answer): the same command resumes from {checkpoint.name}" in printed

    run_training(s3_inputs, output, *flags, ranks=ranks)
    assert read_adapters(output) == train_from_disk(ranks)


@pytest.mark.multiprocess
def test_an_outage_before_the_first_step_asks_for_a_restart(server, s3_inputs, tmp_path):
    server.stop()
    try:
        done = run_training(s3_inputs, tmp_path / "out", *TRAIN_ADAPTERS, status=1)
    finally:
        server.start()
    assert "error: " in done.stderr and "cannot be fetched" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.multiprocess
def test_only_answers_about_an_object_make_an_unusable_sample(server, monkeypatch):
    url = f"s3://{BUCKET}/images"
    for read_fn in (load_image, read_image_size):
        with pytest.raises(UnusableSample, match="does not exist"):
            read_fn(f"{url}/absent.png")
        with pytest.raises(UnusableSample, match="cannot be read"):
            read_fn(f"{url}/empty.png")
    server.stop()
    try:
        for read_fn in (load_image, read_image_size):
            with pytest.raises(StoreUnavailableError, match=rf"{url}/im0.png \(EndpointConnectionError"):
                read_fn(f"{url}/im0.png")
    finally:
        server.start()
    assert read_image_size(f"{url}/im0.png") == load_image(f"{url}/im0.png").size
