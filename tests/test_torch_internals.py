"""The private names of torch that the package reads exist."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from internvl.torch_internals import (
    DATALOADER_WAIT_METHOD,
    destroy_process_groups,
    is_raised_in_dataloader_wait,
    list_process_groups,
    set_group_timeout,
)


def test_all_process_groups_are_listed(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        added = dist.new_group([0])
        assert list_process_groups() == [dist.group.WORLD, added]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("is_public", [True, False])
def test_the_timeout_of_a_group_is_set(tmp_path, monkeypatch, is_public):
    """By torch's public function, and by the private one of versions before 2.14."""
    if not is_public:
        monkeypatch.delattr(dist, "set_timeout", raising=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        set_group_timeout(dist.group.WORLD, timedelta(seconds=77))
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("version", "waits"), [("2.6.0+cu124", True), ("2.7.1", True), ("2.8.0", False)])
def test_groups_are_destroyed_once_their_threads_are_idle(tmp_path, monkeypatch, version, waits):
    """Without the wait, torch 2.6 hangs within some tens of times."""
    monkeypatch.setattr(torch, "__version__", version)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    start = time.monotonic()
    destroy_process_groups()
    assert not dist.is_initialized()
    assert (time.monotonic() - start >= 0.5) == waits


def fail():
    raise ConnectionResetError


class FailsWhenReceived(Dataset):
    """A sample whose unpickling fails in the process that waits for it."""

    def __getitem__(self, index):
        return self

    def __reduce__(self):
        return (fail, ())


def test_the_dataloader_waits_in_the_named_method():
    assert hasattr(_MultiProcessingDataLoaderIter, DATALOADER_WAIT_METHOD)
    with pytest.raises(ConnectionResetError) as raised:
        next(iter(DataLoader(FailsWhenReceived(), sampler=[0], num_workers=1, collate_fn=list)))
    assert is_raised_in_dataloader_wait(raised.value)


def test_other_errors_are_not_raised_in_the_dataloader():
    with pytest.raises(ConnectionResetError) as raised:
        fail()
    assert not is_raised_in_dataloader_wait(raised.value)
