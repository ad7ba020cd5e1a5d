"""The saved position in the data: wrong values and damaged files are one sentence."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from internvl.planning.data_schedule import DataSchedule
from internvl.planning.data_state import (
    DATA_STATE_FILE,
    MAX_DATA_CHANGES,
    find_data_state_error,
    read_world_size,
    resume_data,
    save_data_state,
)
from internvl.planning.epoch_plan import PlanLayout, make_sample_lengths

LAYOUT = PlanLayout(seed=1, world_size=2, micro_batch_size=1, gradient_accumulation=2)


def make_schedule(num_samples: int = 20) -> DataSchedule:
    tokens = np.arange(1, num_samples + 1)
    return DataSchedule(make_sample_lengths(tokens, tokens, tokens % 3), tokens.astype(np.int32), LAYOUT)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Write the position after 3 of 5 steps of epoch 0."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    save_data_state(make_schedule(), 0, 3, folder, tmp_path)
    return folder


def edit_state(checkpoint: Path, **fields) -> None:
    file = checkpoint / DATA_STATE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_position_is_resumed(checkpoint):
    assert resume_data(make_schedule(), checkpoint, False, global_step=3) == (0, 3)
    assert read_world_size(checkpoint) == 2


@pytest.mark.parametrize("global_step", [1, 2, 4, 400])
def test_step_of_another_checkpoint_is_an_error(checkpoint, global_step):
    with pytest.raises(ValueError, match=f"epoch 0, step 3 cannot follow after {global_step} steps"):
        resume_data(make_schedule(), checkpoint, False, global_step)


def test_steps_beyond_the_epoch_are_an_error(checkpoint):
    state = json.loads((checkpoint / DATA_STATE_FILE).read_text())
    for count, epoch in ((6, 0), (10**12, 0), (10**12, 3)):
        segment = state["segments"][0] | {"num_steps": count}
        for segments in ([segment], [segment, segment]):
            edit_state(checkpoint, segments=segments, epoch=epoch)
            with pytest.raises(ValueError, match=r"data_state.json is invalid: \d+ steps of epoch \d, which has 5"):
                resume_data(make_schedule(), checkpoint, False, global_step=count)


def test_huge_and_nested_layouts_are_errors(checkpoint):
    state = json.loads((checkpoint / DATA_STATE_FILE).read_text())
    assert find_data_state_error(state) is None
    layout = state["segments"][0]["layout"] | {"world_size": 2**20, "micro_batch_size": 2**20}
    edit_state(checkpoint, segments=[{"layout": layout, "num_steps": 1}])
    with pytest.raises(ValueError, match="layout has steps of 1048576 x 1048576 x 2 rows, expected 1 to 16,777,216"):
        resume_data(make_schedule(), checkpoint, False, global_step=3)
    nested = state
    for _ in range(MAX_DATA_CHANGES):
        nested = state | {"state_before_change": nested}
    assert find_data_state_error(nested) == f"state_before_change is nested more than {MAX_DATA_CHANGES} times"


def write_bomb(file: Path) -> None:
    """Write a small file that claims 5 GB of content."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.npy", b"")
        for info in archive.filelist:
            info.file_size = 2**30  # as the directory says; a real bomb takes a minute to write


def save_arrays(file: Path, **changes) -> None:
    arrays = dict(np.load(file))
    np.savez_compressed(file, **(arrays | changes))


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "empty": lambda file: file.write_bytes(b""),
    "flipped bit": lambda file: file.write_bytes(file.read_bytes().replace(b"lengths", b"lengthz", 1)),
    "other digests": lambda file: save_arrays(file, digests=np.arange(20, dtype=np.int32)),
    "other type": lambda file: save_arrays(file, lengths=np.zeros(20)),
    "fewer digests": lambda file: save_arrays(file, digests=np.arange(19, dtype=np.int32)),
    "weights not finite": lambda file: save_arrays(file, weights=np.full(20, np.nan)),
    "pickle": lambda file: save_arrays(file, digests=np.array([{}] * 20)),
    "bomb": write_bomb,
}


@pytest.mark.parametrize("damage_fn", DAMAGES.values(), ids=DAMAGES)
def test_damaged_list_of_samples_is_an_error(checkpoint, tmp_path, damage_fn):
    (file,) = tmp_path.glob("data-*.npz")
    assert resume_data(make_schedule(19), checkpoint, accept_changed_data=True, global_step=3)[0] == 0
    damage_fn(file)
    with pytest.raises(ValueError, match=r"data-\w+.npz is damaged: .{5}") as caught:
        resume_data(make_schedule(19), checkpoint, accept_changed_data=True, global_step=3)
    assert len(str(caught.value).splitlines()) == 1
